"""AdamW as MAE uses it, with an update that a non-finite loss switches off on the device."""

from __future__ import annotations

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from mae.config import OptimisationConfig

BETAS = (0.9, 0.95)


def make_optimizer(model: nn.Module, optimisation: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters; biases and norms do not decay."""
    # A decay of 1, for two groups in any case: the order of parameters is part of checkpoints, and
    # there the matrices come first.
    without_decay, with_decay = param_groups_weight_decay(model, weight_decay=1.0)
    groups = [{**with_decay, "weight_decay": optimisation.weight_decay}, without_decay]
    return torch.optim.AdamW(groups, lr=optimisation.learning_rate, betas=BETAS, fused=True)


class GuardedUpdate:
    """Optimizer steps that do nothing from the first non-finite loss on.

    The check and the decision stay on the device, so that a GPU is not waited for at every step;
    `failed` is read by the host every few steps. Loss and gradients are the same on all processes
    when they arrive here, so all of them fail at the same step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_grad: float | None) -> None:
        self.optimizer = optimizer
        self.clip_grad = clip_grad
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.failed = torch.zeros((), device=self.parameters[0].device)  # 1 after a failure

    def step(self, step_loss: Tensor, learning_rate: float) -> None:
        """Update the weights if this and all earlier losses and gradients are finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        finite = torch.isfinite(norm) & torch.isfinite(step_loss)
        self.failed = torch.maximum(self.failed, (~finite).float())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]  # the fused kernel heeds it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
