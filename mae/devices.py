"""Devices, processes and precision, all by accelerate; and what a device can do."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from mae.config import RunConfig

logger = logging.getLogger(__name__)

# Dense bf16 peak in FLOP/s by the name that CUDA gives, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10G": 70e12,
}


def make_accelerator(run: RunConfig) -> Accelerator:
    """Join the process group that torchrun describes, if any, and choose the device.

    Raises ValueError if the wanted device or precision is not there.
    """
    _refuse_unconnected_processes()
    has_cuda = torch.cuda.is_available()
    if run.device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    on_cuda = has_cuda and run.device != "cpu"
    precision = run.precision
    if precision == "auto":
        precision = "bf16" if on_cuda and _has_bf16() else "fp32"
    compiled = run.compile == "on"
    if run.compile == "auto" and on_cuda:
        compiled = _has_c_compiler()
        if not compiled:
            logger.warning("no C compiler (gcc or clang) here: the model is not compiled")
    return Accelerator(
        cpu=not on_cuda,
        mixed_precision="bf16" if precision == "bf16" else "no",
        dynamo_backend="inductor" if compiled else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def _refuse_unconnected_processes() -> None:
    """srun alone starts processes that know nothing of each other: each would train on its own."""
    started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if started > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"srun started {started} processes, which are not connected: start one torchrun on "
            "each node instead (srun --ntasks-per-node=1 torchrun --nproc-per-node=GPUS ...), or "
            "one process (srun --ntasks=1)"
        )


def _has_c_compiler() -> bool:
    """torch.compile builds a piece of C at run time, on a GPU too."""
    return any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang"))


def _has_bf16() -> bool:
    """In hardware; torch also emulates it, slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def peak_memory_mib(device: torch.device) -> int:
    """Most memory in use so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    status = Path("/proc/self/status")
    # Linux: getrusage would count the process that started this one, from before the exec.
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    kibibytes = int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes // 2**10


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU in FLOP/s, None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
