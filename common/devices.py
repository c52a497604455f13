"""Device, processes and precision, all by accelerate; and what a device can do."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from common.run import DeviceConfig, TrainingConfig

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


def make_accelerator(config: DeviceConfig) -> Accelerator:
    """Join the process group that torchrun describes, if any, and choose the device.

    Only what trains is compiled.

    Raises ValueError if the wanted device is not there.
    """
    _refuse_unconnected_processes()
    on_cuda = choose_device(config.device).type == "cuda"
    wanted = config.compile if isinstance(config, TrainingConfig) else "off"
    compiled = wanted == "on"
    if wanted == "auto" and on_cuda:
        lacking = lacks_to_compile()
        compiled = not lacking
        if lacking:
            logger.warning("there is no %s here: the model is not compiled", lacking)
    precision = choose_precision(config.precision, on_cuda=on_cuda)
    return Accelerator(
        cpu=not on_cuda,
        mixed_precision="bf16" if precision == "bf16" else "no",
        dynamo_backend="inductor" if compiled else "no",
        # No buffer has a part in training: constants, and running means.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
        ],
    )


def choose_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """The GPU of this process if there is one and it is not unwanted. Raises ValueError."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def choose_precision(wanted: Literal["auto", "bf16", "fp32"], *, on_cuda: bool) -> str:
    """auto: bf16 where a GPU has it in hardware; torch also emulates it, slowly."""
    if wanted != "auto":
        return wanted
    has_it = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_it else "fp32"


def _refuse_unconnected_processes() -> None:
    """srun alone starts processes that know nothing of each other: each would train on its own."""
    started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if started > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"srun started {started} processes, which are not connected: start one torchrun on "
            "each node instead (srun --ntasks-per-node=1 torchrun --nproc-per-node=GPUS ...), or "
            "one process (srun --ntasks=1)"
        )


def lacks_to_compile() -> str:
    """What is missing: torch.compile and Triton build pieces of C at run time, on a GPU too."""
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang")):
        return "C compiler (gcc or clang)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"{header} (Debian: python3-dev)"


def refuse_disagreement(accelerator: Accelerator, epochs: int, steps: int) -> None:
    """Raise ValueError unless all processes go on from the same epoch and step.

    Each looks for the checkpoint by itself; a machine that does not see the folder would start
    anew, and the gradients of different epochs would be averaged.
    """
    here = torch.tensor([[epochs, steps]], device=accelerator.device)
    places = accelerator.gather(here).tolist()
    if any(place != places[0] for place in places):
        told = ", ".join(f"process {n}: epoch {e}, step {s}" for n, (e, s) in enumerate(places))
        raise ValueError(
            f"the processes would go on from different places ({told}); does every machine see the "
            "same --output-dir?"
        )


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


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
    name = device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
