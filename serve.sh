#!/usr/bin/env bash
# Answers over HTTP what infer.sh answers for files: an API, and a page at http://127.0.0.1:8000.
#
# Usage: ./serve.sh [--dry-run] [ARGS…]     the arguments: ./serve.sh --help
#
#   --dry-run             print the command that would run, and run nothing
#
# Environment:
#   SAM3_API_KEY          the key that clients must send; without one only this machine may ask
#   SAM3_RUNTIME          docker or local; unset: docker where an engine answers and has the image
#   SAM3_IMAGE            the image (sam3-finetuning)
#   GPUS                  for docker: auto, none, all, or a list such as 0,1 (auto)
#   SAM3_BASE             file of the weights that a LoRA belongs to, where they were moved
#   HF_TOKEN, MLFLOW_TRACKING_URI, _USERNAME, _PASSWORD, _TOKEN, LABEL_STUDIO_URL, _API_KEY: passed on
#
# In docker only the current folder and the paths given to flags are visible. The container has this
# machine's network, so that --host and --port mean the same inside.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/runtime.sh
source "$root/scripts/runtime.sh"

app_command serve "$@"
exec "${command[@]}"
