#!/usr/bin/env bash
# Sets the environment up, then runs benchmark.py.
#
#   ./run_benchmark.sh            the whole alternation on generated sample data: minutes on a laptop CPU
#   ./run_benchmark.sh OPTIONS    hands OPTIONS to benchmark.py. The real experiment, on 8 GPUs:
#
#       ./run_benchmark.sh --config configs/imagenet.yml --in1k-dir /data/imagenet --ade20k-dir /data/ADEChallengeData2016 \
#           --output-dir runs/four_channels --mask-method four_channels --coverage-ratio 15 \
#           --pretrain-epochs 50 --eval-freq 5 --num-gpus 8
#
# Run the same command again to continue a run that was stopped. ./run_benchmark.sh --help lists the options.
# PYTHON=/path/to/python uses an existing environment, VENV_DIR=DIR makes it elsewhere than in .venv,
# TORCH_INDEX=URL takes torch and torchvision from another package index (environment.sh).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
start="$PWD"
cd "$here"
source ./environment.sh
case "$python" in */*) python="$(cd "$(dirname "$python")" && pwd)/$(basename "$python")" ;; esac
cd "$start"  # relative paths in OPTIONS are the caller's

if [ $# -gt 0 ]; then
    exec "$python" "$here/benchmark.py" "$@"
fi
echo "No options given: running on generated data, sample/ to output/; see the head of run_benchmark.sh for the real call."
cd "$here"
exec "$python" benchmark.py --config configs/sample.yml
