"""The optimizer's step: what goes wrong in it is found, and dealt with, on the device.

fp16 gradients below 6e-8 are 0, so the loss is multiplied by a scale before the backward pass and
the gradients are divided by it after (Micikevicius et al. 2018, arXiv:1710.03740): it is halved
when they overflow, and doubled after many steps without that.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # as torch's GradScaler has them


class GuardedUpdate:
    """Optimizer steps that do nothing from the first non-finite loss on.

    An overflow in fp16 is not that: the step is skipped, and the scale halved. All decisions stay
    on the device, so that a GPU is not waited for; `failed` is read by the host every few steps.
    Loss and gradients are the same on all processes when they arrive here, so the decisions are.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip_grad: float | None, *, scales_loss: bool
    ) -> None:
        """optimizer: a fused one, which divides by `grad_scale` and heeds `found_inf`."""
        self.optimizer = optimizer
        self.clip_grad = clip_grad
        self.scales_loss = scales_loss
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.failed = torch.zeros((), device=device)  # 1 after a failure
        self.scale = torch.full((), FIRST_SCALE if scales_loss else 1.0, device=device)
        self.clean_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int32, device=device)
        for group in optimizer.param_groups:
            # torch's fused SGD would leave a buffer that it makes in a skipped step unwritten.
            for parameter in group["params"] if group.get("momentum") else ():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def step(self, loss: Tensor, divisor: Tensor, learning_rate: float) -> None:
        """Update the weights if this and all earlier losses and gradients are finite.

        loss: of the whole step. divisor: by what the gradients are too large, beside the scale.
        learning_rate: each group gets its `lr_scale` of it.
        """
        too_large = (self.scale * divisor).float()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm / too_large)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        finite_loss, finite_norm = torch.isfinite(loss), torch.isfinite(norm)
        # At a scale of 1 it is not the scale that overflows.
        overflow = finite_loss & ~finite_norm & (self.scale > 1)
        failed = ~(finite_loss & (finite_norm | overflow))
        self.failed = torch.maximum(self.failed, failed.float())
        hints: Any = self.optimizer
        hints.grad_scale, hints.found_inf = too_large, torch.maximum(self.failed, overflow.float())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scales_loss:
            self.skipped_steps += overflow
            torch._amp_update_scale_(
                self.scale, self.clean_steps, overflow.float(), 2.0, 0.5, GROWTH_INTERVAL
            )

    def loss_scaling(self) -> dict[str, float]:
        """The scale, steps since the last overflow, and overflows; nothing without fp16."""
        names = ("scale", "clean_steps", "skipped_steps") if self.scales_loss else ()
        return {name: getattr(self, name).item() for name in names}

    def continue_from(self, kept: Mapping[str, float]) -> None:
        """Take up the `loss_scaling` of a checkpoint."""
        for name, value in kept.items() if self.scales_loss else ():
            getattr(self, name).fill_(value)
