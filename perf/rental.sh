#!/usr/bin/env bash
# Prepares a campaign on a rented GPU that has torch and no network, and prints the two commands to run there.
#
#   perf/rental.sh IMAGES MASKS    photographs (a folder with train/), and their segments in any form
#
# .whl/ gets the packages of our lock that such a machine lacks, for Python 3.12 on x86-64, and .gpu/ the photographs
# and packed segments; both travel beside the checkout (name them, they are ignored).
set -euo pipefail
cd "$(dirname "$0")/.."
images="$(realpath "${1:?IMAGES}")" masks="$(realpath "${2:?MASKS}")" python="${PYTHON:-python3}"

# The machine has most; those after the line break it has, too, in versions that nobody knows.
lacking="annotated-types pydantic pydantic-core typing-inspection addict ftfy platformdirs prettytable pycocotools
simplejpeg submitit termcolor wcwidth yapf
typing-extensions click timm rich psutil"
source_only="onedl-mmcv onedl-mmengine onedl-mmsegmentation"
locked() {
    for name in "$@"; do sed -nE "s/^($name==[^; ]+).*/\1/p" requirements.txt; done
}
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
done

rm -rf .whl .gpu
mkdir -p .whl .gpu/images
# shellcheck disable=SC2046,SC2086
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d .whl $(locked $lacking) torchao # for the row of float8: optional, not in the lock
# shellcheck disable=SC2046,SC2086
"$python" -m pip wheel --quiet --no-deps -w .whl $(locked $source_only)
cp -r "$images/train" .gpu/images/
"$python" -m segments pack "$masks" --out .gpu/masks.sqlite
du -sh .whl .gpu

install='python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl'
install+=' && export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 || exit; set -o pipefail; '
campaign='python3 -m perf.gpu --images .gpu/images --masks .gpu/masks.sqlite --out $OUT'
cat <<END

With .whl and .gpu beside the checkout, at most 430 s:
${install}${campaign} --minutes 6.2 2>&1 | tee \$OUT/log

Then, with the first one's gpu.json in .gpu/, so that only what is missing there is measured, at most 300 s:
${install}cp .gpu/gpu.json \$OUT/; ${campaign} --minutes 4.2 2>&1 | tee \$OUT/log
END
