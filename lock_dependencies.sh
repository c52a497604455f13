#!/usr/bin/env bash
# Makes Pipfile.lock and requirements.txt again from Pipfile, with the newest versions it allows.
# Both are complete and hashed, name no package index, and are installed without dependency resolution.
# Every package has to be there for every Python that environment.sh takes: lock_dependencies.sh --check asks that alone.
set -euo pipefail
cd "$(dirname "$0")"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --upgrade pip pipenv

# Without a compiled part: their sources do for any Python, which the build of a wheel shows.
source_only=(onedl-mmcv onedl-mmsegmentation)

check() {  # requirements.txt
    local version pip=("$work/venv/bin/python" -m pip) pins="$work/pins.txt" built
    sed -E '/^#/d; s/ --hash=[^ ]+//g' requirements.txt >"$pins"  # with hashes, all would be downloaded
    mapfile -t built < <(grep -E "^($(IFS='|' && echo "${source_only[*]}"))==" "$pins")
    for version in 3.11 3.12 3.13 3.14; do
        "${pip[@]}" install --quiet --dry-run --no-deps --ignore-installed --python-version "$version" --target "$work" \
            --only-binary :all: --no-binary "$(IFS=, && echo "${source_only[*]}")" -r "$pins"
        if "python$version" -c "" 2>/dev/null; then
            "${pip[@]}" --python "$(command -v "python$version")" wheel --quiet --no-deps --wheel-dir "$work/$version" "${built[@]%%;*}"
            echo "Python $version: every package is there, ${source_only[*]} can be built"
        else
            echo "Python $version: every package is there; not run: python$version is not on the PATH"
        fi
    done
}

if [ "${1:-}" = --check ]; then
    check
    exit
fi

# pipenv fills sources in by itself where the Pipfile names none; a copy keeps the real one as it is.
cp Pipfile "$work/Pipfile"
(cd "$work" && PIPENV_PIPFILE="$work/Pipfile" PIPENV_IGNORE_VIRTUALENVS=1 WORKON_HOME="$work/envs" \
    "$work/venv/bin/pipenv" lock)

"$work/venv/bin/python" - "$work/Pipfile.lock" <<'PY'
"""Take the package index out of the lock, and OpenCV's desktop build with it."""
import json
import pathlib
import sys

path = pathlib.Path(sys.argv[1])
lock = json.loads(path.read_text())
lock["_meta"]["sources"] = []
for section in ("default", "develop"):
    # onedl-mmcv asks for opencv-python, which needs libGL; the headless build gives the same `cv2`.
    lock[section].pop("opencv-python", None)
    for package in lock[section].values():
        package.pop("index", None)
path.write_text(json.dumps(lock, indent=4, sort_keys=True) + "\n")
PY
cp "$work/Pipfile.lock" Pipfile.lock
(cd "$work" && PIPENV_PIPFILE="$work/Pipfile" PIPENV_IGNORE_VIRTUALENVS=1 WORKON_HOME="$work/envs" \
    "$work/venv/bin/pipenv" verify)

{
    echo "# Made by ./lock_dependencies.sh from Pipfile.lock. Install it without dependency resolution:"
    echo "# python -m pip install --no-deps --require-hashes -r requirements.txt"
    (cd "$work" && PIPENV_PIPFILE="$work/Pipfile" PIPENV_IGNORE_VIRTUALENVS=1 WORKON_HOME="$work/envs" \
        "$work/venv/bin/pipenv" requirements --hash --dev) | grep -v -E '^(-i|--index-url|--extra-index-url) '
} >"$work/requirements.txt"
cp "$work/requirements.txt" requirements.txt
echo "Pipfile.lock and requirements.txt: $(grep -c '==' requirements.txt) packages"
check
