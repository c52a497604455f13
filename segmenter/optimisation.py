"""The optimizer: SGD or AdamW, without decay of what is no matrix, slower for earlier blocks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from segmenter.config import OptimisationConfig
from segmenter.model import Segmenter

ADAM_BETA2 = 0.999
# Embeddings: matrices by shape only.
NOT_DECAYED = ("cls_token", "pos_embed", "reg_token", "cls_emb")


def make_optimizer(model: Segmenter, optimisation: OptimisationConfig) -> Optimizer:
    """Groups carry `lr_scale`, by which the schedule's rate is multiplied."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        scale = rate_scale(name, len(model.encoder.blocks), optimisation.layer_decay)
        no_decay = parameter.ndim < 2 or name.split(".")[-1] in NOT_DECAYED
        groups[scale, 0.0 if no_decay else optimisation.weight_decay].append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
    if optimisation.optimizer == "sgd":
        return SGD(described, lr=optimisation.lr, momentum=optimisation.momentum, fused=True)
    betas = (optimisation.momentum, ADAM_BETA2)
    return AdamW(described, lr=optimisation.lr, betas=betas, fused=True)


def rate_scale(name: str, blocks: int, layer_decay: float) -> float:
    """Layer-wise rate decay (Clark et al. 2020, arXiv:2003.10555; as BEiT and MAE finetune).

    The decoder has 1, the encoder's last block layer_decay, its embeddings the least.
    """
    if not name.startswith("encoder."):
        return 1.0
    parts = name.split(".")
    if parts[1] == "blocks":
        depth = int(parts[2]) + 1
    elif parts[1] in ("norm", "fc_norm"):
        depth = blocks + 1
    else:
        depth = 0
    return layer_decay ** (blocks + 1 - depth)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def clip_gradients(model: nn.Module, most: float | None) -> None:
    """Scale the gradients down to a norm of at most `most`; None: leave them."""
    if most is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), most)
