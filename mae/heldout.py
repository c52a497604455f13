"""Held-out loss: the images of val/, always cropped and hidden in the same way."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import Subset

from mae.config import IMAGE_CHANNELS
from mae.data import FixedImages, make_fixed_loader
from mae.model import MaskedAutoencoder

FEW_IMAGES = 64  # not worth starting loader processes for


@torch.no_grad()
def heldout_loss(
    accelerator: Accelerator,
    model: MaskedAutoencoder,
    images: FixedImages,
    *,
    batch_size: int,
    workers: int,
) -> float:
    """Mean squared error over all hidden pixels and channels of all images, on all processes."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = Subset(images, range(rank, len(images), processes))
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    if len(share):
        few = len(share) <= FEW_IMAGES
        for batch in make_fixed_loader(share, batch_size=batch_size, workers=0 if few else workers):
            with accelerator.autocast():
                errors = model(batch.images.to(sums.device), batch.pattern.to(sums.device))
            sums[0] += errors.double().sum()
            sums[1] += batch.hidden_pixels.sum() * IMAGE_CHANNELS
    model.train()
    total = accelerator.reduce(sums, reduction="sum")
    return float(total[0] / total[1].clamp(min=1))
