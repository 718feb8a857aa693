#!/usr/bin/env bash
# Runs the tests, always in .venv, which it makes where it is missing or out of date.
#
# Usage: ./test.sh [--all] [PYTEST ARGS…]   paths are relative to the repository
#
#   ./test.sh                     the fast tests: every room, in minutes
#   ./test.sh --all               the slow tests, and those of whole systems, as well
#   ./test.sh tests/test_scripts.py -k docker
#
# Where a path, -k or -m names tests, it chooses from all of them. -m 'not (slow or system)' are
# the fast ones (tests/tiers.py).
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/runtime.sh
source "$root/scripts/runtime.sh"

ensure_venv
cd "$root"
# Workers with a thread each: more threads than cores wait for one another. One worker more than
# cores, as many tests wait for another process; eight at most, as each takes more than 1 GB.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cores="$(getconf _NPROCESSORS_ONLN)"
workers=$((cores < 7 ? cores + 1 : 8))
# The tests start app/ some hundred times: each would compile it anew where none keeps its bytecode.
unset PYTHONDONTWRITEBYTECODE
exec "$venv/bin/python" -m pytest -n "$workers" --dist worksteal "$@"
