"""Device, processes and precision, all by accelerate."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs


def make_accelerator(
    *,
    device: Literal["auto", "cpu", "cuda"],
    precision: Literal["auto", "bf16", "fp32"],
    compile: Literal["auto", "on", "off"] = "off",
) -> Accelerator:
    """Join the process group that torchrun or Slurm describe, if any, and choose the device.

    Raises ValueError if the wanted device is not there.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    on_cuda = has_cuda and device != "cpu"
    if precision == "auto":
        precision = "bf16" if on_cuda and torch.cuda.is_bf16_supported() else "fp32"
    compiled = on_cuda if compile == "auto" else compile == "on"
    return Accelerator(
        cpu=not on_cuda,
        mixed_precision="bf16" if precision == "bf16" else "no",
        dynamo_backend="inductor" if compiled else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


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
