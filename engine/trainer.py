"""How anything here trains: build, maybe resume, then per epoch train, evaluate, log, save.

A part gives a `Task`, in the file to read next: mae/pretrain.py or segmenter/finetune.py.

    train(task, interruption)             # all of it; False: a signal stopped it, after saving
    run, state = build(task, ...)         # ready to train, nothing written
    EpochTrainer(run).train_one_epoch(state, load(run, (0, 0), epochs=1))

The loss of a step is a sum over all values of its effective batch (hidden or valid pixels, times
channels), divided by their number, so that neither accumulation nor the number of processes changes
it. That number is known when the last micro-batch has come: gradients of the sums are gathered
meanwhile, and the optimizer divides them.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor

from common.console import say
from common.interruption import Interruption
from engine.checkpoint import Saver, check_resumable, load_optimizer, load_weights, not_finite
from engine.devices import LateReads, make_accelerator, refuse_disagreement, working_in
from engine.layers import lower_precision, recompute_activations
from engine.logbook import Logbook, send_to_trackers
from engine.memory import largest_micro_batch
from engine.schedule import STEP, derived_seeds
from engine.task import Earlier, MicroBatch, Run, State, Task, load
from engine.update import GuardedUpdate

logger = logging.getLogger(__name__)

PASSES_BETWEEN_LOOKS = 10  # of the host at a GPU; a CPU is looked at after every step
TIMED_STEPS = 20


# A call


def train(task: Task, interruption: Interruption) -> bool:
    """Run a training, or what is left of it. interruption: watches for signals already.

    Returns True when nothing is left, False if a signal stopped it, after saving. Raises ValueError
    for what the user can fix, and RuntimeError when the run fails (a loss that is not finite, too
    many unreadable images).
    """
    with working_in(task.run) as accelerator:
        # Only now: whoever held the folder before may have saved a moment ago.
        earlier = task.find_earlier()
        refuse_disagreement(accelerator, *earlier.position)
        if earlier.is_complete:
            logger.info("nothing to do: %s is there", earlier.path)
            if accelerator.is_main_process:  # a kill may have come before the trackers got all
                send_to_trackers(task.run, task.settings)
            return True
        run, state = build(task, accelerator, interruption, earlier)
        run.describe(state)
        return fit(run, state)


def build(
    task: Task, accelerator: Accelerator, interruption: Interruption, earlier: Earlier | None = None
) -> tuple[Run, State]:
    """Everything as the checkpoint has it, or anew. Writes nothing. Raises ValueError."""
    checkpoint, path = (earlier.checkpoint, earlier.path) if earlier else ({}, None)
    torch.manual_seed(task.seed)
    model, loss, optimizer = task.build(accelerator, checkpoint)
    scales_loss = accelerator.mixed_precision == "fp16"
    update = GuardedUpdate(optimizer, task.clip_grad, scales_loss=scales_loss)
    state = State.of(task, checkpoint, path)
    if checkpoint:
        assert path is not None
        check_resumable(checkpoint, path)
        load_weights(model, checkpoint["model"], path)
        load_optimizer(optimizer, checkpoint["optimizer"], path)
        update.continue_from(checkpoint.get("loss_scaling", {}))
    lower_precision(model, task.run.precision)
    if task.run.activation_checkpointing:
        recompute_activations(model)
    plan = task.plan(accelerator.num_processes)
    epochs, steps = state.epochs_completed, state.steps_completed
    most = plan.steps_in(min(epochs, task.total_epochs - 1))
    if epochs > task.total_epochs or steps > most:
        of = f"{task.total_epochs} epochs of {most} steps"
        raise ValueError(f"{path} is damaged: {epochs} epochs and {steps} steps are completed, of {of}")
    if task.auto_batch and accelerator.device.type == "cuda":
        # Measured before the model is compiled, which would take each size for a new shape.
        share = plan.effective_batch_size // plan.processes
        size = largest_micro_batch(accelerator, loss, optimizer, task.example, share=share)
        plan = replace(plan, micro_batch_size=size)
    task.run.check_passes(plan.accumulation_steps)
    run = Run(
        task=task, accelerator=accelerator, interruption=interruption, plan=plan, model=model,
        prepared=accelerator.prepare_model(loss), update=update,
    )  # fmt: skip
    return run, state


def fit(run: Run, state: State) -> bool:
    """Train what is left of the epochs. Returns False if stopped by a signal."""
    task, outcome, stopped = run.task, "failed", False
    # A round that ends before the first epoch saves the model as it starts, and leaves all else.
    if run.accelerator.is_main_process and task.epochs:
        run.logbook = Logbook(
            task.run, task.settings, epochs_completed=state.epochs_completed,
            epochs_total=task.epochs, images_per_epoch=run.plan.images_per_epoch,
        )  # fmt: skip
    batches = load(run, (state.epochs_completed, state.steps_completed), task.epochs)
    with Saver(task.run.save_every_minutes) as run.saver:
        trainer = EpochTrainer(run)
        try:
            while state.epochs_completed < task.epochs and not stopped:
                stopped = trainer.train_one_epoch(state, batches)
                if state.steps_completed == run.plan.steps_in(state.epochs_completed):
                    # A stop that came with the last step need not leave the rest to another call.
                    stopped = not _finish_epoch(run, state) or stopped
            is_done = state.epochs_completed == task.epochs
            if not is_done or not task.epochs:
                save(run, state)
            run.saver.settle(wait=True)  # what comes now relies on the checkpoint's being there
            if is_done and run.accelerator.is_main_process:
                task.after_round(run, state)
            outcome = "done" if is_done else "stopped"
        finally:
            if run.logbook is not None:
                run.logbook.close(outcome)
    if outcome == "stopped":
        logger.warning("stopped by a signal; run the same command again to continue")
    run.accelerator.wait_for_everyone()  # nobody leaves while the first process is still saving
    run.accelerator.end_training()
    return outcome == "done"


def _finish_epoch(run: Run, state: State) -> bool:
    """Evaluate if it is time to, log and save. Returns False if told to stop while evaluating."""
    task, number = run.task, state.epochs_completed + 1
    damage = not_finite(run.model.state_dict())  # found by all processes
    if damage:
        raise RuntimeError(f"{damage} is not finite after epoch {number}; {task.remedy}")
    began = time.monotonic()
    evaluation = task.evaluate(run, state)
    state.total_seconds += time.monotonic() - began
    if evaluation is None:
        return False
    record = {"epoch": number, **task.record(run, state, evaluation.scores)}
    state.total_seconds += state.seconds
    state.begin_epoch(number)
    if run.logbook is not None:
        # A kill loses nothing in this order: on resume the log is cut back to the checkpoint.
        run.logbook.add_epoch(record)
        names = task.checkpoint_names(number, is_best=evaluation.is_best)
        save(run, state, names, afterwards=partial(run.logbook.saved, number))
    return True


def save(
    run: Run, state: State, names: Sequence[str] = (), *, afterwards: Callable[[], None] | None = None
) -> None:
    """The first process saves where the run stands; by default under the rolling name only."""
    if run.saver is None or not run.accelerator.is_main_process:
        return
    task, folder = run.task, run.task.run.output_dir
    content = {
        "model": run.model.state_dict(),
        "optimizer": run.update.optimizer.state_dict(),
        "epochs_completed": state.epochs_completed,
        "steps_completed": state.steps_completed,
        "config": task.settings,
        "state": vars(state),
        **task.extra_state(run),
    }
    if kept := run.update.loss_scaling():
        content["loss_scaling"] = kept
    # A name of its own comes before the rolling one, so that whatever continues from that can
    # rely on the other being there.
    *own, rolling = names or task.checkpoint_names(state.epochs_completed, is_best=False)[-1:]
    path, also = (folder / own[0], folder / rolling) if own else (folder / rolling, None)
    keeps = task.run.keep_optimizer
    run.saver.save(content, path, also=also, keep_optimizer=keeps, afterwards=afterwards)


# An epoch, and a step


class EpochTrainer:
    """Trains epochs, and remembers between them what went wrong."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.device = run.accelerator.device
        self.on_gpu = self.device.type == "cuda"
        # Few enough that a signal does not wait longer than saving in time allows.
        self.steps_between_looks = (
            max(1, PASSES_BETWEEN_LOOKS // run.plan.accumulation_steps) if self.on_gpu else 1
        )
        self.sums: Tensor | None = None  # loss and counts since the last look
        self.requests = torch.zeros(2, dtype=torch.float64, device=self.device)  # to stop, to save
        self.first_bad_step = torch.full((), -1, device=self.device)  # by this process's own loss
        self.reads = LateReads(on_gpu=self.on_gpu)
        self.has_stepped = False

    def train_one_epoch(self, state: State, batches: Iterator[MicroBatch]) -> bool:
        """Train to the end of the state's epoch, or until a signal. Returns True if stopped.

        batches: this process's loader, standing where the state stands. Raises RuntimeError if a
        loss is not finite or too many images are unreadable; the weights are then those before.
        """
        run, steps = self.run, self.run.plan.steps_in(state.epochs_completed)
        run.prepared.train()
        while state.steps_completed < steps:
            began = time.monotonic()
            with self._compiling():
                self.step(state, batches)
            state.steps_completed += 1
            at_end = state.steps_completed == steps
            looks = at_end or state.steps_completed % self.steps_between_looks == 0
            stop, is_due = self._look(state, exactly=at_end) if looks else (False, False)
            seconds = time.monotonic() - began
            state.seconds += seconds
            if is_due and not (stop or at_end):
                save(run, state)
            if looks and run.saver is not None:
                run.saver.settle(wait=False)
            if run.logbook is not None:
                images = run.plan.effective_batch_size
                run.logbook.advance(run.epochs_done(state), images, seconds)
            if stop:
                return True
        return False

    def _compiling(self) -> AbstractContextManager[None]:
        """Of the first step, in which the model may be compiled."""
        is_compiled = self.run.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        shielding = is_compiled and not self.has_stepped
        self.has_stepped = True
        return self.run.interruption.shielding_children() if shielding else nullcontext()

    def step(self, state: State, batches: Iterator[MicroBatch]) -> None:
        """One optimizer step. Each micro-batch is computed while the next is still being loaded."""
        run, task, accelerator = self.run, self.run.task, self.run.accelerator
        rank, steps = accelerator.process_index, run.plan.steps_per_epoch
        number = state.epochs_completed * steps + state.steps_completed
        torch.manual_seed(derived_seeds(task.seed, STEP, number, rank)[0])  # dropout, drop path
        # About the mean of a pass: gradients of its sum would be more than fp16 holds (65504).
        unit = run.update.scale / run.values_per_pass
        # In fp64: an epoch's sum of steps' sums would lose digits in fp32.
        errors = torch.zeros((), dtype=torch.float64, device=self.device)
        counted: list[tuple[float, ...]] = []
        for left in reversed(range(run.plan.passes(rank))):
            began = time.monotonic()
            micro = next(batches)
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
        is_due = accelerator.is_main_process and run.saver is not None and run.saver.is_due
        own = [float(run.interruption.requested), float(is_due), *of_all]
        # From page-locked memory a copy does not keep the host waiting.
        on_host = torch.tensor(own, dtype=torch.float64, pin_memory=self.on_gpu)
        own_values = on_host.to(self.device, non_blocking=True)
        # The one exchange of numbers: requests of any process, sums of all.
        total = accelerator.reduce(torch.cat([errors.reshape(1), own_values]), reduction="sum")
        self.requests, num_values = total[1:3], total[3].clamp(min=1)  # no values: loss 0
        loss = total[0] / num_values
        bad_here = ~torch.isfinite(errors) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad_here, state.steps_completed)
        # DDP gives the mean of the processes' gradients.
        divisor = num_values / (run.values_per_pass * accelerator.num_processes)
        progress = run.epochs_done(state) / run.plan.epochs_until(task.total_epochs)
        run.update.step(loss, divisor, task.rate_at(progress))
        sums = torch.cat([loss.reshape(1), total[4:]])
        self.sums = sums if self.sums is None else self.sums + sums

    def _look(self, state: State, *, exactly: bool) -> tuple[bool, bool]:
        """Read what has happened. Returns whether to stop, and whether to save: all agree on it.

        exactly: what happened in this step, too, for which a GPU has to be waited for; so it is
        where the state is going to be saved.
        """
        assert self.sums is not None
        failed = self.run.update.failed.double().reshape(1)
        self.reads.push(torch.cat([failed, self.requests, self.sums]))
        self.sums = None
        seen = self.reads.pop(everything=exactly)
        if any(stop or is_due for _, stop, is_due, *_ in seen):
            seen += self.reads.pop(everything=True)
        for failed_before, _, _, *sums in seen:
            if failed_before:
                self._raise_not_finite(state)
            state.add(sums)
        self.run.unreadable.check(state.sums["unreadable_images"], self.run.plan.num_images)
        return any(step[1] for step in seen), any(step[2] for step in seen)

    def _raise_not_finite(self, state: State) -> None:
        """Name epoch, step and process. All processes come here at the same step."""
        steps = self.run.accelerator.gather(self.first_bad_step.reshape(1)).tolist()
        where = [f"process {n}, step {step + 1:.0f}" for n, step in enumerate(steps) if step >= 0]
        named = f"the loss is not finite on {', '.join(where)}"
        raise RuntimeError(
            f"{named if where else 'a gradient is not finite'} of "
            f"{self.run.plan.steps_in(state.epochs_completed)} "
            f"in epoch {state.epochs_completed + 1}; {self.run.task.remedy}"
        )


# How long it takes


def time_training(task: Task) -> None:
    """Print seconds of setting up, an epoch, an evaluation, as JSON: --dry-run time.

    Begins anew whatever lies in the output directory, and writes nothing. The first TIMED_STEPS
    warm up the loader, the allocator and torch.compile; as many are timed.
    """
    interruption = Interruption()
    run, state = build(task, make_accelerator(task.run), interruption)
    whole = run.plan
    steps = min(TIMED_STEPS, whole.steps_per_epoch)
    # An epoch of so many steps, twice.
    run.plan = replace(whole, num_images=steps * whole.effective_batch_size, end=math.inf)
    batches, trainer = load(run, (0, 0), epochs=2), EpochTrainer(run)
    setup_seconds = seconds_since_start()
    with interruption:
        for _ in range(2):
            state.begin_epoch(0)  # a schedule of one epoch has no second
            if trainer.train_one_epoch(state, batches):
                raise RuntimeError("stopped by a signal")
    epoch_seconds = state.seconds * whole.steps_per_epoch / steps
    evaluation_seconds = 0.0
    if task.evaluations:
        processes = run.accelerator.num_processes
        evaluation_seconds = seconds_of_all(partial(task.evaluate_some, run), task.num_heldout, processes)
    told = {
        "setup_seconds": setup_seconds,
        "epoch_seconds": epoch_seconds,
        "evaluation_seconds": evaluation_seconds,
        "evaluations": task.evaluations,
        "epochs": task.total_epochs,
        "images_per_second": whole.images_per_epoch / epoch_seconds,
    }
    if run.accelerator.is_main_process:
        say(json.dumps(told))


def seconds_since_start() -> float:
    """Of this process: its imports are part of every step of a plan."""
    return time.time() - psutil.Process().create_time()


def seconds_of_all(evaluate_some: Callable[[int], None], total: int, processes: int) -> float:
    """Of evaluating `total` images, by evaluating some of them; the first few warm up."""
    for images in (4 * processes, 16 * processes):
        began = time.monotonic()
        evaluate_some(min(images, total))
        seconds = time.monotonic() - began
    return seconds * total / min(images, total)
