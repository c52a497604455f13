#!/usr/bin/env bash
# Sets the environment up, then runs every check: ruff, mypy, pytest. Fails when one of them does.
#
#   ./run_tests.sh                       everything
#   ./run_tests.sh -m "not slow"         arguments go to pytest
#
# PYTHON=/path/to/python uses an existing environment, VENV_DIR=DIR makes it elsewhere than in .venv.
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh

failed=()
check() {
    echo "== $*"
    "$python" -m "$@" || failed+=("$1")
}
check ruff check .
check ruff format --check .
# mypy works beside pytest, on one core; what it says is shown when it finds something.
echo "== mypy, beside pytest"
said=$(mktemp)
"$python" -m mypy >"$said" 2>&1 &
mypy=$!
trap 'kill $mypy 2>/dev/null || true; rm -f "$said"' EXIT
# A file's tests stay together, for what they share, in the order of tests/conftest.py: the long ones are not
# the last.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
OMP_NUM_THREADS=1 check pytest -n "$workers" --dist loadfile --no-loadscope-reorder --durations 15 "$@"
wait $mypy || { cat "$said" && failed+=(mypy); }

if [ ${#failed[@]} -gt 0 ]; then
    echo "Failed: ${failed[*]}" >&2
    exit 1
fi
