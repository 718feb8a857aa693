#!/usr/bin/env bash
# Runs the tests, always in .venv, which it makes where it is missing or out of date.
#
# Usage: ./test.sh [PYTEST ARGS…]           paths are relative to the repository
#
#   ./test.sh                     the whole suite
#   ./test.sh tests/test_scripts.py -k docker
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/runtime.sh
source "$root/scripts/runtime.sh"

ensure_venv
cd "$root"
# Two workers with a thread each: more threads than cores wait for one another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
