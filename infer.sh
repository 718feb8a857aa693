#!/usr/bin/env bash
# Finds your things in images, with SAM 3 or with weights that train.sh made.
#
# Usage: ./infer.sh [--dry-run] [ARGS…]     the arguments: ./infer.sh --help
#        ./infer.sh --jetson DIR [ARGS…]    an exported folder, in the image of ./build.sh --jetson
#
#   --dry-run             print the command that would run, and run nothing
#
# Environment:
#   SAM3_RUNTIME          docker or local; unset: docker where an engine answers and has the image
#   SAM3_IMAGE            the image (sam3-finetuning; with --jetson sam3-finetuning-jetson)
#   GPUS                  for docker: auto, none, all, or a list such as 0,1 (auto)
#   SAM3_BASE             file of the weights that a LoRA belongs to, where they were moved
#   HF_TOKEN, ROBOFLOW_API_KEY, MLFLOW_TRACKING_URI, _USERNAME, _PASSWORD, _TOKEN    passed on
#
# In docker only the current folder and the paths given to flags are visible, and of a folder of
# links only those that stay inside it.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/runtime.sh
source "$root/scripts/runtime.sh"

for argument in "$@"; do
  if [ "$argument" = --jetson ]; then
    jetson_command "$@"
    exec "${command[@]}"
  fi
done
app_command infer "$@"
exec "${command[@]}"
