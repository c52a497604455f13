# Sourced by run_benchmark.sh and run_tests.sh from the project folder: leaves the interpreter to use in $python.
#
# $PYTHON set    that interpreter is used as it is; nothing is installed.
# otherwise      $VENV_DIR (default .venv) is made, or made anew when requirements.txt has changed: beside it, and put
#                in its place when complete. Only what was made here, which its mark tells, is ever replaced.
# $TORCH_INDEX   a package index: torch and torchvision come from there, in the lock's versions, with what they need.
#                Unset: as the environment was made; empty: from the lock, as everything else.
# shellcheck shell=bash

fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
version='import platform; print(platform.python_version())'
mark=installed-requirements.txt  # in an environment: what it holds; empty: it is not complete
unfinished=.segmae-part          # behind its name until it is

fail() {
    echo "Error: $*" >&2
    exit 2
}

find_python() {  # the first interpreter on the PATH that fits
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c "$fits" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    local found="none"
    command -v python3 >/dev/null && found="$(python3 -c "$version" 2>/dev/null)"
    fail "SegMAE needs Python 3.11 to 3.14 on the PATH; python3 here is: $found."
}

is_ours() {
    [ -f "$1/$mark" ] && [ -f "$1/pyvenv.cfg" ]
}

refuse_others() {  # at $1, where nothing may be, or an empty folder, or what was made here
    if [ -e "$1" ] || [ -L "$1" ]; then
        is_ours "$1" || rmdir -- "$1" 2>/dev/null ||
            fail "VENV_DIR: $1 is no environment that was made here, and is left alone; name another folder."
    fi
}

is_complete() {  # it may be, and its interpreter gone with an older system
    wanted | cmp -s - "$1/$mark" && "$1/bin/python" -c "$fits" 2>/dev/null
}

hold() {  # the file $1, as descriptor 9, which only one call can; whoever had it removes it
    until [ "$1" -ef /dev/fd/9 ]; do
        { exec 9>>"$1"; } 2>/dev/null || fail "VENV_DIR: $1 cannot be made; name another folder."
        flock -n 9 || { echo "Another call sets this environment up; waiting for it." && flock 9; }
    done
}

make_environment() (  # at $1
    base="$(find_python)" || exit 2
    part="$1$unfinished"
    refuse_others "$1"
    mkdir -p -- "$(dirname "$1")" 2>/dev/null || fail "VENV_DIR: $1 cannot be made; name another folder."
    hold "$part.lock"
    trap 'rm -f -- "$part.lock"' EXIT
    ! is_complete "$1" || exit 0  # by the call that was waited for
    # What was there when a kill came between the two last steps below.
    [ -e "$1" ] || [ ! -d "$part/replaced" ] || mv -T -- "$part/replaced" "$1"
    refuse_others "$part"
    echo "Setting up $1 with $base ($("$base" -c "$version")): downloads and unpacks about 6 GB, once; some minutes."
    rm -rf -- "$part" && mkdir -- "$part" && touch -- "$part/pyvenv.cfg" "$part/$mark" ||
        fail "VENV_DIR: $1 cannot be made; name another folder."
    trap 'rm -rf -- "$part" "$part.lock"' EXIT  # whatever ends this, what was there is as it was
    trap 'exit 75' INT TERM
    "$base" -m venv "$part" || fail "could not make a virtual environment in $1 (on Debian and Ubuntu: apt install python3-venv)."
    pip=("$part/bin/python" -m pip install --quiet --disable-pip-version-check)
    # From that index alone: another one that pip is set up with would be asked, too.
    from_index=(env PIP_CONFIG_FILE=/dev/null PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= "${pip[@]}" --index-url "$index")
    locked="$part/locked.txt"
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
        fail "installing requirements.txt failed, see above, and $1 is as it was; run the same command again when that is mended."
    [ -z "$index" ] || "${from_index[@]}" "${torch[@]}" ||
        fail "what ${torch[*]} need is not all at TORCH_INDEX=$index, see above, and $1 is as it was."
    # Programs know the path of the environment that they belong to.
    grep -rlIZ "\\$unfinished" "$part/bin" "$part/pyvenv.cfg" | xargs -0r sed -i "s/\\$unfinished//g"
    wanted >"$part/$mark"
    trap '' INT TERM
    trap 'rm -f -- "$part.lock"' EXIT
    ! is_ours "$1" || mv -T -- "$1" "$part/replaced"
    if ! mv -T -- "$part" "$1"; then
        [ ! -d "$part/replaced" ] || mv -T -- "$part/replaced" "$1"
        fail "VENV_DIR: $part could not become $1; name another folder."
    fi
    rm -rf -- "$1/replaced"
    echo "Set up."
)

wanted() {  # what the environment has to hold
    cat requirements.txt
    [ -z "$index" ] || echo "# TORCH_INDEX=$index"
}

if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program."
    "$PYTHON" -c "$fits" || fail "SegMAE needs Python 3.11 to 3.14; PYTHON=$PYTHON is $("$PYTHON" -c "$version")."
    python="$PYTHON"
else
    # Where a link leads to: that is what is replaced, not the link.
    venv="$(readlink -m -- "${VENV_DIR:-.venv}")" || fail "VENV_DIR=$VENV_DIR cannot be followed; name another folder."
    index="${TORCH_INDEX-$(sed -n 's/^# TORCH_INDEX=//p' "$venv/$mark" 2>/dev/null || true)}"
    is_complete "$venv" || make_environment "$venv"
    python="$venv/bin/python"
fi
