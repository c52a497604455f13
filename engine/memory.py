"""How many images a GPU holds at once, from passes over a few of them."""

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FEW, MORE = 2, 4  # images of the passes that are measured
MARGIN = 0.1  # of the card: fragments, other shapes, and what the libraries keep for themselves


def largest_micro_batch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    example: Callable[[int], tuple[Tensor, ...]],
    *,
    share: int,
) -> int:
    """The largest divisor of a process's `share` of a step's images that the GPUs hold at once.

    model: gives training's loss; not compiled or wrapped yet: the compiler would take each size for
    a reason to start anew. example: its inputs, of so many images.
    """
    device = accelerator.device

    def peak_of(images: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        with accelerator.autocast():
            loss = model(*(tensor.to(device) for tensor in example(images))).sum()
        loss.backward()
        return torch.cuda.max_memory_allocated(device)

    base, per_image = measure(peak_of)
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    # What training has beside a pass, and this measurement had not.
    parameters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    moments = 0 if optimizer.state else 2 * parameters  # AdamW's; they come with the first step
    # DDP gathers gradients in buckets of its own, beside those of a step's first passes.
    buckets = parameters if accelerator.num_processes > 1 else 0
    total = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    # One image at least: the error that follows says what to lower.
    most = max(1, int(((1 - MARGIN) * total - moments - buckets - base) / per_image))
    # The GPU with the least decides: all processes have to make equally many passes.
    most = int(accelerator.gather(torch.tensor([most], device=device)).min())
    chosen = next(size for size in range(min(share, most), 0, -1) if share % size == 0)
    logger.info(
        "%d images at once: %.0f MiB, and %.1f for each, of the GPU's %.0f",
        chosen, (base + moments + buckets) / 2**20, per_image / 2**20, total / 2**20,
    )  # fmt: skip
    return chosen


def measure(peak_of: Callable[[int], int]) -> tuple[int, int]:
    """Bytes at the peak of a forward and backward pass: what is always there, and of each image.

    peak_of: bytes at the peak of a pass over so many images, which leaves its gradients.
    """
    peak_of(MORE)  # with gradients from here on, as all passes but the very first
    few, more = peak_of(FEW), peak_of(MORE)
    per_image = max(1, (more - few) // (MORE - FEW))
    return few - FEW * per_image, per_image
