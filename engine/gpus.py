"""`python -m engine.gpus`: the GPUs here as torch sees them, in JSON for who imports no torch."""

import json
import sys
from typing import Any

import torch

from common.environment import lacks_to_compile
from engine.devices import why_no_gpu


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
    free = total = 0
    error, bf16 = "", False
    try:
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            free, total = torch.cuda.mem_get_info()
            if (torch.ones(8, device="cuda") + 1).sum().item() != 16:
                error = "1 + 1 is not 2"
    except RuntimeError as raised:  # torch.AcceleratorError among them
        error = str(raised).splitlines()[0]
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": torch.cuda.get_device_capability(index),
        "free_bytes": free,
        "total_bytes": total,
        "bf16": bf16,
        "error": error,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(examine()))
