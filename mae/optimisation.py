"""AdamW as MAE uses it."""

from __future__ import annotations

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from mae.config import OptimisationConfig

BETAS = (0.9, 0.95)


def make_optimizer(model: nn.Module, optimisation: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters; biases and norms do not decay."""
    # A decay of 1, for two groups in any case: the order of parameters is part of checkpoints, and
    # there the matrices come first.
    without_decay, with_decay = param_groups_weight_decay(model, weight_decay=1.0)
    groups = [{**with_decay, "weight_decay": optimisation.weight_decay}, without_decay]
    return torch.optim.AdamW(groups, lr=optimisation.learning_rate, betas=BETAS, fused=True)
