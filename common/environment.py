"""What a process runs in: its place among others, versions, and what NVIDIA says of its GPUs."""

import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What the launcher of a plan tells a step.
PROCESSES_HERE = "SEGMAE_PROCESSES_HERE"  # how many processes steps beside each other have
PROGRESS_FILE = "SEGMAE_PROGRESS"  # where a step of a plan tells how far it is

# Dense TFLOP/s by the name that CUDA gives, less the brand: fp16, bf16 (None: not in hardware), and
# fp32 (TF32 from Ampere on). Tensor cores with fp32 sums, as training has them, halved where a data
# sheet counts sparsity. Looked up: A10, A40, A100, H100, H200, H800, L4, L40S, V100, B200; the rest
# is from memory. A slice of a card (MIG) has another name and stands here not.
_PEAK_TFLOPS: dict[str, tuple[float, float | None, float]] = {
    r"B200": (2250, 2250, 1125),
    r"H200|H100 \d+GB HBM\w+|H800": (989, 989, 495),
    r"H[12]00 NVL": (835, 835, 418),
    r"H[18]00 PCIe": (756, 756, 378),
    r"H20": (148, 148, 74),
    r"A[18]00(-SXM4|-PCIE)?[ -]\d+GB( PCIe)?": (312, 312, 156),
    r"A40": (149.7, 149.7, 74.8),
    r"A10": (125, 125, 62.5),
    r"A10G": (70, 70, 35),
    r"RTX A6000": (154.8, 154.8, 77.4),
    r"L40S": (362, 362, 183),
    r"L40": (181, 181, 90.5),
    r"L4": (121, 121, 60),
    r"RTX 3090": (71, 71, 35.6),
    r"RTX 4090": (165.2, 165.2, 82.6),
    r"RTX 5090": (209.5, 209.5, 104.8),
    r"V100-(SXM[23]|DGXS)-\d+GB": (125, None, 15.7),
    r"V100-PCIE-\d+GB": (112, None, 14),
    r"V100S-PCIE-32GB": (130, None, 16.4),
    r"T4": (65, None, 8.1),
}

# By CUDA's major version; within one, older drivers will do (NVIDIA, CUDA Compatibility, table 1).
_LEAST_DRIVER = {12: 525, 13: 580}
CUDA_REMEDY = (
    "TORCH_INDEX=URL ./run_benchmark.sh ... with the URL of PyTorch's wheels for CUDA 12.6 (for "
    "V100 and older cards, or drivers from 525 to 579), or else update the driver"
)


def rank() -> int:
    """This process among those of torchrun or Slurm, known before torch is imported."""
    return number_of("RANK", number_of("SLURM_PROCID", 0))


def world_size() -> int:
    """The number of processes that torchrun started, or will, as benchmark.py says."""
    return max(1, number_of("WORLD_SIZE", 1))


def number_of(variable: str, default: int) -> int:
    """What an environment variable says, where it is a number from 0."""
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdecimal() else default


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of packages: what numbers were made with."""
    found = {"python": platform.python_version()}
    for package in packages:
        found[package] = "not installed"
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def lacks_to_compile() -> str:
    """What is missing; empty: nothing."""
    # torch.compile and Triton build pieces of C at run time, on a GPU, too.
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang")):
        return "C compiler (gcc or clang)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"{header} (Debian: python3-dev)"


def peak_flops(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s for "fp16", "bf16" or else fp32 of a card by the name CUDA gives it."""
    card = re.sub(r"^((NVIDIA|Tesla|GeForce) )*", "", name)
    rows = (peaks for pattern, peaks in _PEAK_TFLOPS.items() if re.fullmatch(pattern, card))
    peak = next(rows, (None, None, None))[{"fp16": 0, "bf16": 1}.get(precision, 2)]
    return None if peak is None else peak * 1e12


def least_driver(cuda: str) -> int:
    """The oldest driver branch that such a CUDA version works with; 0 where it is not known."""
    return _LEAST_DRIVER.get(int(cuda.partition(".")[0]), 0)
