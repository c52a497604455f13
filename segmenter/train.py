"""Finetuning: build, maybe resume, then per epoch train, evaluate, save, log."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from segmenter.build import (
    Run,
    State,
    Task,
    all_settings,
    build_run,
    checkpoint_content,
    describe,
    read_task,
)
from segmenter.checkpoint import also_save_as, check_same_settings, save_checkpoint
from segmenter.config import TrainConfig
from segmenter.data import Batch, training_batches
from segmenter.devices import make_accelerator, peak_memory_mib
from segmenter.drawing import draw_predictions
from segmenter.epoch import EpochTrainer
from segmenter.evaluate import Watch, evaluate_model
from segmenter.interruption import Interruption
from segmenter.layout import (
    BEST,
    CHECKPOINT,
    LOG,
    PREDICTIONS,
    PROGRESS,
    read_result,
    seed_dir,
    write_json,
)
from segmenter.logbook import Logbook, Progress
from segmenter.results import RESULT, combined_result, run_result
from segmenter.schedule import learning_rate
from segmenter.sole_writer import sole_writer

logger = logging.getLogger(__name__)


def finetune(config: TrainConfig) -> bool:
    """Run a finetuning, or what is left of it, once per seed.

    Returns True when result.json is there, False if a signal stopped the run, after saving. Raises
    ValueError for what the user can fix, before anything is written, and RuntimeError when the run
    fails.
    """
    with Interruption() as interruption:
        accelerator = make_accelerator(
            device=config.run.device, precision=config.run.precision, compile=config.run.compile
        )
        task = read_task(config)
        if config.run.eval_seeds == 1:
            return _finetune_seed(config, accelerator, task, interruption)
        return _finetune_seeds(config, accelerator, task, interruption)


def _finetune_seeds(
    config: TrainConfig, accelerator: Accelerator, task: Task, interruption: Interruption
) -> bool:
    """One finetuning after the other, each in its own folder; then their mean and deviation."""
    results = []
    for number in range(config.run.eval_seeds):
        seed = config.optimisation.seed + number
        folder = seed_dir(config.run.output_dir, seed)
        part = dataclasses.replace(
            config,
            optimisation=dataclasses.replace(config.optimisation, seed=seed),
            run=dataclasses.replace(config.run, output_dir=folder, eval_seeds=1),
        )
        logger.info("seed %d: %s", seed, folder)
        if accelerator.is_main_process:
            _show_progress_of(folder)
        if not _finetune_seed(part, accelerator, task, interruption):
            return False
        accelerator.free_memory()
        result = read_result(folder)
        assert result is not None
        results.append(result)
    if accelerator.is_main_process:
        _write_combined(config, results)
    accelerator.wait_for_everyone()
    return True


def _show_progress_of(folder: Path) -> None:
    """Whoever watches the output directory sees the progress of the seed that is running."""
    link = folder.parent / PROGRESS
    folder.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path(folder.name) / PROGRESS)


def _write_combined(config: TrainConfig, results: list[dict[str, Any]]) -> None:
    """The first seed's files, and the result of all seeds, in the output directory."""
    output_dir = config.run.output_dir
    first = seed_dir(output_dir, config.optimisation.seed)
    for name in (LOG, PREDICTIONS, CHECKPOINT, BEST, PROGRESS):
        also_save_as(first / name, output_dir / name)
    write_json(output_dir / RESULT, combined_result(results))


def _finetune_seed(
    config: TrainConfig, accelerator: Accelerator, task: Task, interruption: Interruption
) -> bool:
    finished = read_result(config.run.output_dir)
    if finished is not None and config.run.resume != "never":
        wanted = all_settings(config, task)
        check_same_settings(finished["settings"], wanted, config.run.output_dir / RESULT)
        logger.info("nothing to do: %s is there", config.run.output_dir / RESULT)
        return True
    run, state = build_run(config, accelerator, task)
    describe(run, state)
    with sole_writer(run.output_dir) if accelerator.is_main_process else nullcontext():
        return _fit(run, state, interruption)


@dataclass(frozen=True, kw_only=True)
class Books:
    """Log and progress, of the first process only."""

    log: Logbook
    progress: Progress


def _fit(run: Run, state: State, interruption: Interruption) -> bool:
    """Train to the end. Returns False if stopped by a signal."""
    books = _open_books(run, state)
    progress = books.progress if books else None
    trainer = EpochTrainer(run, interruption, progress, lambda: _save(run, state))
    batches = _batches(run, state)
    outcome = "failed"
    try:
        while state.epochs_completed < run.config.optimisation.epochs:
            stopped = trainer.train_one_epoch(state, batches)
            if stopped or not _finish_epoch(run, state, books, interruption):
                _save(run, state)
                logger.warning("stopped by a signal; run the same command again to continue")
                outcome = "stopped"
                break
        else:
            _finish_run(run, state)
            outcome = "done"
    finally:
        if books is not None:
            books.log.close()
            books.progress.close(outcome)
    run.accelerator.wait_for_everyone()  # nobody leaves while the first process is still saving
    return outcome == "done"


def _batches(run: Run, state: State) -> Iterator[Batch]:
    return training_batches(
        run.crops,
        run.plan,
        rank=run.accelerator.process_index,
        start=(state.epochs_completed, state.steps_completed),
        epochs=run.config.optimisation.epochs,
        workers=run.workers,
        pin_memory=run.accelerator.device.type == "cuda",
    )


def _open_books(run: Run, state: State) -> Books | None:
    if not run.accelerator.is_main_process:
        return None
    run.output_dir.mkdir(parents=True, exist_ok=True)
    (run.output_dir / RESULT).unlink(missing_ok=True)  # of a run that `--resume never` replaces
    progress = Progress(
        run.output_dir,
        epochs_total=run.config.optimisation.epochs,
        images_per_epoch=run.plan.images_per_epoch,
    )
    return Books(log=Logbook(run.output_dir, state.epochs_completed), progress=progress)


def _finish_epoch(run: Run, state: State, books: Books | None, interruption: Interruption) -> bool:
    """Evaluate if it is time to, log and save. Returns False if told to stop while evaluating.

    A kill loses nothing: the log is cut back to the checkpoint on resume, so it is written first;
    the training of the epoch is saved before a long evaluation.
    """
    optimisation = run.config.optimisation
    number = state.epochs_completed + 1
    scores = None
    if number % run.config.run.eval_every == 0 or number == optimisation.epochs:
        _save(run, state)
        scores = _evaluate(run, state, books, interruption)
        if scores is None:
            return False
    record = _epoch_record(run, state)
    state.epochs_completed, state.steps_completed = number, 0
    state.loss_sum = state.seconds = state.waited_seconds = 0.0
    is_best = False
    if scores is not None:
        state.scores = scores
        is_best = state.best_mean_iou is None or scores["mean_iou"] > state.best_mean_iou
        if is_best:
            state.best_mean_iou = scores["mean_iou"]
        for name in ("pixel_accuracy", "mean_accuracy", "mean_iou"):
            record[f"val_{name}"] = scores[name]
    if books is not None:
        books.log.add_epoch(record)
    _save(run, state, best=is_best)
    return True


def _evaluate(
    run: Run, state: State, books: Books | None, interruption: Interruption
) -> dict[str, Any] | None:
    """Plain scores, None if told to stop."""
    began = time.monotonic()
    areas = evaluate_model(
        run.accelerator,
        run.model,
        run.images,
        group_size=run.config.run.eval_batch_size,
        workers=run.workers,
        watch=Watch(
            advanced=books.progress.evaluating if books else None, interruption=interruption
        ),
    )
    state.total_seconds += time.monotonic() - began
    return None if areas is None else vars(areas.scores(run.task.classes.names)).copy()


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
        "images_per_second": run.plan.images_per_epoch / state.seconds,
        "data_wait_share": state.waited_seconds / state.seconds,
        "epoch_seconds": state.seconds,
        "peak_memory_mib": peak_memory_mib(run.accelerator.device),
    }


def _save(run: Run, state: State, *, best: bool = False) -> None:
    """The first process writes checkpoint.pth, and best.pth first if this is the best."""
    if not run.accelerator.is_main_process:
        return
    path = run.output_dir / (BEST if best else CHECKPOINT)
    save_checkpoint(checkpoint_content(run, state), path)
    if best:
        also_save_as(path, run.output_dir / CHECKPOINT)


def _finish_run(run: Run, state: State) -> None:
    """Draw, and write the result last."""
    if not run.accelerator.is_main_process:
        return
    draw_predictions(run.accelerator, run.model, run.images, run.task.classes,
                     run.output_dir / PREDICTIONS)  # fmt: skip
    write_json(run.output_dir / RESULT, run_result(run, state))
