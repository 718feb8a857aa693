#!/usr/bin/env bash
# Teaches SAM 3 to find your things.
#
# Usage: ./train.sh [--dry-run] [ARGS…]     the arguments: ./train.sh --help
#
#   --dry-run             print the command that would run, and run nothing
#
# Environment:
#   SAM3_RUNTIME          docker or local; unset: docker where an engine answers and has the image
#   SAM3_IMAGE            the image (sam3-finetuning)
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

app_command train "$@"
exec "${command[@]}"
