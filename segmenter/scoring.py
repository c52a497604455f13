"""`evaluate`: score a checkpoint, or stored predictions, on a dataset."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from common.files import NOTHING_WRITTEN, beside, check_output_folder
from common.options import OptionGroup
from common.progress import Counter
from engine.devices import make_accelerator
from segmenter.classes import Classes, read_classes
from segmenter.config import EvaluateConfig, ProtocolConfig, ScoringConfig
from segmenter.data import WholeImages
from segmenter.dataset import DatasetDescription, Pair, read_description
from segmenter.evaluate import evaluate_model
from segmenter.labels import check_labels, read_label_file
from segmenter.loading import load_segmenter
from segmenter.metrics import Areas

MOST_CHECKED = 5000  # pairs that are looked at first


def evaluate_checkpoint(
    checkpoint: Path, evaluation: EvaluateConfig, changes: OptionGroup, devices: ScoringConfig
) -> dict[str, Any]:
    """Scores of a checkpoint, with what they depend on, in plain values.

    changes: `ProtocolChanges`, in place of the checkpoint's protocol. Raises ValueError for what
    the user can fix, before anything is written.
    """
    description = read_description(evaluation.dataset)
    pairs = description.pairs(evaluation.split)
    accelerator, loaded = make_accelerator(devices), load_segmenter(checkpoint)
    _check_classes(loaded.classes, read_classes(description), description.name)
    check_labels(description, pairs, most=MOST_CHECKED, forgiving=True)
    wanted_dir = evaluation.save_predictions
    if wanted_dir is not None:
        check_output_folder(wanted_dir, "--save-predictions", reads=description.reads)
        if wanted_dir.is_symlink():
            raise ValueError(f"--save-predictions {wanted_dir} is a link; {NOTHING_WRITTEN}")
        if wanted_dir.exists() and any(wanted_dir.iterdir()):
            raise ValueError(f"--save-predictions {wanted_dir} is not empty; {NOTHING_WRITTEN}")
    protocol = changed_protocol(loaded.protocol, changes)
    counter = Counter("evaluate", total=len(pairs))
    with _folder_at_once(wanted_dir, accelerator) as folder, counter:

        def save(index: int, predicted: Tensor) -> None:
            assert folder is not None
            path, labels = folder / f"{pairs[index].name}.png", predicted.numpy()
            path.parent.mkdir(parents=True, exist_ok=True)
            # In the numbering of the dataset's annotation files.
            Image.fromarray(labels + 1 if description.reduce_zero_label else labels).save(path)

        areas = evaluate_model(
            accelerator,
            loaded.model.to(accelerator.device),
            WholeImages(description, pairs, protocol),
            devices,
            on_prediction=save if folder else None,
            on_progress=counter.reach if accelerator.is_main_process else None,
        )
    assert areas is not None
    return _result(areas, loaded.classes, description, pairs, protocol)


def changed_protocol(protocol: ProtocolConfig, changes: OptionGroup) -> ProtocolConfig:
    """The checkpoint's protocol, at one scale, with these values. Raises ValueError."""
    given = {name: value for name, value in vars(changes).items() if value is not None}
    return dataclasses.replace(protocol, **{"multi_scale": False, **given})


def evaluate_predictions(folder: Path, evaluation: EvaluateConfig) -> dict[str, Any]:
    """Scores of label maps that `--save-predictions` wrote, or that are annotations themselves.

    What a prediction leaves undecided (the ignored label) counts as wrong where the annotation
    has a class. Raises ValueError if a prediction is missing or does not fit.
    """
    if not folder.is_dir():
        raise ValueError(f"--predictions {folder} is not a folder")
    description = read_description(evaluation.dataset)
    classes, pairs = read_classes(description), description.pairs(evaluation.split)
    areas = Areas(len(pairs), len(classes), description.ignore_index)
    stored = []
    for pair in pairs:
        path = folder / f"{pair.name}.png"
        if not path.is_file():
            path = folder / f"{pair.name}{description.annotation_suffix}"
        stored.append(dataclasses.replace(pair, annotation=path))
    check_labels(description, [*pairs, *stored])
    for index, both in enumerate(zip(stored, pairs, strict=True)):
        predicted, labels = (_classes_of(pair.annotation, description) for pair in both)
        areas.add(index, predicted, labels)
    return _result(areas, classes, description, pairs, None)


def _result(
    areas: Areas,
    classes: Classes,
    description: DatasetDescription,
    pairs: Sequence[Pair],
    protocol: ProtocolConfig | None,
) -> dict[str, Any]:
    """protocol: None for stored predictions."""
    return {
        **areas.scores(classes.names),
        "dataset": {"name": description.name, "num_images": len(pairs)},
        "protocol": protocol.described() if protocol else None,
    }


def _check_classes(own: Classes, wanted: Classes, dataset: str) -> None:
    if len(wanted) != len(own):
        raise ValueError(
            f"the checkpoint has {len(own)} classes ({own.names[0]}, ...), the dataset "
            f"{dataset} has {len(wanted)} ({wanted.names[0]}, ...)"
        )


def _classes_of(path: Path, description: DatasetDescription) -> Tensor:
    """[H, W] uint8 labels of a file in the numbering of the classes."""
    labels = torch.as_tensor(read_label_file(path))
    # uint8 wraps round: 0 becomes 255, which is ignored.
    return labels - 1 if description.reduce_zero_label else labels


@contextlib.contextmanager
def _folder_at_once(path: Path | None, accelerator: Accelerator) -> Iterator[Path | None]:
    """A folder to write to that gets the name `path` only when everything is in it."""
    if path is None:
        yield None
        return
    unfinished = beside(path)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.replace(path)  # an empty folder may be there
