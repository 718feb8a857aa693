#!/usr/bin/env bash
# Builds the Docker image that train.sh and infer.sh run in.
#
# Usage: ./build.sh [--jetson] [--base-image IMG] [--tag TAG] [--no-cache] [--dry-run] [DOCKER BUILD ARGS…]
#
#   --jetson            the image of Dockerfile.jetson, for ./infer.sh --jetson: docs/jetson.md
#   --base-image IMG    any image with Python 3.11 or newer (that of the Dockerfile)
#   --tag TAG           name of the image ($SAM3_IMAGE or sam3-finetuning, sam3-finetuning-jetson)
#   --no-cache          build every layer anew
#   --dry-run           print the command that would run, and run nothing
#   --help              print this
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/runtime.sh
source "$root/scripts/runtime.sh"

dry_run=''
tag=''
options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --base-image | --tag) if [ -z "${2:-}" ]; then fail "$1 needs a value"; fi ;;
  esac
  case "$1" in
    --base-image) options+=(--build-arg "BASE_IMAGE=$2") && shift ;;
    --base-image=*) options+=(--build-arg "BASE_IMAGE=${1#*=}") ;;
    --tag) tag="$2" && shift ;;
    --tag=*) tag="${1#*=}" ;;
    --jetson) use_jetson && options+=(--file "$root/Dockerfile.jetson") ;;
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
command=(env DOCKER_BUILDKIT=1 docker build --network host --tag "${tag:-$image}"
  ${options[@]+"${options[@]}"} "$root")

if [ -n "$dry_run" ]; then
  print_command "${command[@]}"
  exit 0
fi
ask_engine >/dev/null || fail "no Docker engine answers: start one, or use SAM3_RUNTIME=local"
exec "${command[@]}"
