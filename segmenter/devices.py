"""Device, processes and precision, all by accelerate."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

logger = logging.getLogger(__name__)


def make_accelerator(
    *,
    device: Literal["auto", "cpu", "cuda"],
    precision: Literal["auto", "bf16", "fp32"],
    compile: Literal["auto", "on", "off"] = "off",
) -> Accelerator:
    """Join the process group that torchrun describes, if any, and choose the device.

    Raises ValueError if the wanted device is not there.
    """
    _refuse_unconnected_processes()
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    on_cuda = has_cuda and device != "cpu"
    if precision == "auto":
        precision = "bf16" if on_cuda and _has_bf16() else "fp32"
    compiled = compile == "on"
    if compile == "auto" and on_cuda:
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


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_mib(device: torch.device) -> int:
    """Most memory in use so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # Linux: getrusage would count the process that started this one, from before the exec.
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if peak is not None:
            return int(peak[1]) // 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
