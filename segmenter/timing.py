"""`train --dry-run time`: what an epoch and an evaluation take here, by real steps of the run."""

from __future__ import annotations

import time
from dataclasses import replace

import psutil

from common.interruption import Interruption
from engine.devices import make_accelerator
from engine.trainer import EpochTrainer
from segmenter.build import Run, build_run
from segmenter.check import Task
from segmenter.config import TrainConfig
from segmenter.data import WholeImages
from segmenter.evaluate import evaluate_model

GROUPS_SCORED = 4  # per process, and one to warm up


def time_finetuning(config: TrainConfig, task: Task, steps: int) -> dict[str, float] | None:
    """Seconds of setting up, an epoch, an evaluation; None in all processes but the first.

    Begins anew whatever lies in the output directory, and writes nothing. The first `steps` steps
    warm up the loader, the allocator and torch.compile; as many are timed.
    """
    accelerator = make_accelerator(config.run)
    optimisation = config.optimisation
    config = replace(config, optimisation=replace(optimisation, epochs=max(2, optimisation.epochs)))
    interruption = Interruption()
    run, state = build_run(config, accelerator, interruption, task, None)
    setup_seconds = time.time() - psutil.Process().create_time()
    plan = run.plan
    steps = min(steps, plan.steps_per_epoch)
    # An epoch of so many steps, twice.
    run.plan = replace(plan, num_images=min(plan.num_images, steps * plan.batch_size))
    batches, trainer = run.batches(state, epochs=2), EpochTrainer(run)
    with interruption:
        for epoch in range(2):
            state.epochs_completed, state.steps_completed, state.seconds = epoch, 0, 0.0
            if trainer.train_one_epoch(state, batches):
                raise RuntimeError("stopped by a signal")
    epoch_seconds = state.seconds * plan.steps_per_epoch / steps
    evaluation_seconds = _evaluation_seconds(run)
    if not accelerator.is_main_process:
        return None
    return {
        "setup_seconds": setup_seconds,
        "epoch_seconds": epoch_seconds,
        "evaluation_seconds": evaluation_seconds,
        "evaluations": optimisation.evaluations,
        "epochs": optimisation.epochs,
        "images_per_second": plan.images_per_epoch / epoch_seconds,
    }


def _evaluation_seconds(run: Run) -> float:
    """Of all validation images, by scoring some of them, evenly spaced."""
    group, processes = run.config.run.eval_batch_size, run.accelerator.num_processes
    seconds, scored = 0.0, 1
    for groups in (1, GROUPS_SCORED):
        step = max(1, len(run.images) // (group * processes * groups))
        pairs = run.images.pairs[::step][: group * processes * groups]
        images = WholeImages(run.task.description, pairs, run.config.protocol)
        began = time.monotonic()
        evaluate_model(run.accelerator, run.model, images, run.config.run)
        seconds, scored = time.monotonic() - began, len(pairs)
    return seconds * len(run.images) / scored
