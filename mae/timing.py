"""`pretrain --dry-run time`: what an epoch takes here, by real steps of the real run."""

from __future__ import annotations

import time
from dataclasses import replace

from common.interruption import Interruption
from engine.trainer import EpochTrainer
from mae.build import build_run
from mae.config import PretrainConfig
from mae.data import FixedImages
from mae.train import heldout_loss


def time_pretraining(config: PretrainConfig, steps: int) -> dict[str, float] | None:
    """Seconds of setting up and of an epoch; None in all processes but the first.

    Goes on from a checkpoint where there is one, and writes nothing. The first `steps` steps warm
    up the loader, the allocator and torch.compile; as many are timed.
    """
    began = time.monotonic()
    interruption = Interruption()
    run, state = build_run(config, interruption)
    plan, heldout = run.plan, run.heldout
    steps = min(steps, plan.steps_per_epoch)
    # An epoch of so many steps, twice, and a loss of no more held-out images than those steps have.
    run.plan = replace(plan, num_images=steps * plan.effective_batch_size)
    run.heldout = FixedImages(
        run.images, heldout.images.folder, heldout.images.paths[: run.plan.num_images]
    )
    first_epoch, state.steps_completed = state.epochs_completed, 0
    with interruption:
        trainer = EpochTrainer(run)
        batches = run.batches(state, epochs=first_epoch + 2)
        setup_seconds = time.monotonic() - began
        for epoch in (first_epoch, first_epoch + 1):
            state.epochs_completed, state.steps_completed, state.seconds = epoch, 0, 0.0
            state.sums.zero_()
            if trainer.train_one_epoch(state, batches):
                raise RuntimeError("stopped by a signal")
    began = time.monotonic()
    heldout_loss(run)
    heldout_seconds = time.monotonic() - began
    if not run.accelerator.is_main_process:
        return None
    return {
        "setup_seconds": setup_seconds,
        "epoch_seconds": state.seconds * plan.steps_per_epoch / steps
        + heldout_seconds * len(heldout) / max(1, len(run.heldout)),
        "evaluation_seconds": 0.0,
        "evaluations": 0,
        "epochs": config.optimisation.epochs,
        "images_per_second": run.plan.num_images / state.seconds,
    }
