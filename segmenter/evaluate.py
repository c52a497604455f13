"""Score a model on the test images, on one process or several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from common.interruption import Interruption
from segmenter.data import WholeImages, test_images
from segmenter.inference import predict_classes
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
