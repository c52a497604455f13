"""How anything here trains: build, maybe resume, then per epoch train, evaluate, log, save.

A part gives a `Task`, in the file to read next: mae/pretrain.py or segmenter/finetune.py.

    train(task)                           # all of it; False: a signal stopped it, after saving
    run, state = build(task, ...)         # ready to train, nothing written
    EpochTrainer(run).train_one_epoch(state, task.batches(run, (0, 0), epochs=1))

The loss of a step is a sum over all values of its effective batch (hidden or valid pixels, times
channels), divided by their number, so that neither accumulation nor the number of processes changes
it. That number is known when the last micro-batch has come: gradients of the sums are gathered
meanwhile, and the optimizer divides them.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.interruption import Interruption, leave_signals_to_the_main_process
from common.lock import hold
from common.samples import Unreadable
from common.step_files import LOCK
from engine.checkpoint import Saver, load_optimizer, load_weights, not_finite
from engine.config import OutputConfig, TrainingConfig
from engine.devices import make_accelerator, peak_memory_mib, refuse_disagreement
from engine.late_reads import LateReads
from engine.layers import recompute_activations
from engine.logbook import Logbook, Progress, send_to_trackers
from engine.memory import largest_micro_batch
from engine.schedule import STEP, BatchPlan, derived_seeds
from engine.update import GuardedUpdate

logger = logging.getLogger(__name__)

PASSES_BETWEEN_LOOKS = 10  # of the host at a GPU; a CPU is looked at after every step


# What a part gives


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


# What stays the same during a call, and what does not


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

    def speed(self, state: State) -> dict[str, float]:
        """What a line of log.txt says of time and memory; it may differ between equal runs."""
        return {
            "images_per_second": self.plan.images_per_epoch / state.seconds,
            "data_wait_share": state.waited_seconds / state.seconds,
            "epoch_seconds": state.seconds,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
            **self.update.for_log(),
        }


# A call


def train(task: Task) -> bool:
    """Run a training, or what is left of it.

    Returns True when nothing is left, False if a signal stopped it, after saving. Raises ValueError
    for what the user can fix, and RuntimeError when the run fails (a loss that is not finite, too
    many unreadable images).
    """
    with working_in(task.run) as (accelerator, interruption):
        # Only now: whoever held the folder before may have saved a moment ago.
        earlier = task.find_earlier()
        refuse_disagreement(accelerator, *_position(task, earlier))
        if earlier.is_complete:
            logger.info("nothing to do: %s is there", earlier.path)
            if accelerator.is_main_process:  # a kill may have come before the trackers got all
                send_to_trackers(task.run.output_dir, task.run.log_with, task.settings)
            return True
        run, state = build(task, accelerator, interruption, earlier)
        _describe(run, state)
        return fit(run, state)


@contextmanager
def working_in(config: OutputConfig) -> Iterator[tuple[Accelerator, Interruption]]:
    """Device and processes of a call, with the output directory to themselves.

    Raises ValueError if the device is not there, or another call works in the directory.
    """
    folder = config.output_dir
    with Interruption() as interruption:
        accelerator = make_accelerator(config)
        with hold(folder / LOCK, folder) if accelerator.is_main_process else nullcontext():
            accelerator.wait_for_everyone()  # from here on nobody else writes there
            yield accelerator, interruption


def _position(task: Task, earlier: Earlier) -> tuple[int, int]:
    """Epochs and steps from which a process would go on."""
    if earlier.is_complete:
        return task.epochs, 0
    return tuple(earlier.checkpoint.get(f"{n}_completed", 0) for n in ("epochs", "steps"))  # type: ignore[return-value]


def build(
    task: Task,
    accelerator: Accelerator,
    interruption: Interruption,
    earlier: Earlier | None = None,
) -> tuple[Run, State]:
    """Everything as the checkpoint has it, or anew. Writes nothing. Raises ValueError."""
    checkpoint, path = (earlier.checkpoint, earlier.path) if earlier else ({}, None)
    torch.manual_seed(task.seed)
    model, loss, optimizer = task.build(accelerator, checkpoint)
    scales_loss = accelerator.mixed_precision == "fp16"
    update = GuardedUpdate(optimizer, task.clip_grad, scales_loss=scales_loss)
    state = State.fresh(task)
    if checkpoint:
        assert path is not None
        load_weights(model, checkpoint["model"], path)
        load_optimizer(optimizer, checkpoint["optimizer"], path)
        update.continue_from(checkpoint, path)
        state.epochs_completed = checkpoint["epochs_completed"]
        state.steps_completed = checkpoint["steps_completed"]
        task.take_up(state, checkpoint)
    if task.run.activation_checkpointing:
        recompute_activations(model)
    plan = task.plan(accelerator.num_processes)
    if task.auto_batch and accelerator.device.type == "cuda":
        # Measured before the model is compiled, which would take each size for a new shape.
        share = plan.effective_batch_size // plan.processes
        size = largest_micro_batch(accelerator, loss, optimizer, task.example, share=share)
        plan = replace(plan, micro_batch_size=size)
    run = Run(
        task=task, accelerator=accelerator, interruption=interruption, plan=plan, model=model,
        prepared=accelerator.prepare_model(loss), update=update,
    )  # fmt: skip
    return run, state


def _describe(run: Run, state: State) -> None:
    """Tell what is about to happen."""
    plan, accelerator, task = run.plan, run.accelerator, run.task
    logger.info("%s", task.describe(run))
    logger.info(
        "effective batch %d = %d process(es) x %d step(s) x %d images, %d steps per epoch",
        plan.effective_batch_size, plan.processes, plan.accumulation_steps, plan.micro_batch_size,
        plan.steps_per_epoch,
    )  # fmt: skip
    logger.info(
        "%s, precision %s, %d loader workers per process; epochs %d to %d, from step %d",
        accelerator.device, accelerator.mixed_precision.replace("no", "fp32"),
        task.run.loader_workers, state.epochs_completed + 1, task.epochs, state.steps_completed,
    )  # fmt: skip


def fit(run: Run, state: State) -> bool:
    """Train what is left of the epochs. Returns False if stopped by a signal."""
    task, outcome = run.task, "failed"
    logbook = _open_logbook(run, state)
    with Saver(task.run.save_every_minutes) as saver:
        save = partial(_save, run, state, saver)
        trainer = EpochTrainer(run, logbook.progress if logbook else None, saver, save)
        batches = task.batches(run, (state.epochs_completed, state.steps_completed), task.epochs)
        stopped = False
        try:
            while state.epochs_completed < task.epochs and not stopped:
                stopped = trainer.train_one_epoch(state, batches)
                if state.steps_completed == run.plan.steps_per_epoch:
                    # A stop that came with the last step need not leave the rest to another call.
                    stopped = not _finish_epoch(run, state, logbook, saver) or stopped
            is_done = state.epochs_completed == task.epochs
            if not is_done:
                save()
            saver.settle(wait=True)
            if is_done and logbook is not None:
                task.after_round(run, state)
            outcome = "done" if is_done else "stopped"
        finally:
            if logbook is not None:
                logbook.close(outcome)
    if outcome == "stopped":
        logger.warning("stopped by a signal; run the same command again to continue")
    run.accelerator.wait_for_everyone()  # nobody leaves while the first process is still saving
    run.accelerator.end_training()
    return outcome == "done"


def _open_logbook(run: Run, state: State) -> Logbook | None:
    """Log and progress of the first process; the others have none."""
    if not run.accelerator.is_main_process:
        return None
    return Logbook(
        run.task.run.output_dir,
        epochs_completed=state.epochs_completed,
        epochs_total=run.task.epochs,
        images_per_epoch=run.plan.images_per_epoch,
        log_with=run.task.run.log_with,
        settings=run.task.settings,
    )


def _finish_epoch(run: Run, state: State, logbook: Logbook | None, saver: Saver) -> bool:
    """Evaluate if it is time to, log and save. Returns False if told to stop while evaluating.

    A kill loses nothing: the log is cut back to the checkpoint on resume, so it is written first.
    """
    task, number = run.task, state.epochs_completed + 1
    damage = not_finite(run.model.state_dict())  # found by all processes
    if damage:
        raise RuntimeError(f"{damage} is not finite after epoch {number}; {task.remedy}")
    evaluation = Evaluation({})
    if task.is_evaluated(number):
        if task.saves_before_evaluating:
            _save(run, state, saver)
        began = time.monotonic()
        found = task.evaluate(run, state, logbook.progress if logbook else None)
        state.total_seconds += time.monotonic() - began
        if found is None:
            return False
        evaluation = found
    record = {"epoch": number, **task.record(run, state, evaluation.scores)}
    state.total_seconds += state.seconds
    state.begin_epoch(number)
    if logbook is not None:
        logbook.add_epoch(record)
        names = task.checkpoint_names(number, is_best=evaluation.is_best)
        _save(run, state, saver, names, afterwards=partial(logbook.saved, number))
    return True


def _save(
    run: Run,
    state: State,
    saver: Saver,
    names: Sequence[str] = (),
    *,
    afterwards: Callable[[], None] | None = None,
) -> None:
    """The first process saves where the run stands; by default under the rolling name only.

    A name of its own comes before the rolling one, so that whatever continues from that can rely on
    the other being there.
    """
    if not run.accelerator.is_main_process:
        return
    task, folder = run.task, run.task.run.output_dir
    names = names or task.checkpoint_names(state.epochs_completed, is_best=False)[-1:]
    content = {
        **run.update.for_checkpoint(),
        "model": run.model.state_dict(),
        "optimizer": run.update.optimizer.state_dict(),
        "epochs_completed": state.epochs_completed,
        "steps_completed": state.steps_completed,
        "config": task.settings,
        **task.extra_state(run, state),
    }
    also = folder / names[1] if len(names) > 1 else None
    saver.save(content, folder / names[0], also=also, afterwards=afterwards)


# An epoch, and a step


class EpochTrainer:
    """Trains epochs, and remembers between them what went wrong."""

    def __init__(
        self,
        run: Run,
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
            max(1, PASSES_BETWEEN_LOOKS // run.plan.accumulation_steps) if self.on_gpu else 1
        )
        self.sums: Tensor | None = None  # loss and counts since the last look
        self.requests = torch.zeros(2, dtype=torch.float64, device=self.device)  # to stop, to save
        self.first_bad_step = torch.full((), -1, device=self.device)  # by this process's own loss
        self.reads = LateReads(is_late=self.on_gpu)
        self.has_stepped = False

    def train_one_epoch(self, state: State, batches: Iterator[Any]) -> bool:
        """Train to the end of the state's epoch, or until a signal. Returns True if stopped.

        batches: this process's loader, standing where the state stands. Raises RuntimeError if a
        loss is not finite or too many images are unreadable; the weights are then those before.
        """
        run, steps = self.run, self.run.plan.steps_per_epoch
        run.prepared.train()
        while state.steps_completed < steps:
            began = time.monotonic()
            with self._compiling():
                self.step(state, batches)
            state.steps_completed += 1
            at_end = state.steps_completed == steps
            looks = at_end or state.steps_completed % self.steps_between_looks == 0
            stop, save = self._look(state, exactly=at_end) if looks else (False, False)
            seconds = time.monotonic() - began
            state.seconds += seconds
            if save and not (stop or at_end):
                self.save()
            if looks and self.saver is not None:
                self.saver.settle(wait=False)
            if self.progress is not None:
                images = run.plan.effective_batch_size
                self.progress.advance(run.epochs_done(state), images, seconds)
            if stop:
                return True
        return False

    def _compiling(self) -> AbstractContextManager[None]:
        """Of the first step, in which the model may be compiled."""
        is_compiled = self.run.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        shielding = is_compiled and not self.has_stepped
        self.has_stepped = True
        return self.run.interruption.shielding_children() if shielding else nullcontext()

    def step(self, state: State, batches: Iterator[Any]) -> None:
        """One optimizer step. Each micro-batch is computed while the next is still being loaded."""
        run, task, accelerator = self.run, self.run.task, self.run.accelerator
        rank, steps = accelerator.process_index, run.plan.steps_per_epoch
        number = state.epochs_completed * steps + state.steps_completed
        torch.manual_seed(derived_seeds(task.seed, STEP, number, rank)[0])  # dropout, drop path
        unit = run.update.scale / run.values_per_pass
        errors = torch.zeros((), dtype=torch.float64, device=self.device)
        counted: list[tuple[float, ...]] = []
        for left in reversed(range(run.plan.passes(rank))):
            began = time.monotonic()
            micro = task.micro_batch(next(batches))
            state.waited_seconds += time.monotonic() - began
            run.unreadable.note(micro.unreadable)
            counted.append((micro.num_values, *micro.counts, len(micro.unreadable)))
            # Gradients are exchanged with the last pass only.
            with accelerator.no_sync(run.prepared) if left else nullcontext():
                on_device = (tensor.to(self.device, non_blocking=True) for tensor in micro.inputs)
                part = run.prepared(*on_device).sum()
                (part * unit).backward()
            errors += part.detach()
        of_all = [sum(column) for column in zip(*counted, strict=True)]
        is_due = accelerator.is_main_process and self.saver is not None and self.saver.is_due
        own = self._on_device([float(run.interruption.requested), float(is_due), *of_all])
        # The one exchange of numbers: requests of any process, sums of all.
        total = accelerator.reduce(torch.cat([errors.reshape(1), own]), reduction="sum")
        self.requests, num_values = total[1:3], total[3].clamp(min=1)  # no values: loss 0
        loss = total[0] / num_values
        bad_here = ~torch.isfinite(errors) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad_here, state.steps_completed)
        # DDP gives the mean of the processes' gradients.
        divisor = num_values / (run.values_per_pass * accelerator.num_processes)
        progress = run.epochs_done(state) / task.total_epochs
        run.update.step(loss, divisor, task.learning_rate(progress))
        sums = torch.cat([loss.reshape(1), total[4:]])
        self.sums = sums if self.sums is None else self.sums + sums

    def _on_device(self, values: list[float]) -> Tensor:
        """[N] float64. From page-locked memory a copy does not keep the host waiting."""
        on_host = torch.tensor(values, dtype=torch.float64, pin_memory=self.on_gpu)
        return on_host.to(self.device, non_blocking=True)

    def _look(self, state: State, *, exactly: bool) -> tuple[bool, bool]:
        """Read what has happened. Returns whether to stop, and whether to save: all agree on it.

        exactly: what happened in this step, too, for which a GPU has to be waited for; so it is
        where the state is going to be saved.
        """
        assert self.sums is not None
        failed = self.run.update.failed.double().reshape(1)
        self.reads.push(torch.cat([failed, self.requests, self.sums]))
        self.sums = None
        stop, save = self._read(state, everything=exactly)
        if stop or save:
            last = self._read(state, everything=True)
            stop, save = stop or last[0], save or last[1]
        self.run.unreadable.check(state.sums["unreadable_images"], self.run.plan.num_images)
        return stop, save

    def _read(self, state: State, *, everything: bool) -> tuple[bool, bool]:
        stop = save = False
        for failed, told_to_stop, save_is_due, *sums in self.reads.pop(everything=everything):
            if failed:
                self._raise_not_finite(state)
            stop, save = stop or told_to_stop > 0, save or save_is_due > 0
            state.add(sums)
        return stop, save

    def _raise_not_finite(self, state: State) -> None:
        """Name epoch, step and process. All processes come here at the same step."""
        steps = self.run.accelerator.gather(self.first_bad_step.reshape(1)).tolist()
        where = [f"process {n}, step {step + 1:.0f}" for n, step in enumerate(steps) if step >= 0]
        named = f"the loss is not finite on {', '.join(where)}"
        raise RuntimeError(
            f"{named if where else 'a gradient is not finite'} of {self.run.plan.steps_per_epoch} "
            f"in epoch {state.epochs_completed + 1}; {self.run.task.remedy}"
        )


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


# How long it takes


def time_training(task: Task, steps: int) -> dict[str, float] | None:
    """Seconds of setting up, an epoch, an evaluation; None in all processes but the first.

    Begins anew whatever lies in the output directory, and writes nothing. The first `steps` steps
    warm up the loader, the allocator and torch.compile; as many are timed.
    """
    interruption = Interruption()
    run, state = build(task, make_accelerator(task.run), interruption)
    whole = run.plan
    steps = min(steps, whole.steps_per_epoch)
    # An epoch of so many steps, twice.
    run.plan = replace(whole, num_images=steps * whole.effective_batch_size)
    batches, trainer = task.batches(run, (0, 0), epochs=2), EpochTrainer(run)
    # From the start of the process: its imports are part of every step of a plan.
    setup_seconds = time.time() - psutil.Process().create_time()
    with interruption:
        for _ in range(2):
            state.begin_epoch(0)  # a schedule of one epoch has no second
            if trainer.train_one_epoch(state, batches):
                raise RuntimeError("stopped by a signal")
    epoch_seconds = state.seconds * whole.steps_per_epoch / steps
    evaluation_seconds = _evaluation_seconds(run) if task.evaluations else 0.0
    if not run.accelerator.is_main_process:
        return None
    return {
        "setup_seconds": setup_seconds,
        "epoch_seconds": epoch_seconds,
        "evaluation_seconds": evaluation_seconds,
        "evaluations": task.evaluations,
        "epochs": task.total_epochs,
        "images_per_second": whole.images_per_epoch / epoch_seconds,
    }


def _evaluation_seconds(run: Run) -> float:
    """Of all held-out images, by scoring some of them; the first few warm up."""
    total, processes = run.task.num_heldout, run.accelerator.num_processes
    for images in (4 * processes, 16 * processes):
        began = time.monotonic()
        run.task.evaluate_some(run, min(images, total))
        seconds = time.monotonic() - began
    return seconds * total / min(images, total)
