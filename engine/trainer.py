"""The step that both parts train by, and looking after it without waiting for the device.

The loss of a step is a sum over all values of its effective batch (hidden or valid pixels, times
channels), divided by their number, so that neither accumulation nor the number of processes changes
it. That number is known when the last micro-batch has come: gradients of the sums are gathered
meanwhile, and the optimizer divides them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn

from common.interruption import Interruption
from common.samples import Unreadable
from engine.checkpoint import Saver
from engine.logbook import Progress
from engine.update import GuardedUpdate

PASSES_BETWEEN_LOOKS = 10  # of the host at a GPU; a CPU is looked at after every step


class MicroBatch(NamedTuple):
    """What goes through the model at once.

    inputs: of the prepared module, which gives sums of errors. num_values: that they are over.
    counts: what is summed over an epoch beside the loss. is_last: of its step.
    """

    inputs: tuple[Tensor, ...]
    num_values: float
    counts: tuple[float, ...]
    is_last: bool


class TrainingState(Protocol):
    """Where a run stands. seconds, waited_seconds: of this epoch, and of that waiting for data."""

    epochs_completed: int
    steps_completed: int
    seconds: float
    waited_seconds: float

    @property
    def unreadable_images(self) -> float:
        """Of this epoch."""

    def add(self, sums: list[float]) -> None:
        """Add the loss and the counts of some steps to those of the epoch."""


@dataclass(kw_only=True)
class TrainingRun(ABC):
    """What a training consists of, whatever it trains.

    prepared: the model, wrapped for training; its forward pass gives sums of errors.
    """

    remedy: ClassVar[str]
    """What may help when it diverges."""
    accelerator: Accelerator
    interruption: Interruption
    plan: Any  # the part's own: steps_per_epoch, effective_batch_size, ...
    prepared: nn.Module
    update: GuardedUpdate
    unreadable: Unreadable = field(default_factory=Unreadable)

    @property
    @abstractmethod
    def num_images(self) -> int:
        """Of the training set."""

    @property
    @abstractmethod
    def passes_per_step(self) -> int:
        """Micro-batches of a step, on the process that has most."""

    @property
    @abstractmethod
    def values_per_pass(self) -> int:
        """About how many values a micro-batch has: errors are divided by it for fp16's sake."""

    @abstractmethod
    def micro_batches(self, state: Any, batches: Iterator[Any]) -> Iterator[MicroBatch]:
        """Those of the step that comes next, on this process."""

    @abstractmethod
    def learning_rate(self, state: Any) -> float:
        """The rate of the step that comes next."""


class EpochTrainer:
    """Trains epochs, and remembers between them what went wrong."""

    def __init__(
        self,
        run: TrainingRun,
        progress: Progress | None = None,
        saver: Saver | None = None,
        save: Callable[[], None] = lambda: None,
    ) -> None:
        """saver: None: nothing is saved. save: what is called when it is due inside an epoch."""
        self.run = run
        self.device = run.accelerator.device
        self.progress = progress
        self.saver, self.save = saver, save
        self.on_gpu = self.device.type == "cuda"
        # Few enough that a signal does not wait longer than saving in time allows.
        self.steps_between_looks = (
            max(1, PASSES_BETWEEN_LOOKS // run.passes_per_step) if self.on_gpu else 1
        )
        self.sums: Tensor | None = None  # loss and counts since the last look
        self.wishes = torch.zeros(2, dtype=torch.float64, device=self.device)  # to stop, to save
        self.first_bad_step = torch.full((), -1, device=self.device)  # by this process's own loss
        self.reads: deque[_Read] = deque()
        self.has_stepped = False

    def train_one_epoch(self, state: TrainingState, batches: Iterator[Any]) -> bool:
        """Train to the end of the state's epoch, or until a signal. Returns True if stopped.

        batches: this process's loader, standing where the state stands. Raises RuntimeError if a
        loss is not finite or too many images are unreadable; the weights are then those before.
        """
        plan = self.run.plan
        self.run.prepared.train()
        while state.steps_completed < plan.steps_per_epoch:
            began = time.monotonic()
            with self._compiling():
                self._step(state, batches)
            state.steps_completed += 1
            at_end = state.steps_completed == plan.steps_per_epoch
            looks = at_end or state.steps_completed % self.steps_between_looks == 0
            stop, save = self._look(state, exactly=at_end) if looks else (False, False)
            seconds = time.monotonic() - began
            state.seconds += seconds
            if save and not (stop or at_end):
                self.save()
            if looks and self.saver is not None:
                self.saver.settle(wait=False)
            if self.progress is not None:
                done = state.epochs_completed + state.steps_completed / plan.steps_per_epoch
                self.progress.advance(done, plan.effective_batch_size, seconds)
            if stop:
                return True
        return False

    def _compiling(self) -> AbstractContextManager[None]:
        """Of the first step, in which the model may be compiled."""
        is_compiled = self.run.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        shielding = is_compiled and not self.has_stepped
        self.has_stepped = True
        return self.run.interruption.shielding_children() if shielding else nullcontext()

    def _step(self, state: TrainingState, batches: Iterator[Any]) -> None:
        """One optimizer step. Each micro-batch is computed while the next is still being loaded."""
        run, accelerator = self.run, self.run.accelerator
        micro_batches = run.micro_batches(state, batches)
        unit = run.update.scale / run.values_per_pass
        errors = torch.zeros((), dtype=torch.float64, device=self.device)
        counted: list[tuple[float, ...]] = []
        is_last = False
        while not is_last:
            began = time.monotonic()
            inputs, num_values, counts, is_last = next(micro_batches)
            state.waited_seconds += time.monotonic() - began
            counted.append((num_values, *counts))
            with nullcontext() if is_last else accelerator.no_sync(run.prepared):
                on_device = (tensor.to(self.device, non_blocking=True) for tensor in inputs)
                part = run.prepared(*on_device).sum()
                (part * unit).backward()
            errors += part.detach()
        of_all = [sum(column) for column in zip(*counted, strict=True)]
        is_due = accelerator.is_main_process and self.saver is not None and self.saver.is_due
        wishes = float(run.interruption.requested), float(is_due)
        own = self._on_device([*wishes, *of_all])
        total = accelerator.reduce(torch.cat([errors.reshape(1), own]), reduction="sum")
        self.wishes, num_values = total[1:3], total[3].clamp(min=1)  # no values: loss 0
        loss = total[0] / num_values
        bad_here = ~torch.isfinite(errors) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad_here, state.steps_completed)
        # DDP gives the mean of the processes' gradients.
        divisor = num_values / (run.values_per_pass * accelerator.num_processes)
        run.update.step(loss, divisor, run.learning_rate(state))
        sums = torch.cat([loss.reshape(1), total[4:]])
        self.sums = sums if self.sums is None else self.sums + sums

    def _on_device(self, values: list[float]) -> Tensor:
        """[N] float64. From page-locked memory a copy does not keep the host waiting."""
        on_host = torch.tensor(values, dtype=torch.float64, pin_memory=self.on_gpu)
        return on_host.to(self.device, non_blocking=True)

    def _look(self, state: TrainingState, *, exactly: bool) -> tuple[bool, bool]:
        """Read what has happened. Returns whether to stop, and whether to save: all agree on it.

        On a GPU it is what had happened at the look before, which need not be waited for, unless
        the state has to be exact: to be saved, or at the end of an epoch.
        """
        assert self.sums is not None
        failed = self.run.update.failed.double().reshape(1)
        self.reads.append(_Read(torch.cat([failed, self.wishes, self.sums])))
        self.sums, stop, save = None, False, False
        while self.reads and (len(self.reads) > 1 or exactly or stop or save or not self.on_gpu):
            failed_steps, told_to_stop, save_is_due, *sums = self.reads.popleft().values()
            if failed_steps:
                self._raise_not_finite(state)
            stop, save = stop or told_to_stop > 0, save or save_is_due > 0
            state.add(sums)
        self.run.unreadable.check(state.unreadable_images, self.run.num_images)
        return stop, save

    def _raise_not_finite(self, state: TrainingState) -> None:
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
            f"{self.run.remedy}"
        )


class _Read:
    """Values [N] of a device on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        self.event = None
        self.on_host = values
        if values.device.type == "cuda":
            self.on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.on_host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def values(self) -> list[float]:
        """Wait for them, if they are not there yet."""
        if self.event is not None:
            self.event.synchronize()
        found: list[float] = self.on_host.tolist()
        return found
