"""Score a model on the test images, on one process or several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from common.interruption import Interruption
from common.samples import Unreadable
from segmenter.config import ScoringConfig
from segmenter.data import TestImage, WholeImages, test_images
from segmenter.inference import predict_classes
from segmenter.metrics import Areas
from segmenter.model import Segmenter


def evaluate_model(
    accelerator: Accelerator,
    model: Segmenter,
    images: WholeImages,
    scoring: ScoringConfig,
    *,
    on_prediction: Callable[[int, Tensor], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    interruption: Interruption | None = None,
) -> Areas | None:
    """Areas over all images and processes, the same on every process; None if interrupted.

    Images that cannot be used are named and left out; RuntimeError if they are too many.

    on_prediction gets (index, [H, W] uint8 classes) of every image of this process, on_progress the
    numbers of images done and in all.

    Images are scored in groups of `eval_batch_size` neighbours, and whole groups are given out: the
    arithmetic, and so the areas, are exactly the same for any number of processes.
    """
    device, ignored = accelerator.device, images.description.ignore_index
    areas = Areas(len(images), model.shape.num_classes, ignored, device)

    def count(usable: list[tuple[int, TestImage]]) -> None:
        shapes = [sample.labels.shape for _, sample in usable]
        scaled = [sample.scaled for _, sample in usable]
        predictions = list(predict_classes(model, scaled, shapes, images.protocol))
        for (index, sample), predicted in zip(usable, predictions, strict=True):
            areas.add(index, predicted, sample.labels.to(device, non_blocking=True))
        if on_prediction is not None and usable:
            together = torch.cat([predicted.flatten() for predicted in predictions]).cpu()
            parts = together.split([shape.numel() for shape in shapes])
            for (index, _), part, shape in zip(usable, parts, shapes, strict=True):
                on_prediction(index, part.view(shape))

    unreadable = each_group(
        accelerator, model, images, scoring, count,
        on_progress=on_progress, interruption=interruption,
    )  # fmt: skip
    if unreadable is None:
        return None
    areas.by_image = accelerator.reduce(areas.by_image, reduction="sum").cpu()
    areas.unreadable_images = unreadable
    return areas


def each_group(
    accelerator: Accelerator,
    model: Segmenter,
    images: WholeImages,
    scoring: ScoringConfig,
    work: Callable[[list[tuple[int, TestImage]]], None],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    interruption: Interruption | None = None,
) -> int | None:
    """Give `work` the usable images of each group of this process, with their indices.

    Returns how many images of all processes were not usable; None if interrupted. See above.
    """
    unreadable = Unreadable()
    size, everything = scoring.eval_batch_size, range(len(images))
    per_round, offset = size * accelerator.num_processes, size * accelerator.process_index
    # This process's group of each round: the last one may be smaller, or empty.
    rounds = [everything[first + offset :][:size] for first in everything[::per_round]]
    samples = test_images(
        images, [index for group in rounds for index in group],
        workers=scoring.loader_workers, pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    with evaluating(accelerator, model):
        for number, group in enumerate(rounds, start=1):
            loaded = [(index, next(samples)) for index in group]
            unreadable.note(sample.unreadable for _, sample in loaded if sample.unreadable)
            usable = [(index, sample) for index, sample in loaded if not sample.unreadable]
            work(usable)
            if on_progress is not None:
                on_progress(min(len(images), number * per_round), len(images))
            if interruption is not None:  # all processes ask, and get the same answer
                told = torch.tensor(float(interruption.requested), device=accelerator.device)
                if accelerator.reduce(told, reduction="sum").item():
                    return None
    skipped = torch.tensor(float(len(unreadable.texts)), device=accelerator.device)
    skipped_images = int(accelerator.reduce(skipped, reduction="sum").item())
    unreadable.check(skipped_images, len(images))
    return skipped_images


@contextlib.contextmanager
def evaluating(accelerator: Accelerator, model: Segmenter) -> Iterator[None]:
    """Evaluation mode, no gradients, the run's precision; training mode is restored."""
    training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        yield
    model.train(training)
