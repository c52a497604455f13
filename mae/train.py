"""Pretraining: set up, then per epoch train, evaluate, log, save."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from common.interruption import Interruption, leave_signals_to_the_main_process
from common.lock import LockedError, hold
from common.parsed import read_log
from common.step_files import LAST, LOCK, LOG, checkpoint_path, reconstructions_path
from engine.checkpoint import Saver, not_finite
from engine.devices import peak_flops, peak_memory_mib
from engine.logbook import Logbook
from engine.trackers import Trackers
from engine.trainer import EpochTrainer
from engine.vit import IMAGE_CHANNELS
from mae.build import EPOCH_SUMS, Run, State, build_run, describe
from mae.check import check_output
from mae.config import PretrainConfig
from mae.data import collate
from mae.model import training_flops
from mae.reconstruct import draw_reconstructions, pack_fixed_set
from mae.schedule import learning_rate

logger = logging.getLogger(__name__)

FEW_IMAGES = 64  # not worth starting loader processes for


def pretrain(config: PretrainConfig) -> bool:
    """Run one round of pretraining, or what is left of it.

    Returns True when the round is complete, False if a signal stopped it, after saving. Raises
    ValueError for what the user can fix, before anything is written, and RuntimeError when the
    run fails (a loss that is not finite, too many unreadable images).
    """
    with Interruption() as interruption:
        check_output(config)
        run, state = build_run(config, interruption)
        if state.epochs_completed >= config.epochs_this_round:
            path = checkpoint_path(config.run.output_dir, config.epochs_this_round)
            if not path.is_file():
                raise ValueError(
                    f"the run is at {state.epochs_completed} epochs already, but {path} is missing"
                )
            logger.info("nothing to do: %d epochs are completed", state.epochs_completed)
            if run.accelerator.is_main_process:
                _tell_what_a_kill_kept(config)
            return True
        describe(run, state)
        first = run.accelerator.is_main_process  # the only one that writes
        output_dir = config.run.output_dir
        with hold(output_dir / LOCK, output_dir) if first else nullcontext():
            return _fit(run, state)


def _fit(run: Run, state: State) -> bool:
    """Train to the end of the round. Returns False if stopped by a signal."""
    logbook, epochs = _open_logbook(run, state), run.config.epochs_this_round
    outcome = "failed"
    with Saver(run.config.run.save_every_minutes) as saver:
        progress = logbook.progress if logbook else None
        trainer = EpochTrainer(run, progress, saver, lambda: _save_last(run, state, saver))
        batches, stopped = run.batches(state, epochs), False
        try:
            while state.epochs_completed < epochs and not stopped:
                stopped = trainer.train_one_epoch(state, batches)
                if state.steps_completed < run.plan.steps_per_epoch:
                    _save_last(run, state, saver)
                else:
                    _finish_epoch(run, state, logbook, saver)
            saver.settle(wait=True)
            outcome = "done" if state.epochs_completed == epochs else "stopped"
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
        run.config.run.output_dir,
        epochs_completed=state.epochs_completed,
        epochs_total=run.config.epochs_this_round,
        images_per_epoch=run.plan.images_per_epoch,
        log_with=run.config.run.log_with,
        settings=run.config.settings(),
    )


def _finish_epoch(run: Run, state: State, logbook: Logbook | None, saver: Saver) -> None:
    """Evaluate, log, draw and save, in an order in which a kill loses nothing.

    The log is cut back to the checkpoint on resume, so it is written first; a round's own
    checkpoint comes before `last.pth`, so that whatever continues from there can rely on it.
    """
    damage = not_finite(run.model.state_dict())  # found by all processes
    if damage:
        raise RuntimeError(
            f"{damage} is not finite after epoch {state.epochs_completed + 1}; {run.remedy}"
        )
    if logbook is not None and len(run.heldout):
        logbook.progress.evaluating(0, len(run.heldout))
    record = _epoch_record(run, state, heldout_loss(run))
    state.epochs_completed += 1
    state.steps_completed = 0
    state.seconds = state.waited_seconds = 0.0
    state.sums.zero_()
    if logbook is None:
        return
    logbook.add_epoch(record)
    output_dir, number = run.config.run.output_dir, state.epochs_completed
    path, also = output_dir / LAST, None
    if number == run.config.epochs_this_round:
        draw_reconstructions(run.model, run.fixed_set, reconstructions_path(output_dir, number))
        path, also = checkpoint_path(output_dir, number), path
    saver.save(_checkpoint(run, state), path, also=also, afterwards=partial(logbook.saved, number))


@torch.no_grad()
def heldout_loss(run: Run) -> float | None:
    """Mean squared error over all hidden pixels and channels of val/, None if it is empty.

    Its images are always cropped and hidden in the same way; the processes share them.
    """
    if not len(run.heldout):
        return None
    accelerator, model = run.accelerator, run.model
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = Subset(run.heldout, range(rank, len(run.heldout), processes))
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    if len(share):
        loader: Any = DataLoader(
            share,
            batch_size=run.plan.micro_batch_size,
            num_workers=0 if len(share) <= FEW_IMAGES else run.config.run.loader_workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_main_process,
        )
        for batch in loader:
            with accelerator.autocast():
                errors = model(batch.images.to(sums.device), batch.pattern.to(sums.device))
            sums[0] += errors.double().sum()
            sums[1] += batch.hidden_pixels.sum() * IMAGE_CHANNELS
    model.train()
    total = accelerator.reduce(sums, reduction="sum")
    return float(total[0] / total[1].clamp(min=1))


def _epoch_record(run: Run, state: State, heldout: float | None) -> dict[str, Any]:
    """The line of log.txt about the epoch that just ended."""
    sums = dict(zip(EPOCH_SUMS, state.sums.tolist(), strict=True))
    steps, images = run.plan.steps_per_epoch, run.plan.images_per_epoch
    flops = images * training_flops(run.config.model, run.images.method)
    coverage = sums["coverage"] / images
    variance = max(0.0, sums["coverage_square"] / images - coverage**2)
    last_step = state.epochs_completed + (steps - 1) / steps
    optimisation, device = run.config.optimisation, run.accelerator.device
    record: dict[str, Any] = {
        "epoch": state.epochs_completed + 1,
        "train_loss": sums["loss"] / steps,
        "val_loss": heldout,
        "train_lr": learning_rate(optimisation, last_step / optimisation.epochs),
        "coverage_percent_mean": coverage,
        "coverage_percent_std": math.sqrt(variance),
        "train_flops": flops * (state.epochs_completed + 1),
        "unreadable_images": round(sums["unreadable"]),
        "images_per_second": images / state.seconds,
        "data_wait_share": state.waited_seconds / state.seconds,
        "epoch_seconds": state.seconds,
        "peak_memory_mib": peak_memory_mib(device),
    }
    record |= run.update.for_log()
    peak = peak_flops(device, run.accelerator.mixed_precision)
    if peak is not None:
        record["mfu"] = flops / state.seconds / (peak * run.accelerator.num_processes)
    if heldout is None:
        del record["val_loss"]
    return record


def _save_last(run: Run, state: State, saver: Saver) -> None:
    """Save where the run stands; only the first process does."""
    if run.accelerator.is_main_process:
        saver.save(_checkpoint(run, state), run.config.run.output_dir / LAST)


def _checkpoint(run: Run, state: State) -> dict[str, Any]:
    return {
        **run.update.for_checkpoint(),
        "model": run.model.state_dict(),
        "optimizer": run.update.optimizer.state_dict(),
        "epochs_completed": state.epochs_completed,
        "steps_completed": state.steps_completed,
        "config": run.config.settings(),
        "images": {"count": len(run.listing.train), "digest": run.listing.digest},
        "fixed_set": pack_fixed_set(run.fixed_set),
        "sums": state.sums,
        "seconds": state.seconds,
        "waited_seconds": state.waited_seconds,
        "learning_rate": run.config.optimisation.learning_rate,
        "processes": run.plan.processes,
    }


def _tell_what_a_kill_kept(config: PretrainConfig) -> None:
    """Epochs whose checkpoint was saved, but which no tracker has got."""
    output_dir = config.run.output_dir
    # Whoever holds the folder tells them itself.
    with suppress(LockedError), hold(output_dir / LOCK, output_dir):
        trackers = Trackers(output_dir, config.run.log_with, config.settings())
        trackers.send(read_log(output_dir / LOG))
        trackers.close()
