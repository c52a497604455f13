# Sourced by run_benchmark.sh and run_tests.sh from the project folder: leaves the interpreter to use in $python.
#
# $PYTHON set    that interpreter is used as it is; nothing is installed.
# otherwise      $VENV_DIR (default .venv) is made, or brought up to date when requirements.txt has changed.
# $TORCH_INDEX   a package index: torch and torchvision come from there, in the lock's versions, with what they need.
#                Unset: as the environment was made; empty: from the lock, as everything else.
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
    local pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check) said torch
    # From that index alone: another one that pip is set up with would be asked, too.
    local from_index=(env PIP_CONFIG_FILE=/dev/null PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= "${pip[@]}" --index-url "$index")
    local locked="$1/locked.txt"
    mapfile -t torch < <(sed -nE 's/^(torch|torchvision)(==[^; ]+).*/\1\2/p' requirements.txt)
    if [ -n "$index" ]; then  # first without what they need, so that a wrong index is found at once
        said="$("${from_index[@]}" --no-deps "${torch[@]}" 2>&1)" ||
            fail "no ${torch[*]} at TORCH_INDEX=$index: $(tail -n 1 <<<"$said")"
        # nvidia-ml-py asks the driver and is no part of CUDA.
        sed -E '/^nvidia-ml-py==/!{/^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==/d}' \
            requirements.txt >"$locked"
    else
        cp requirements.txt "$locked"
    fi
    # The lock is complete, so nothing is resolved; see lock_dependencies.sh on why it must not be.
    "${pip[@]}" --no-deps --require-hashes -r "$locked" ||
        fail "installing requirements.txt into $1 failed; run the same command again when the cause above is mended."
    [ -z "$index" ] || "${from_index[@]}" "${torch[@]}" ||
        fail "what ${torch[*]} need is not all at TORCH_INDEX=$index; see above."
    wanted >"$1/installed-requirements.txt"  # last: an interrupted set-up starts over
    echo "Set up."
}

wanted() {  # what the environment has to hold
    cat requirements.txt
    [ -z "$index" ] || echo "# TORCH_INDEX=$index"
}

if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program."
    "$PYTHON" -c "$fits" || fail "SegMAE needs Python 3.11, 3.12 or 3.13; PYTHON=$PYTHON is $("$PYTHON" -c "$version")."
    python="$PYTHON"
else
    venv="${VENV_DIR:-.venv}"
    made="$venv/installed-requirements.txt"
    index="${TORCH_INDEX-$(sed -n 's/^# TORCH_INDEX=//p' "$made" 2>/dev/null || true)}"
    wanted | cmp -s - "$made" || make_environment "$venv"
    python="$venv/bin/python"
fi
