"""`evaluate`: score a checkpoint, or stored predictions, on a dataset."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.devices import make_accelerator
from common.options import OptionGroup
from common.progress import Counter
from segmenter.config import ProtocolConfig, ScoringConfig
from segmenter.data import Classes, WholeImages, read_classes
from segmenter.dataset import DatasetDescription, Pair, read_description
from segmenter.evaluate import evaluate_model, folder_at_once, score_predictions, write_prediction
from segmenter.labels import check_labels
from segmenter.loading import load_segmenter
from segmenter.metrics import Scores

MOST_CHECKED = 5000  # pairs whose labels are all looked at first


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
    checkpoint: Path,
    dataset: Path,
    *,
    changes: OptionGroup,
    devices: ScoringConfig,
    split: str,
    predictions_dir: Path | None,
) -> EvaluationResult:
    """Score a checkpoint. changes: `ProtocolChanges`, in place of the checkpoint's protocol.

    Raises ValueError for what the user can fix, before anything is written.
    """
    accelerator = make_accelerator(devices)
    loaded = load_segmenter(checkpoint)
    description, pairs = _checked_pairs(dataset, split, loaded.classes)
    if predictions_dir is not None and predictions_dir.exists() and any(predictions_dir.iterdir()):
        raise ValueError(f"--save-predictions {predictions_dir} is not empty")
    protocol = changed_protocol(loaded.protocol, changes)
    with (
        folder_at_once(predictions_dir, accelerator) as folder,
        Counter("evaluate", total=len(pairs)) as counter,
    ):

        def save(index: int, predicted: Tensor) -> None:
            assert folder is not None
            write_prediction(folder / f"{pairs[index].name}.png", predicted, description)

        def tell(done: int, total: int) -> None:
            counter.advance(done - counter.done)

        areas = evaluate_model(
            accelerator,
            loaded.model.to(accelerator.device),
            WholeImages(description, pairs, protocol),
            group_size=devices.eval_batch_size,
            workers=devices.loader_workers,
            on_prediction=save if folder else None,
            on_progress=tell if accelerator.is_main_process else None,
        )
    assert areas is not None
    return EvaluationResult(
        scores=areas.scores(loaded.classes.names),
        dataset=description.name,
        num_images=len(pairs),
        protocol=protocol,
    )


def changed_protocol(protocol: ProtocolConfig, changes: OptionGroup) -> ProtocolConfig:
    """The checkpoint's protocol, at one scale, with these values. Raises ValueError."""
    given = {name: value for name, value in vars(changes).items() if value is not None}
    return dataclasses.replace(protocol, **{"multi_scale": False, **given})


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
    check_labels(description, pairs, len(wanted), everything=len(pairs) <= MOST_CHECKED)
    return description, pairs


def evaluate_predictions(folder: Path, dataset: Path, split: str) -> EvaluationResult:
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
