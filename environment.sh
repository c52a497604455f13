# Sourced by run_benchmark.sh and run_tests.sh from the project folder: leaves the interpreter to use in $python.
#
# $PYTHON set    that interpreter is used as it is; nothing is installed.
# otherwise      $VENV_DIR (default .venv) is made, or brought up to date when requirements.txt has changed.
# shellcheck shell=bash

fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
version='import platform; print(platform.python_version())'

fail() {
    echo "Error: $*" >&2
    exit 2
}

find_python() {  # the first interpreter on the PATH that fits
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c "$fits" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    local found="none"
    command -v python3 >/dev/null && found="$(python3 -c "$version" 2>/dev/null)"
    fail "SegMAE needs Python 3.11, 3.12 or 3.13 on the PATH; python3 here is: $found."
}

make_environment() {  # in the folder $1
    local base
    base="$(find_python)" || exit 2
    echo "Setting up $1 with $base ($("$base" -c "$version")): downloads and unpacks about 6 GB, once; some minutes."
    "$base" -m venv --clear "$1" || fail "could not make a virtual environment in $1 (on Debian and Ubuntu: apt install python3-venv)."
    # The lock is complete, so nothing is resolved; see lock_dependencies.sh on why it must not be.
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.txt ||
        fail "installing requirements.txt into $1 failed; run the same command again when the cause above is mended."
    cp requirements.txt "$1/installed-requirements.txt"  # last: an interrupted set-up starts over
    echo "Set up."
}

if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program."
    "$PYTHON" -c "$fits" || fail "SegMAE needs Python 3.11, 3.12 or 3.13; PYTHON=$PYTHON is $("$PYTHON" -c "$version")."
    python="$PYTHON"
else
    venv="${VENV_DIR:-.venv}"
    cmp -s requirements.txt "$venv/installed-requirements.txt" || make_environment "$venv"
    python="$venv/bin/python"
fi
