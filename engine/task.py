"""What the trainer works with: a part's `Task`, and the `Run` and `State` of a call."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.interruption import Interruption, leave_signals_to_the_main_process
from common.samples import Unreadable
from engine.config import TrainingConfig
from engine.devices import peak_memory_mib
from engine.logbook import Progress
from engine.schedule import BatchPlan
from engine.update import GuardedUpdate

logger = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """What goes through the model at once.

    inputs: of the loss module, which gives sums of errors. num_values: that they are over.
    counts: what is summed over an epoch beside the loss, as the task's `counts` name it.
    unreadable: images that others stand in for, and why.
    """

    inputs: tuple[Tensor, ...]
    num_values: float
    counts: tuple[float, ...]
    unreadable: Sequence[str]


class Built(NamedTuple):
    """model: plain, for saving and evaluating. loss: shares its weights, gives sums of errors.

    optimizer: a fused one, see `GuardedUpdate`.
    """

    model: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What an earlier call left: the file to go on from, and its content if it is a checkpoint.

    is_complete: nothing is left to do.
    """

    path: Path | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)
    is_complete: bool = False

    @property
    def position(self) -> tuple[int, int]:
        """Epochs and steps from which a process would go on; -1: from the end."""
        steps = self.checkpoint.get("steps_completed", 0)
        return -1 if self.is_complete else self.checkpoint.get("epochs_completed", 0), steps


class Evaluation(NamedTuple):
    """scores: what log.txt gets of it. is_best: whether none was better so far."""

    scores: dict[str, float]
    is_best: bool = False


class Task(ABC):
    """What is trained, and on what: all that the two trainings do not have in common."""

    run: TrainingConfig
    seed: int
    clip_grad: float | None
    epochs: int  # completed when this call ends
    total_epochs: int  # at whose end the schedule ends
    settings: dict[str, Any]  # plain values of all that decides the result
    values_per_image: int  # about: errors are divided by it for fp16's sake
    auto_batch: bool  # whether the micro-batch is to be as large as a GPU's memory lets it
    evaluations: int  # over the whole run
    num_heldout: int  # images that an evaluation looks at
    remedy: ClassVar[str]  # what may help when it diverges
    counts: ClassVar[tuple[str, ...]] = ()  # what is summed over an epoch beside the loss
    saves_before_evaluating: ClassVar[bool] = False  # worth it where that takes long

    @abstractmethod
    def find_earlier(self) -> Earlier:
        """What this call goes on from. Raises ValueError if it may not."""

    @abstractmethod
    def build(self, accelerator: Accelerator, checkpoint: dict[str, Any]) -> Built:
        """Model, loss and optimizer; torch is seeded. The trainer loads a checkpoint's weights."""

    @abstractmethod
    def plan(self, processes: int) -> BatchPlan:
        """How a batch is split. Raises ValueError if it cannot be."""

    @abstractmethod
    def batches(self, run: Run, start: tuple[int, int], epochs: int) -> Iterator[Any]:
        """This process's micro-batches, as the loader makes them, from (epoch, step) on."""

    @abstractmethod
    def micro_batch(self, batch: Any) -> MicroBatch:
        """The same as the trainer needs it."""

    @abstractmethod
    def example(self, images: int) -> tuple[Tensor, ...]:
        """Inputs of the loss module, of any images, to measure memory by."""

    @abstractmethod
    def learning_rate(self, progress: float) -> float:
        """At a share of the whole run, 0 to 1."""

    @abstractmethod
    def describe(self, run: Run) -> str:
        """What is trained on what, in a line."""

    def is_evaluated(self, epoch: int) -> bool:
        """Whether the model is evaluated after so many epochs."""
        return True

    @abstractmethod
    def evaluate(self, run: Run, state: State, progress: Progress | None) -> Evaluation | None:
        """Score the model on the held-out images; None if told to stop."""

    @abstractmethod
    def evaluate_some(self, run: Run, images: int) -> None:
        """The same of so many of them, evenly spread, to see how long it takes."""

    @abstractmethod
    def record(self, run: Run, state: State, scores: dict[str, float]) -> dict[str, Any]:
        """The line of log.txt about the epoch that just ended, but for its number."""

    @abstractmethod
    def extra_state(self, run: Run, state: State) -> dict[str, Any]:
        """What a checkpoint holds beside what all have in common."""

    @abstractmethod
    def take_up(self, state: State, checkpoint: dict[str, Any]) -> None:
        """Fill the state from it."""

    @abstractmethod
    def checkpoint_names(self, epochs_completed: int, *, is_best: bool) -> Sequence[str]:
        """The names that the checkpoint after an epoch gets; the last is the rolling one."""

    @abstractmethod
    def after_round(self, run: Run, state: State) -> None:
        """What is left when all epochs are trained; only the first process calls it."""


@dataclass(kw_only=True)
class State:
    """Where a run stands.

    sums: by name, over the steps and processes of this epoch: "loss", the task's counts, and
    "unreadable_images". seconds, waited_seconds: of this epoch's training, and of that waiting for
    data. total_seconds: of the epochs before and of all evaluations, over all restarts.
    scores: of the newest evaluation, plain; best_score: of all.
    """

    sums: dict[str, float]
    epochs_completed: int = 0
    steps_completed: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    total_seconds: float = 0.0
    scores: dict[str, Any] | None = None
    best_score: float | None = None

    @classmethod
    def fresh(cls, task: Task) -> State:
        """At the beginning."""
        return cls(sums=dict.fromkeys(("loss", *task.counts, "unreadable_images"), 0.0))

    def add(self, sums: Sequence[float]) -> None:
        """Those of some steps, in the order of the names."""
        for name, value in zip(self.sums, sums, strict=True):
            self.sums[name] += value

    def begin_epoch(self, epochs_completed: int) -> None:
        """Forget what was of the epoch before."""
        self.epochs_completed, self.steps_completed = epochs_completed, 0
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.seconds = self.waited_seconds = 0.0


@dataclass(kw_only=True)
class Run:
    """What stays the same during a call.

    model and prepared share their weights: plain for saving and evaluating, wrapped (and compiled)
    for training.
    """

    task: Any  # a `Task`; each part knows which
    accelerator: Accelerator
    interruption: Interruption
    plan: BatchPlan
    model: Any
    prepared: nn.Module
    update: GuardedUpdate
    unreadable: Unreadable = field(default_factory=Unreadable)

    @property
    def values_per_pass(self) -> int:
        """About how many values a forward pass has."""
        return self.plan.micro_batch_size * int(self.task.values_per_image)

    def epochs_done(self, state: State) -> float:
        """With the share of the one that is under way."""
        return state.epochs_completed + state.steps_completed / self.plan.steps_per_epoch

    def describe(self, state: State) -> None:
        """Tell what is about to happen."""
        plan, accelerator, config = self.plan, self.accelerator, self.task.run
        logger.info("%s", self.task.describe(self))
        logger.info(
            "effective batch %d = %d process(es) x %d step(s) x %d images, %d steps per epoch",
            plan.effective_batch_size, plan.processes, plan.accumulation_steps,
            plan.micro_batch_size, plan.steps_per_epoch,
        )  # fmt: skip
        logger.info(
            "%s, precision %s, %d loader workers per process; epochs %d to %d, from step %d",
            accelerator.device, accelerator.mixed_precision.replace("no", "fp32"),
            config.loader_workers, state.epochs_completed + 1, self.task.epochs,
            state.steps_completed,
        )  # fmt: skip

    def speed(self, state: State) -> dict[str, float]:
        """What a line of log.txt says of time and memory; it may differ between equal runs."""
        return {
            "images_per_second": self.plan.images_per_epoch / state.seconds,
            "data_wait_share": state.waited_seconds / state.seconds,
            "epoch_seconds": state.seconds,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
            **self.update.for_log(),
        }


def load(
    run: Run,
    dataset: Dataset[Any],
    start: tuple[int, int],
    epochs: int,
    *,
    collate: Callable[[list[Any]], Any],
    start_worker: Callable[[int], None] = leave_signals_to_the_main_process,
) -> Iterator[Any]:
    """This process's micro-batches of a dataset by (epoch, index), from (epoch, step) on.

    One loader for all epochs: workers read on across their ends.
    """
    workers = run.task.run.loader_workers
    keys: Any = run.plan.micro_batches(run.accelerator.process_index, start, epochs)
    loader = DataLoader(
        dataset,
        batch_sampler=keys,  # is gone through once
        num_workers=workers,
        collate_fn=collate,
        pin_memory=run.accelerator.device.type == "cuda",
        worker_init_fn=start_worker,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)
