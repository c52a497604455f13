"""Score a model on the test images, on one process or several, or score stored predictions."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from common.files import beside
from common.interruption import Interruption
from segmenter.data import Classes, WholeImages, test_images
from segmenter.dataset import DatasetDescription, Pair
from segmenter.inference import predict_classes
from segmenter.labels import allowed_labels, check_pair, read_label_file
from segmenter.metrics import Areas
from segmenter.model import Segmenter


def evaluate_model(
    accelerator: Accelerator,
    model: Segmenter,
    images: WholeImages,
    *,
    group_size: int,
    workers: int,
    on_prediction: Callable[[int, Tensor], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    interruption: Interruption | None = None,
) -> Areas | None:
    """Areas over all images and processes, the same on every process; None if interrupted.

    on_prediction gets (index, [H, W] uint8 classes) of every image of this process, on_progress the
    numbers of images done and in all.

    Images are scored in groups of `group_size` neighbours, and whole groups are given out: the
    arithmetic, and so the areas, are exactly the same for any number of processes.
    """
    description = images.description
    areas = Areas(model.shape.num_classes, description.ignore_index)
    groups = [
        range(first, min(first + group_size, len(images)))
        for first in range(0, len(images), group_size)
    ]
    own = groups[accelerator.process_index :: accelerator.num_processes]
    rounds = -(-len(groups) // accelerator.num_processes)
    samples = test_images(
        images, [index for group in own for index in group],
        workers=workers, pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    with evaluating(accelerator, model):
        for number in range(rounds):
            for _ in own[number : number + 1]:
                group = [next(samples) for _ in own[number]]
                predictions = predict_classes(
                    model,
                    [sample.scaled for sample in group],
                    [(sample.labels.shape[0], sample.labels.shape[1]) for sample in group],
                    images.protocol,
                    accelerator.device,
                )
                for sample, predicted in zip(group, predictions, strict=True):
                    areas.add(predicted, sample.labels.to(accelerator.device))
                    if on_prediction is not None:
                        on_prediction(sample.index, predicted.cpu())
            if on_progress is not None:
                done = min(len(images), (number + 1) * group_size * accelerator.num_processes)
                on_progress(done, len(images))
            if _told_to_stop(accelerator, interruption):
                return None
    # gloo and nccl both add float64 exactly here: areas are integers below 2^53.
    areas.total = accelerator.reduce(areas.total.to(accelerator.device), reduction="sum").cpu()
    return areas


@contextlib.contextmanager
def evaluating(accelerator: Accelerator, model: Segmenter) -> Iterator[None]:
    """Evaluation mode, no gradients, the run's precision; training mode is restored."""
    training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        yield
    model.train(training)


def _told_to_stop(accelerator: Accelerator, interruption: Interruption | None) -> bool:
    """Whether any process was: all get the same answer. All have to ask equally often."""
    if interruption is None:
        return False
    flag = torch.tensor(float(interruption.requested), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def write_prediction(path: Path, predicted: Tensor, description: DatasetDescription) -> None:
    """A PNG of classes in the numbering of the dataset's annotation files."""
    labels = predicted.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels + 1 if description.reduce_zero_label else labels).save(path)


def score_predictions(
    folder: Path, description: DatasetDescription, pairs: Sequence[Pair], classes: Classes
) -> Areas:
    """Areas of label maps that `--save-predictions` wrote, or that are annotations themselves.

    What a prediction leaves undecided (the ignored label) counts as wrong where the annotation
    has a class. Raises ValueError if a prediction is missing or does not fit.
    """
    areas = Areas(len(classes), description.ignore_index)
    allowed = allowed_labels(description, len(classes))
    for pair in pairs:
        stored = folder / f"{pair.name}.png"
        if not stored.is_file():
            stored = folder / f"{pair.name}{description.annotation_suffix}"
        check_pair(pair, allowed)
        check_pair(Pair(name=pair.name, image=pair.image, annotation=stored), allowed)
        predicted, labels = (
            reduced(read_label_file(path), description) for path in (stored, pair.annotation)
        )
        areas.add(predicted, labels)
    return areas


def reduced(labels: object, description: DatasetDescription) -> Tensor:
    """Labels of a file in the numbering of the classes."""
    tensor = torch.as_tensor(labels, dtype=torch.uint8)
    # uint8 wraps round: 0 becomes 255, which is ignored.
    return tensor - 1 if description.reduce_zero_label else tensor


@contextlib.contextmanager
def folder_at_once(path: Path | None, accelerator: Accelerator) -> Iterator[Path | None]:
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
        os.replace(unfinished, path)  # noqa: PTH105  (says that an empty folder may be there)
