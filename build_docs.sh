#!/usr/bin/env bash
# Builds the site into docs/_build/index.html; a warning is an error. Its search works without a server.
#
# PYTHON and VENV_DIR as for ./run_tests.sh. Sphinx and its extensions go to docs/.packages, once.
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh

packages=docs/.packages wanted=docs/site/requirements.txt
if ! cmp --quiet "$wanted" "$packages/installed.txt"; then
    rm -rf "$packages"
    "$python" -m pip install --quiet --disable-pip-version-check --target "$packages" --requirement "$wanted" 2>&1 |
        grep -v "dependency\|requires" >&2 || true # of the environment, which it leaves as it is
    cp "$wanted" "$packages/installed.txt"
fi
PYTHONPATH="$packages" "$python" -m sphinx --quiet -W --keep-going -n -c docs/site . docs/_build
echo "docs/_build/index.html"
