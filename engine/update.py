"""The optimizer's step: what goes wrong in it is found, and dealt with, on the device.

fp16 gradients below 6e-8 are 0, so the loss is multiplied by a scale before the backward pass and
the gradients are divided by it after (Micikevicius et al. 2018, arXiv:1710.03740): it is halved
when they overflow, and doubled after many steps without that.
"""

from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor
from typing_extensions import TypedDict

from common.formats import Count, parsed

FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # as torch's GradScaler has them


class LossScaling(TypedDict):
    """What a checkpoint keeps of it: the scale, steps since the last overflow, and overflows."""

    scale: PositiveFloat
    clean_steps: Count
    skipped_steps: Count


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

    def loss_scaling(self) -> LossScaling | None:
        """None without fp16."""
        if not self.scales_loss:
            return None
        return LossScaling(
            scale=self.scale.item(),
            clean_steps=int(self.clean_steps.item()),
            skipped_steps=int(self.skipped_steps.item()),
        )

    def for_log(self) -> dict[str, float]:
        """What a line of log.txt has of it."""
        kept = self.loss_scaling()
        return {"loss_scale": kept["scale"], "skipped_steps": kept["skipped_steps"]} if kept else {}

    def for_checkpoint(self) -> dict[str, LossScaling]:
        """What `continue_from` takes up."""
        kept = self.loss_scaling()
        return {"loss_scaling": kept} if kept else {}

    def continue_from(self, checkpoint: dict[str, Any], source: object) -> None:
        """Take up the scale of a checkpoint, if it has one. Raises ValueError naming the source."""
        if self.scales_loss and "loss_scaling" in checkpoint:
            found = parsed(LossScaling, checkpoint["loss_scaling"], f"{source}: loss_scaling")
            for name, value in found.items():
                getattr(self, name).fill_(value)
