"""`evaluate`: score a checkpoint, or stored predictions, on a dataset."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from segmenter.build import VAL
from segmenter.config import ProtocolConfig
from segmenter.data import Classes, WholeImages, default_workers, read_classes
from segmenter.dataset import DatasetDescription, Pair, read_description
from segmenter.evaluate import (
    Watch,
    evaluate_model,
    folder_at_once,
    score_predictions,
    write_prediction,
)
from segmenter.labels import check_labels
from segmenter.loading import LoadedSegmenter, load_segmenter
from segmenter.metrics import Scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Scores with what they depend on. protocol: None for stored predictions."""

    scores: Scores
    dataset: str
    num_images: int
    protocol: ProtocolConfig | None

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **vars(self.scores),
            "dataset": {"name": self.dataset, "num_images": self.num_images},
            "protocol": self.protocol.described() if self.protocol else None,
        }


def evaluate_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    dataset: Path,
    *,
    changes: dict[str, Any],
    multi_scale: bool,
    group_size: int,
    workers: int | None,
    predictions_dir: Path | None,
    split: str = VAL,
) -> EvaluationResult:
    """Score a checkpoint. changes: values of the protocol other than the checkpoint's.

    Raises ValueError for what the user can fix, before anything is written.
    """
    loaded = load_segmenter(checkpoint)
    description, pairs = _checked_pairs(dataset, split, loaded.classes)
    if predictions_dir is not None and predictions_dir.exists() and any(predictions_dir.iterdir()):
        raise ValueError(f"--save-predictions {predictions_dir} is not empty")
    protocol = changed_protocol(loaded.protocol, changes, multi_scale)
    model = loaded.model.to(accelerator.device)
    if workers is None:
        workers = default_workers()
    with folder_at_once(predictions_dir, accelerator) as folder:

        def save(index: int, predicted: torch.Tensor) -> None:
            assert folder is not None
            write_prediction(folder / f"{pairs[index].name}.png", predicted, description)

        areas = evaluate_model(
            accelerator,
            model,
            WholeImages(description, pairs, protocol),
            group_size=group_size,
            workers=workers,
            watch=Watch(predicted=save if folder else None, advanced=_log_progress),
        )
    assert areas is not None
    return EvaluationResult(
        scores=areas.scores(loaded.classes.names),
        dataset=description.name,
        num_images=len(pairs),
        protocol=protocol,
    )


def evaluate_predictions(folder: Path, dataset: Path, split: str = VAL) -> EvaluationResult:
    """Score label maps in the numbering of the dataset's annotations. Raises ValueError."""
    if not folder.is_dir():
        raise ValueError(f"--predictions {folder} is not a folder")
    description = read_description(dataset)
    classes = read_classes(description)
    pairs = description.pairs(split)
    areas = score_predictions(folder, description, pairs, classes)
    return EvaluationResult(
        scores=areas.scores(classes.names),
        dataset=description.name,
        num_images=len(pairs),
        protocol=None,
    )


def changed_protocol(
    protocol: ProtocolConfig, changes: dict[str, Any], multi_scale: bool
) -> ProtocolConfig:
    """The checkpoint's protocol with other sizes. Raises ValueError if they do not fit."""
    protocol = dataclasses.replace(protocol, scales=(1.0,), flip=False, **changes)
    return protocol.multi_scale() if multi_scale else protocol


def _checked_pairs(
    dataset: Path, split: str, classes: Classes
) -> tuple[DatasetDescription, list[Pair]]:
    """The pairs to score. Raises ValueError if the model has other classes than the dataset."""
    description = read_description(dataset)
    wanted = read_classes(description)
    if len(wanted) != len(classes):
        raise ValueError(
            f"the checkpoint has {len(classes)} classes ({classes.names[0]}, ...), the dataset "
            f"{description.name} has {len(wanted)} ({wanted.names[0]}, ...)"
        )
    pairs = description.pairs(split)
    check_labels(description, pairs, len(wanted), everything=len(pairs) <= 5000)
    return description, pairs


def _log_progress(done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) < 1:
        logger.info("evaluated %d of %d images", done, total)


__all__ = ["EvaluationResult", "LoadedSegmenter", "evaluate_checkpoint", "evaluate_predictions"]
