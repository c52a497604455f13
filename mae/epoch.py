"""One epoch of training: the step, and looking after it without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from common.checkpoint import PeriodicSave
from common.interruption import Interruption
from common.logbook import Progress
from common.unreadable import Unreadable
from common.vit import IMAGE_CHANNELS
from mae.build import EPOCH_SUMS, Run, State
from mae.data import Batch
from mae.schedule import learning_rate

PASSES_BETWEEN_LOOKS = 10  # of the host at a GPU; a CPU is looked at after every step
# Sums over the images of a step, in this order.
HIDDEN, COVERAGE, COVERAGE_SQUARE, UNREADABLE, STOP = range(5)


def steps_between_looks(device: torch.device, accumulation_steps: int) -> int:
    """How many steps a signal may have to wait: few enough that saving in time is possible."""
    return 1 if device.type == "cpu" else max(1, PASSES_BETWEEN_LOOKS // accumulation_steps)


class EpochTrainer:
    """Trains epochs, and remembers between them what went wrong."""

    def __init__(
        self,
        run: Run,
        interruption: Interruption,
        progress: Progress | None,
        save_if_due: PeriodicSave,
    ) -> None:
        self.run = run
        self.device = run.accelerator.device
        self.interruption = interruption
        self.save_if_due = save_if_due
        self.progress = progress
        self.unreadable = Unreadable()
        self.steps_between_looks = steps_between_looks(self.device, run.plan.accumulation_steps)
        self.stop = torch.zeros((), device=self.device)
        self.first_bad_step = torch.full((), -1, device=self.device)  # by this process's own loss

    def train_one_epoch(self, state: State, batches: Iterator[Batch]) -> bool:
        """Train to the end of the state's epoch, or until a signal. Returns True if stopped.

        batches: this process's loader, standing where the state stands. Raises RuntimeError if a
        loss is not finite or too many images are unreadable; the weights are then those before.
        """
        plan = self.run.plan
        while state.steps_completed < plan.steps_per_epoch:
            began = time.monotonic()
            micro_batches = [next(batches) for _ in range(plan.accumulation_steps)]
            state.waited_seconds += time.monotonic() - began
            self.unreadable.note(text for batch in micro_batches for text in batch.unreadable)
            self._step(state, micro_batches)
            state.steps_completed += 1
            at_end = state.steps_completed == plan.steps_per_epoch
            looks = at_end or state.steps_completed % self.steps_between_looks == 0
            stop = looks and self._look(state)
            seconds = time.monotonic() - began
            state.seconds += seconds
            if looks:
                self.save_if_due(at_end=at_end)
            if self.progress is not None:
                done = state.epochs_completed + state.steps_completed / plan.steps_per_epoch
                self.progress.advance(done, plan.effective_batch_size, seconds)
            if stop:
                return True
        return False

    def _step(self, state: State, micro_batches: list[Batch]) -> None:
        """One optimizer step on an effective batch, of which these are this process's parts.

        The loss is the squared error over all hidden values of the effective batch, divided by
        their number; so that number has to be known before the first backward pass.
        """
        accelerator = self.run.accelerator
        counts = accelerator.reduce(self._count(micro_batches).to(self.device), reduction="sum")
        hidden_values = (counts[HIDDEN] * IMAGE_CHANNELS).clamp(min=1)  # nothing hidden: loss 0
        scale = (1 / hidden_values).float()
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with nullcontext() if last else accelerator.no_sync(self.run.prepared):
                images = batch.images.to(self.device, non_blocking=True)
                pattern = batch.pattern.to(self.device, non_blocking=True)
                part = self.run.prepared(images, pattern).sum() * scale
                accelerator.backward(part * accelerator.num_processes)  # DDP takes the mean
            loss += part.detach()
        bad_here = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad_here, state.steps_completed)
        loss = accelerator.reduce(loss.double(), reduction="sum")
        self.run.update.step(loss, self.learning_rate(state))
        state.sums += torch.stack([loss, *counts[COVERAGE : UNREADABLE + 1]])
        self.stop = counts[STOP]

    def learning_rate(self, state: State) -> float:
        """The rate of the step that comes next."""
        steps = self.run.plan.steps_per_epoch
        done = state.epochs_completed + state.steps_completed / steps
        optimisation = self.run.config.optimisation
        return learning_rate(optimisation, done / optimisation.epochs)

    def _count(self, micro_batches: list[Batch]) -> Tensor:
        """[5] float64: hidden pixels and coverage in percent of these images, and flags."""
        hidden = torch.cat([batch.hidden_pixels for batch in micro_batches]).double()
        coverage = hidden * (100 / self.run.config.model.image_size**2)
        unreadable = sum(len(batch.unreadable) for batch in micro_batches)
        return torch.tensor(
            [
                hidden.sum(),
                coverage.sum(),
                coverage.square().sum(),
                unreadable,
                self.interruption.requested,
            ],
            dtype=torch.float64,
        )

    def _look(self, state: State) -> bool:
        """Wait for the device and read the flags. Returns True if some process was told to stop."""
        unreadable = state.sums[EPOCH_SUMS.index("unreadable")]
        flags = torch.stack([self.run.update.failed.double(), self.stop.double(), unreadable])
        failed, stop, unreadable_images = flags.tolist()
        if failed:
            self._raise_not_finite(state)
        self.unreadable.check(unreadable_images, self.run.plan.num_images)
        return bool(stop)

    def _raise_not_finite(self, state: State) -> None:
        """Name epoch, step and process. All processes come here at the same step."""
        steps = self.run.accelerator.gather(self.first_bad_step.reshape(1)).tolist()
        where = [
            f"process {rank}, step {step + 1:.0f}" for rank, step in enumerate(steps) if step >= 0
        ]
        what = (
            f"the loss is not finite on {', '.join(where)}" if where else "a gradient is not finite"
        )
        raise RuntimeError(
            f"{what} of {self.run.plan.steps_per_epoch} in epoch {state.epochs_completed + 1}; "
            "the last checkpoint is from before. A lower --base-lr or --clip-grad 1 may help"
        )
