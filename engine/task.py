"""What the trainer works with: a part's `Task`, and the `Run` and `State` of a call."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from common.formats import Count, Positive, parsed_plain
from common.images import Unreadable
from common.interruption import Interruption, leave_signals_to_the_main_process
from engine.checkpoint import Saver
from engine.config import TrainingConfig, batches_ahead
from engine.devices import MORE_SHARED_MEMORY, peak_memory_mib
from engine.logbook import Logbook
from engine.schedule import BatchPlan
from engine.update import GuardedUpdate

logger = logging.getLogger(__name__)

OPEN_FILES = 65536


class MicroBatch(NamedTuple):
    """What goes through the model at once.

    inputs: of the loss module, which gives sums of errors. num_values: that they are over.
    unreadable: images that others stand in for, and why. counts: what is summed over an epoch
    beside the loss, as the task's `counts` name it.
    """

    inputs: Sequence[Tensor]
    num_values: float
    unreadable: Sequence[str]
    counts: Sequence[float] = ()


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


class Task(Protocol):
    """What is trained, and on what: all that the two trainings do not have in common."""

    remedy: ClassVar[str]  # what may help when it diverges
    counts: ClassVar[tuple[str, ...]]  # what is summed over an epoch beside the loss
    run: TrainingConfig
    settings: dict[str, Any]  # plain values of all that decides the result
    seed: int
    clip_grad: float | None
    rate_at: Callable[[float], float]  # learning rate by the share of the whole run, 0 to 1
    epochs: int  # completed when this call ends
    total_epochs: int  # at whose end the schedule ends
    values_per_image: int  # about: errors are divided by it for fp16's sake
    auto_batch: bool  # whether the micro-batch is to be as large as a GPU's memory lets it
    train_set: Dataset[Any]  # by (epoch, index)
    collate: Callable[[list[Any]], MicroBatch]
    start_worker: Callable[[int], None]  # what a loader process begins with
    evaluations: int  # over the whole run
    num_heldout: int  # images that an evaluation looks at

    # What this call goes on from. Raises ValueError if it may not.
    def find_earlier(self) -> Earlier: ...

    # Model, loss and optimizer, torch being seeded. The trainer loads a checkpoint's weights.
    def build(self, accelerator: Accelerator, checkpoint: dict[str, Any]) -> Built: ...

    # How a batch is split. Raises ValueError if it cannot be.
    def plan(self, processes: int) -> BatchPlan: ...

    # Inputs of the loss module, of any images, to measure memory by.
    def example(self, images: int) -> tuple[Tensor, ...]: ...

    # What is trained on what, in a line.
    def describe(self) -> str: ...

    # Scores of the held-out images, if it is time to; None if told to stop. Before a long one the
    # trainer's `save` may be called, so that a kill in it costs no training.
    def evaluate(self, run: Run, state: State) -> Evaluation | None: ...

    # The same of so many of them, evenly spread, to see how long it takes.
    def evaluate_some(self, run: Run, images: int) -> None: ...

    # The line of log.txt about the epoch that just ended, but for its number.
    def record(self, run: Run, state: State, scores: dict[str, float]) -> dict[str, Any]: ...

    # What a checkpoint holds beside what all have in common.
    def extra_state(self, run: Run) -> dict[str, Any]: ...

    # The names that the checkpoint after an epoch gets; the last is the rolling one.
    def checkpoint_names(self, epochs_completed: int, *, is_best: bool) -> Sequence[str]: ...

    # What is left when all epochs are trained; only the first process calls it.
    def after_round(self, run: Run, state: State) -> None: ...


@dataclass(kw_only=True)
class State:
    """Where a run stands.

    sums: by name, over the steps and processes of this epoch: "loss", the task's counts, and
    "unreadable_images". seconds, waited_seconds: of this epoch's training, and of that waiting for
    data. total_seconds: of the epochs before and of all evaluations, over all restarts.
    scores: of the newest evaluation, plain; best_score: of all.
    """

    sums: dict[str, Positive]
    epochs_completed: Count = 0
    steps_completed: Count = 0
    seconds: Positive = 0.0
    waited_seconds: Positive = 0.0
    total_seconds: Positive = 0.0
    scores: dict[str, Any] | None = None
    best_score: Positive | None = None

    @classmethod
    def of(cls, task: Task, checkpoint: Mapping[str, Any], path: Path | None) -> State:
        """Where the checkpoint at `path` stands; at the beginning if it is empty.

        Raises ValueError.
        """
        names = ("loss", *task.counts, "unreadable_images")
        place = {name: checkpoint.get(name, 0) for name in ("epochs_completed", "steps_completed")}
        stored = {"sums": dict.fromkeys(names, 0.0), **checkpoint.get("state", {}), **place}
        if "loss_sum" in stored:  # of the version in which finetuning kept a state of its own
            values = [float(stored.get(name, 0)) for name in ("loss_sum", "unreadable_images")]
            stored["sums"] = dict(zip(names, values, strict=True))
            stored["best_score"] = stored.get("best_mean_iou")
        state: State = parsed_plain(cls, stored, f"{path}: state")
        if tuple(state.sums) != names:
            raise ValueError(f"{path}: state: sums are of {', '.join(state.sums)}, not {', '.join(names)}")
        return state

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
    for training. logbook: of the first process. Neither it nor a saver: nothing is written.
    """

    task: Any  # a `Task`; each part knows which
    accelerator: Accelerator
    interruption: Interruption
    plan: BatchPlan
    model: Any
    prepared: nn.Module
    update: GuardedUpdate
    unreadable: Unreadable = field(default_factory=Unreadable)
    logbook: Logbook | None = None
    saver: Saver | None = None

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
        logger.info("%s", self.task.describe())
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
        images = self.plan.steps_in(state.epochs_completed) * self.plan.effective_batch_size
        speed = {
            "images_per_second": images / state.seconds,
            "data_wait_share": state.waited_seconds / state.seconds,
            "epoch_seconds": state.seconds,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
        }
        if kept := self.update.loss_scaling():
            speed |= {"loss_scale": kept["scale"], "skipped_steps": kept["skipped_steps"]}
        return speed


def load(run: Run, start: tuple[int, int], epochs: int) -> Iterator[MicroBatch]:
    """This process's micro-batches of training, from (epoch, step) on.

    One loader for all epochs: workers read on across their ends.
    """
    _allow_many_files()
    task, workers = run.task, run.task.run.loader_workers
    batch_bytes = run.plan.micro_batch_size * sum(tensor.nbytes for tensor in task.example(1))
    keys: Any = run.plan.micro_batches(run.accelerator.process_index, start, epochs)
    loader = DataLoader(
        task.train_set,
        batch_sampler=keys,  # is gone through once
        num_workers=workers,
        collate_fn=task.collate,
        pin_memory=run.accelerator.device.type == "cuda",
        worker_init_fn=task.start_worker,
        prefetch_factor=batches_ahead(workers, batch_bytes) if workers else None,
    )
    return iter(loader)


def start_loader_process(worker: int) -> None:
    """What a loader's process does first: see below, and it ends with its parent only."""
    # Python prints what kept a batch from being handed over, forgets it, and the parent would wait
    # for ever (https://github.com/pytorch/pytorch/issues/1355).
    Queue._on_queue_feeder_error = _hand_over_the_reason  # type: ignore[attr-defined]
    leave_signals_to_the_main_process(worker)


def _hand_over_the_reason(queue: Queue[Any], error: Exception, item: tuple[Any, ...]) -> None:
    try:
        raise RuntimeError(f"a loader process cannot hand over a batch ({error}); {MORE_SHARED_MEMORY}")
    except RuntimeError:
        queue.put((item[0], ExceptionWrapper(where="in a loader process")))


def _allow_many_files() -> None:
    """Raise the number of files this process may have open, as far as the machine lets it.

    Every tensor that comes from a loader process is one until it is used, and a step of hundreds of
    small batches holds them all.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
