#!/usr/bin/env bash
# Builds the Docker image that train.sh and infer.sh run in.
#
# Usage: ./build.sh [--base-image IMG] [--tag TAG] [--no-cache] [--dry-run] [DOCKER BUILD ARGS…]
#
#   --base-image IMG    any image with Python 3.11 or newer (that of the Dockerfile)
#   --tag TAG           name of the image ($SAM3_IMAGE or sam3-finetuning)
#   --no-cache          build every layer anew
#   --dry-run           print the command that would run, and run nothing
#   --help              print this
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/runtime.sh
source "$root/scripts/runtime.sh"

dry_run=''
options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --base-image | --tag) if [ -z "${2:-}" ]; then fail "$1 needs a value"; fi ;;
  esac
  case "$1" in
    --base-image) options+=(--build-arg "BASE_IMAGE=$2") && shift ;;
    --base-image=*) options+=(--build-arg "BASE_IMAGE=${1#*=}") ;;
    --tag) image="$2" && shift ;;
    --tag=*) image="${1#*=}" ;;
    --dry-run) dry_run=yes ;;
    -h | --help) usage && exit ;;
    *) options+=("$1") ;;
  esac
  shift
done
# What an image was made of, where git knows.
revision="$(git -C "$root" describe --always --abbrev=40 --exclude '*' --dirty 2>/dev/null || true)"
if [ -n "$revision" ]; then
  options+=(--label "org.opencontainers.image.revision=$revision")
fi
command=(env DOCKER_BUILDKIT=1 docker build --network host --tag "$image"
  ${options[@]+"${options[@]}"} "$root")

if [ -n "$dry_run" ]; then
  print_command "${command[@]}"
  exit 0
fi
ask_engine >/dev/null || fail "no Docker engine answers: start one, or use SAM3_RUNTIME=local"
exec "${command[@]}"
