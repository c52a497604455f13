"""Finetuning: build, maybe resume, then per epoch train, evaluate, log, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.utils import broadcast

from common.files import write_json
from common.step_files import AREAS, BEST, CHECKPOINT, PREDICTIONS, RESULT
from engine.checkpoint import Saver, not_finite
from engine.devices import peak_memory_mib
from engine.logbook import Logbook
from engine.trainer import EpochTrainer
from segmenter.build import Run, State, begin, build_run, checkpoint_content, result_content
from segmenter.check import Task, all_settings
from segmenter.config import SCORES, TrainConfig
from segmenter.drawing import draw_predictions
from segmenter.evaluate import evaluate_model
from segmenter.schedule import learning_rate

logger = logging.getLogger(__name__)


def finetune(config: TrainConfig, task: Task) -> bool:
    """Run a finetuning, or what is left of it. task: what `check_training` made of the config.

    Returns True when result.json is there, False if a signal stopped the run, after saving. Raises
    ValueError for what the user can fix, and RuntimeError when the run fails.
    """
    with begin(config, task) as (accelerator, interruption, found):
        if found is not None and found.name == RESULT:
            return True
        run, state = build_run(config, accelerator, interruption, task, found)
        return _fit(run, state)


def _fit(run: Run, state: State) -> bool:
    """Train to the end. Returns False if stopped by a signal."""
    epochs, logbook = run.config.optimisation.epochs, _open_logbook(run, state)
    outcome = "failed"
    with Saver(run.config.run.save_every_minutes) as saver:
        progress = logbook.progress if logbook else None
        trainer = EpochTrainer(run, progress, saver, lambda: _save(run, state, saver))
        batches, stopped = run.batches(state, epochs), False
        try:
            while state.epochs_completed < epochs and not stopped:
                stopped = trainer.train_one_epoch(state, batches)
                stopped = stopped or not _finish_epoch(run, state, logbook, saver)
            if stopped:
                _save(run, state, saver)
            saver.settle(wait=True)
            if not stopped:
                _finish_run(run, state)
            outcome = "stopped" if stopped else "done"
        finally:
            if logbook is not None:
                logbook.close(outcome)
    if stopped:
        logger.warning("stopped by a signal; run the same command again to continue")
    run.accelerator.wait_for_everyone()  # nobody leaves while the first process is still saving
    return outcome == "done"


def _open_logbook(run: Run, state: State) -> Logbook | None:
    """Of the first process only."""
    if not run.accelerator.is_main_process:
        return None
    return Logbook(
        run.output_dir,
        epochs_completed=state.epochs_completed,
        epochs_total=run.config.optimisation.epochs,
        images_per_epoch=run.plan.images_per_epoch,
        log_with=run.config.run.log_with,
        settings=all_settings(run.config, run.task),
    )


def _finish_epoch(run: Run, state: State, logbook: Logbook | None, saver: Saver) -> bool:
    """Evaluate if it is time to, log and save. Returns False if told to stop while evaluating.

    A kill loses nothing: the log is cut back to the checkpoint on resume, so it is written first;
    the training of the epoch is saved before a long evaluation.
    """
    optimisation = run.config.optimisation
    number = state.epochs_completed + 1
    damage = not_finite(run.model.state_dict())
    if damage:
        raise RuntimeError(f"{damage} is not finite after epoch {number}; {run.remedy}")
    scores = None
    if number % optimisation.eval_every == 0 or number == optimisation.epochs:
        _save(run, state, saver)
        scores = _evaluate(run, state, logbook)
        if scores is None:
            return False
    record = _epoch_record(run, state)
    state.total_seconds += state.seconds
    state.epochs_completed, state.steps_completed = number, 0
    state.loss_sum = state.seconds = state.waited_seconds = 0.0
    state.unreadable_images = 0
    is_best = False
    if scores is not None:
        state.scores = scores
        is_best = state.best_mean_iou is None or scores["mean_iou"] > state.best_mean_iou
        if is_best:
            state.best_mean_iou = scores["mean_iou"]
        record |= {f"val_{name}": scores[name] for name in SCORES}
    if logbook is not None:
        logbook.add_epoch(record)
        _save(run, state, saver, best=is_best, afterwards=partial(logbook.saved, number))
    return True


def _evaluate(run: Run, state: State, logbook: Logbook | None) -> dict[str, Any] | None:
    """Plain scores, None if told to stop. The areas of each image are left in a file."""
    began = time.monotonic()
    # Running means of UPerNet's norms differ by process on CPUs; the first one's are saved.
    broadcast(list(run.model.buffers()))
    areas = evaluate_model(
        run.accelerator,
        run.model,
        run.images,
        run.config.run,
        on_progress=logbook.progress.evaluating if logbook else None,
        interruption=run.interruption,
    )
    state.total_seconds += time.monotonic() - began
    if areas is None:
        return None
    if run.accelerator.is_main_process:  # of this evaluation, or of one that is lost and made again
        areas.save(run.output_dir / AREAS, [pair.name for pair in run.task.val])
    return areas.scores(run.classes.names)


def _epoch_record(run: Run, state: State) -> dict[str, Any]:
    """The line of log.txt about the epoch that just ended, but for its scores."""
    steps, optimisation = run.plan.steps_per_epoch, run.config.optimisation
    updates = (state.epochs_completed + 1) * steps
    last = (updates - 1) / (steps * optimisation.epochs)
    return {
        "epoch": state.epochs_completed + 1,
        "num_updates": updates,
        "train_loss": state.loss_sum / steps,
        "train_learning_rate": learning_rate(optimisation, last),
        "unreadable_images": state.unreadable_images,
        "images_per_second": run.plan.images_per_epoch / state.seconds,
        "data_wait_share": state.waited_seconds / state.seconds,
        "epoch_seconds": state.seconds,
        "peak_memory_mib": peak_memory_mib(run.accelerator.device),
        **run.update.for_log(),
    }


def _save(
    run: Run,
    state: State,
    saver: Saver,
    *,
    best: bool = False,
    afterwards: Callable[[], None] | None = None,
) -> None:
    """The first process writes checkpoint.pth, and best.pth first if this is the best."""
    if not run.accelerator.is_main_process:
        return
    path, also = run.output_dir / CHECKPOINT, None
    if best:
        path, also = run.output_dir / BEST, path
    saver.save(checkpoint_content(run, state), path, also=also, afterwards=afterwards)


def _finish_run(run: Run, state: State) -> None:
    """Draw, and write the result last."""
    if run.accelerator.is_main_process:
        path = run.output_dir / PREDICTIONS
        draw_predictions(run.accelerator, run.model, run.images, run.classes, path)
        write_json(run.output_dir / RESULT, result_content(run, state))
