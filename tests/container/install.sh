#!/usr/bin/env bash
# Installs what the tests of the image and of the scripts need beyond .venv: an engine that is not
# started, debootstrap, bats, and Compose into .venv. Only as root on Debian and its like.
#
# Usage: tests/container/install.sh
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=scripts/runtime.sh
source "$root/scripts/runtime.sh"

if [ ! -x "$venv/bin/docker-compose" ]; then
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check --require-hashes --no-deps \
    --requirement "$root/tests/container/requirements.txt"
fi

packages=()
command -v dockerd >/dev/null || packages+=(docker.io)
command -v debootstrap >/dev/null || packages+=(debootstrap)
command -v bats >/dev/null || packages+=(bats)
if [ ${#packages[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "${packages[*]} missing, and only root on Debian can have them installed by this"
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends \
    "${packages[@]}" >/dev/null
fi
