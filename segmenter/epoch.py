"""One epoch of training: the step, and nothing else."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch

from segmenter.build import Run, State
from segmenter.data import Batch
from segmenter.model import segmentation_loss
from segmenter.optimisation import set_learning_rate
from segmenter.schedule import learning_rate, step_seed


def train_one_epoch(
    run: Run, state: State, batches: Iterator[Batch]
) -> Iterator[tuple[float, bool]]:
    """Train to the end of the state's epoch; yields each step's seconds, and whether to stop now.

    batches: this process's, from where the state stands. Raises RuntimeError if a loss is not
    finite; the weights are then those before that step.
    """
    run.prepared.train()
    while state.steps_completed < run.plan.steps_per_epoch:
        began = time.monotonic()
        batch = next(batches)
        run.unreadable.note(batch.unreadable)
        state.waited_seconds += time.monotonic() - began
        loss, stop = _step(run, state, batch)
        state.steps_completed += 1
        state.loss_sum += loss
        seconds = time.monotonic() - began
        state.seconds += seconds
        state.total_seconds += seconds
        yield seconds, stop


def _step(run: Run, state: State, batch: Batch) -> tuple[float, bool]:
    """One optimizer step on the whole batch, of which this process has a part.

    Returns its loss, the mean over the valid pixels of the whole batch, and whether any
    process was told to stop. The number of those pixels has to be known before the first
    backward pass, so that every pixel counts the same wherever it is.
    """
    accelerator, optimisation = run.accelerator, run.config.optimisation
    step = state.epochs_completed * run.plan.steps_per_epoch + state.steps_completed
    torch.manual_seed(step_seed(optimisation.seed, step, accelerator.process_index))
    device = accelerator.device
    valid = batch.valid_pixels.sum().to(device, torch.float64)
    valid = accelerator.reduce(valid, reduction="sum").clamp(min=1)  # none valid: loss 0
    loss = torch.zeros((), dtype=torch.float64, device=device)
    parts = batch.parts(run.config.run.most_at_once)
    for number, part in enumerate(parts, start=1):
        images, labels, sizes = (tensor.to(device, non_blocking=True) for tensor in part)
        last = number == len(parts)
        with contextlib.nullcontext() if last else accelerator.no_sync(run.prepared):
            logits = run.prepared(images, sizes)
            ignored = run.task.description.ignore_index
            part_loss = segmentation_loss(logits, labels, ignored) / valid.float()
            accelerator.backward(part_loss * accelerator.num_processes)  # DDP takes the mean
        loss += part_loss.detach()
    mean_loss, stop = _agree(run, state, loss, len(batch.unreadable))
    if optimisation.clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), optimisation.clip_grad)
    progress = step / (run.plan.steps_per_epoch * optimisation.epochs)  # before this step
    set_learning_rate(run.optimizer, learning_rate(optimisation, progress))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return mean_loss, stop


def _agree(run: Run, state: State, loss: torch.Tensor, unreadable: int) -> tuple[float, bool]:
    """The loss of all processes and whether one should stop, before the weights change."""
    accelerator = run.accelerator
    stop, skipped = (torch.full_like(loss, n) for n in (run.interruption.requested, unreadable))
    sums = accelerator.reduce(torch.stack([loss, stop, skipped]), reduction="sum").tolist()
    total, stops, skipped_images = sums
    state.unreadable_images += round(skipped_images)
    run.unreadable.check(state.unreadable_images, len(run.task.train))
    if math.isfinite(total):
        return total, bool(stops)
    losses = accelerator.gather(loss.reshape(1)).tolist()
    ranks = [str(rank) for rank, value in enumerate(losses) if not math.isfinite(value)]
    raise RuntimeError(
        f"the loss is not finite in epoch {state.epochs_completed + 1}, step "
        f"{state.steps_completed + 1} of {run.plan.steps_per_epoch}, on process "
        f"{', '.join(ranks) or 'all together'}; the last checkpoint is from before. "
        "A lower --lr or --clip-grad 1 may help"
    )
