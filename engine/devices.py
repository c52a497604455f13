"""Device, processes and precision, all by accelerate; and what a device can do.

`python -m engine.devices`: the GPUs here as torch sees them, in JSON for who imports no torch.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import resource
import sys
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, TorchDynamoPlugin
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from common.environment import CUDA_REMEDY, lacks_to_compile, number_of
from common.files import hold
from common.step_files import LOCK
from engine.config import DeviceConfig, OutputConfig, Precision, TrainingConfig

logger = logging.getLogger(__name__)

MORE_SHARED_MEMORY = "make /dev/shm larger (docker: --shm-size), or give a lower --workers; 0 needs none"


def make_accelerator(config: DeviceConfig) -> Accelerator:
    """Join the process group that torchrun describes, if any, and choose the device.

    Raises ValueError if the wanted device is not there.
    """
    _refuse_unconnected_processes()
    try:
        _ = config.loader_workers and multiprocessing.Lock()  # they have many
    except OSError as error:
        raise RuntimeError(
            f"loader processes have no room in memory ({error}); {MORE_SHARED_MEMORY}"
        ) from None
    on_cuda = choose_device(config.device, number_of("LOCAL_RANK", 0)).type == "cuda"
    precision = choose_precision(config.precision, on_cuda=on_cuda)
    compiled, mode, by_regions = False, None, False
    if isinstance(config, TrainingConfig):  # only what trains is compiled
        compiled, mode = config.compile == "on", config.compile_mode
        by_regions = config.compile_regions
        if config.compile == "auto" and on_cuda:
            lacking = lacks_to_compile()
            compiled = not lacking
            if lacking:
                logger.warning("there is no %s here: the model is not compiled", lacking)
        # Training multiplies fp32 matrices with 10 bits of mantissa, where a GPU does that faster.
        # Probes do not: their neighbours would be equally near.
        if precision == "fp32" and on_cuda and torch.cuda.get_device_capability() >= (8, 0):
            torch.set_float32_matmul_precision("high")
            logger.info("fp32 matrix products are computed in TF32")
    accelerator = Accelerator(
        cpu=not on_cuda,
        mixed_precision="no" if precision == "fp32" else precision,
        dynamo_plugin=TorchDynamoPlugin(
            backend="inductor" if compiled else "no", mode=mode, use_regional_compilation=by_regions
        ),
        # No buffer has a part in training: constants, and running means.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            # All others wait while the first saves, on whatever file system.
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
        ],
    )
    if precision == "fp16":
        accelerator.native_amp = True  # which it leaves out on a CPU
    prefer_attention(config.attention, accelerator)
    return accelerator


@contextlib.contextmanager
def working_in(config: OutputConfig) -> Iterator[Accelerator]:
    """Device and processes of a call, with the output directory to themselves.

    Raises ValueError if the device is not there, or another call works in the directory.
    """
    folder, accelerator = config.output_dir, make_accelerator(config)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(hold(folder / LOCK, folder))
        accelerator.wait_for_everyone()  # from here on nobody else writes there
        yield accelerator


ATTENTION = {  # in an order of preference, on Hopper
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_preferred = contextlib.ExitStack()  # torch's choice is one of the process, and so is this


def prefer_attention(wanted: str, accelerator: Accelerator) -> None:
    """Compute attention by this kernel from now on; what it cannot do (fp32, masks) by the others.

    Raises ValueError if it can do nothing here. auto: torch's order, with cuDNN's kernel first on
    Hopper, whose instructions it uses.
    """
    _preferred.close()
    if wanted == "auto":
        if accelerator.device.type == "cuda" and torch.cuda.get_device_capability() == (9, 0):
            _preferred.enter_context(sdpa_kernel([*ATTENTION.values()], set_priority=True))
        return
    query = torch.zeros(1, 1, 8, 64, device=accelerator.device)
    try:
        with sdpa_kernel(ATTENTION[wanted]), accelerator.autocast():
            scaled_dot_product_attention(query, query, query)
    except RuntimeError:
        raise ValueError(
            f"--attention {wanted}: torch has no such kernel for {device_name(accelerator.device)} "
            f"in {accelerator.mixed_precision.replace('no', 'fp32')}; leave it out"
        ) from None
    # Plain math can do everything: after it there is no other.
    others = [kernel for name, kernel in ATTENTION.items() if wanted not in (name, "math")]
    _preferred.enter_context(sdpa_kernel([ATTENTION[wanted], *others], set_priority=True))


def choose_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """The GPU of this process if there is one and it is not unwanted.

    Raises ValueError if a wanted one is not there, or torch has no kernels for it.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: {why_no_gpu()}; use --device cpu, or see ./run_benchmark.sh doctor")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        # One kernel tells. On the GPU of this process: a context takes memory on the card.
        (torch.ones(1, device=device) + 1).item()
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        raise ValueError(
            f"torch {torch.__version__} has no kernels for {device_name(device)}: use --device cpu "
            f"or {CUDA_REMEDY}"
        ) from None
    return device


def why_no_gpu() -> str:
    """Why torch can use no GPU here, with both CUDA versions where the driver is too old."""
    said = "there is none"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, too old, no GPU; built without
        said = str(error).partition(". ")[0]
    found = re.search(r"found version (\d+)(\d\d)\d\b", said)  # 12020 is 12.2
    if found:
        said = f"the NVIDIA driver is too old, it has CUDA {found[1]}.{int(found[2])}"
    return f"torch {torch.__version__}, for CUDA {torch.version.cuda}, has no GPU: {said}"


def choose_precision(wanted: Precision, *, on_cuda: bool) -> Literal["bf16", "fp16", "fp32"]:
    """Autocast's. auto: bf16 where a GPU has it in hardware (torch also emulates it, slowly), else fp16."""
    if wanted == "bf16-residual" or wanted == "float8":  # see `engine.layers.lower_precision`
        return "bf16"
    if wanted != "auto":
        return wanted
    if not on_cuda:
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _refuse_unconnected_processes() -> None:
    """srun alone starts processes that know nothing of each other: each would train on its own."""
    started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if started > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"srun started {started} processes, which are not connected: start one torchrun on "
            "each node instead (srun --ntasks-per-node=1 torchrun --nproc-per-node=GPUS ...), or "
            "one process (srun --ntasks=1)"
        )


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
    # getrusage would count the process that started this one, too, from before the exec.
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    kibibytes = int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes // 2**10


class LateReads:
    """Values [N] of a device on their way to the host, first in, first out.

    A host that asks a GPU for a number waits until everything before it is computed, and the GPU
    then waits for the host's next order. So what is pushed is copied in the background, and read
    when the next comes: by then it has long arrived. A CPU's is read at once.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def push(self, values: Tensor) -> None:
        """Begin to copy."""
        on_host = values.to("cpu", non_blocking=True)  # into page-locked memory
        arrived = torch.cuda.current_stream().record_event() if self.on_gpu else None
        self.waiting.append((on_host, arrived))

    def pop(self, *, everything: bool) -> list[list[float]]:
        """What was pushed, but for the newest, unless everything is wanted."""
        left, read = int(self.on_gpu and not everything), []
        while len(self.waiting) > left:
            values, arrived = self.waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            read.append(values.tolist())
        return read


def examine() -> dict[str, Any]:
    """The build of torch, why it sees no GPU, and each GPU that it sees, tried with one kernel."""
    is_there = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "archs": torch.cuda.get_arch_list(),
        "error": "" if is_there else why_no_gpu(),
        "lacks_to_compile": lacks_to_compile(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if is_there else [],
    }


def _gpu(index: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": torch.cuda.get_device_name(index),
        "capability": torch.cuda.get_device_capability(index),
        "free_bytes": 0, "total_bytes": 0, "bf16": False, "error": "",
    }  # fmt: skip
    try:
        with torch.cuda.device(index):
            told["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
            told["free_bytes"], told["total_bytes"] = torch.cuda.mem_get_info()
            if (torch.ones(8, device="cuda") + 1).sum().item() != 16:
                told["error"] = "1 + 1 is not 2"
    except RuntimeError as error:  # torch.AcceleratorError among them
        told["error"] = str(error).splitlines()[0]
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(examine()))
