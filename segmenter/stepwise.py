"""Linear probes that are trained by steps on random crops, as DINOv2 and DINOv3 publish theirs.

    decoder = fit_by_steps(model, crops, PROBES["dinov2_linear"], accelerator)

Shapes: B crops, N tokens, D features, K classes.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.interruption import Interruption
from engine.schedule import BatchPlan, half_cosine, learning_rate
from segmenter.config import ScoringConfig
from segmenter.data import TrainingCrops, collate, start_worker
from segmenter.model import Segmenter, segmentation_loss

INIT_STD = 0.01  # of mmsegmentation's conv_seg


@dataclass(frozen=True, kw_only=True)
class StepRecipe:
    """How such a probe is trained: AdamW, betas 0.9 and 0.999."""

    lr: float
    weight_decay: float
    falls: Literal["poly", "cosine"]  # to 0, after a linear warm-up
    dropout: float = 0.0  # of whole features, before the linear layer
    clip_grad: float | None = None
    steps: int = 40_000
    warmup: int = 1500
    batch_size: int = 16  # 8 GPUs of 2 images


PROBES = {
    # dinov2_vitb14_ade20k_linear_config.py: optimizer AdamW (lr 0.001, weight_decay 0.0001), lr_config poly
    # (power 1, warmup_iters 1500), max_iters 40000; BNHead with dropout_ratio 0, grad_clip None.
    "dinov2_linear": StepRecipe(lr=1e-3, weight_decay=1e-4, falls="poly"),
    # dinov3/eval/segmentation/config.py: dropout 0.1, gradient_clip 35, WarmupOneCycleLR of 40,000
    # iterations; config-ade20k-linear-training.yaml: lr 3e-4, weight_decay 1e-3, 1500 of warm-up.
    "dinov3_linear": StepRecipe(lr=3e-4, weight_decay=1e-3, falls="cosine", dropout=0.1, clip_grad=35.0),
}


class NormedLinear(nn.Module):
    """mmsegmentation's BNHead of DINOv2: batch norm, dropout of features, a linear layer; in fp32."""

    def __init__(self, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(width), nn.Dropout1d(dropout)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to class logits [B, N, K]."""
        with torch.autocast(tokens.device.type, enabled=False):
            features = self.dropout(self.norm(tokens.float().transpose(1, 2)))  # [B, D, N]
            return self.head(features.transpose(1, 2))


def rate_at(recipe: StepRecipe, step: int, steps: int) -> float:
    """The learning rate of a step, from 0, of so many."""
    progress, warmup = step / steps, recipe.warmup / recipe.steps  # the same share of a shorter training
    if recipe.falls == "poly":  # mmcv's falls from the start on, and warming up is a factor to it
        return recipe.lr * (1 - progress) * min(1.0, progress / warmup)
    return learning_rate(progress, peak=recipe.lr, least=0.0, warmup_fraction=warmup, fall=half_cosine)


def fit_by_steps(
    model: Segmenter, crops: TrainingCrops, recipe: StepRecipe, accelerator: Accelerator,
    scoring: ScoringConfig, *, steps: int, on_progress: Callable[[int, int], None] | None = None,
    interruption: Interruption | None = None,
) -> NormedLinear | None:  # fmt: skip
    """Train such a decoder of the frozen model on crops; None if interrupted.

    Every process trains the same one, on all of the batch: what several find is what one finds.
    """
    device, seed = accelerator.device, crops.seed
    torch.manual_seed(seed)  # weights and dropout
    decoder = NormedLinear(model.encoder.embed_dim, model.shape.num_classes, recipe.dropout).to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    batch = min(recipe.batch_size, len(crops))
    plan = BatchPlan(
        num_images=len(crops), effective_batch_size=batch, processes=1, micro_batch_size=batch, seed=seed
    )
    epochs = math.ceil(steps / plan.steps_per_epoch)
    batches = itertools.islice(plan.micro_batches(0, (0, 0), epochs), steps)
    loader = DataLoader(
        crops, batch_sampler=list(batches), num_workers=scoring.loader_workers, collate_fn=collate,
        pin_memory=device.type == "cuda", worker_init_fn=start_worker,
    )  # fmt: skip
    model.decoder, ignored = nn.Identity(), crops.description.ignored
    model.eval()
    for step, micro in enumerate(loader):
        images, labels, _ = (tensor.to(device, non_blocking=True) for tensor in micro.inputs)
        with torch.no_grad(), accelerator.autocast():
            maps = model.patch_logits(model.normalise(images))  # of a model without a decoder: tokens
        logits = decoder(maps.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, maps.shape[2:])
        full = model.upsample(logits, *images.shape[-2:])
        loss = segmentation_loss(full, labels, ignored) / max(1, micro.num_values)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(decoder.parameters(), recipe.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, step, steps)
        optimizer.step()
        if on_progress is not None:
            on_progress(step + 1, steps)
        if interruption is not None and interruption.requested:
            return None
    return decoder.eval()
