"""Accuracy and intersection over union, from mmsegmentation's metric, summed up as areas.

Areas are a few integers per image and class, so that sums over processes are exact, and images
can be drawn anew afterwards, as the report does for its intervals.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import replacing
from segmenter.dataset import quiet_imports

with quiet_imports():
    from mmseg.evaluation import IoUMetric


class Areas:
    """Areas in pixels of every image, by class, on a device; of N images and K classes."""

    def __init__(self, images: int, classes: int, ignore_index: int, device: Any = None) -> None:
        self.num_classes, self.ignore_index = classes, ignore_index
        # [N, 3, K]: intersection, prediction, label; 0 for an image that was not counted.
        self.by_image = torch.zeros(images, 3, classes, dtype=torch.int64, device=device)
        self.unreadable_images = 0

    def add(self, index: int, predicted: Tensor, labels: Tensor) -> None:
        """Count an image: [H, W] predicted classes and labels, uint8, on the device."""
        # As IoUMetric.intersect_and_union does, which picks the pixels that count and so waits for
        # the device several times. K itself stands for what is no class: the last row and column.
        classes, valid = self.num_classes, labels != self.ignore_index
        rows = torch.where(valid, labels.long(), classes)
        pairs = (rows * (classes + 1) + predicted.clamp(max=classes)).flatten()
        counts = self.by_image.new_zeros((classes + 1) ** 2)
        counts.scatter_add_(0, pairs, torch.ones_like(pairs))
        confusion = counts.view(classes + 1, -1)[:classes]  # [K, K + 1], label by prediction
        areas = [confusion.diagonal(), confusion.sum(0)[:classes], confusion.sum(1)]
        self.by_image[index] = torch.stack(areas)

    def scores(self, names: Sequence[str]) -> dict[str, Any]:
        """What the areas amount to, by mmsegmentation's formulas, in percent, 0 to 100.

        Raises RuntimeError if there are none.
        """
        intersection, predicted, label = self.by_image.sum(0).double()  # each [K]
        if not label.sum():  # of the few images there are, some could not be read
            raise RuntimeError("nothing to score: no pixel of the images has a label that counts")
        union = predicted + label - intersection
        metrics = IoUMetric.total_area_to_metrics(intersection, union, predicted, label)
        iou = metrics["IoU"] * 100
        # None for a class that neither side has.
        known = [None if np.isnan(value) else float(value) for value in iou]
        return {
            "pixel_accuracy": float(metrics["aAcc"]) * 100,
            "mean_accuracy": _mean(metrics["Acc"] * 100), "mean_iou": _mean(iou),
            "class_iou": dict(zip(names, known, strict=True)),
            "unreadable_images": self.unreadable_images,
        }  # fmt: skip

    def save(self, path: Path, images: Sequence[str]) -> None:
        """An .npz file of `images`, their names, and `areas` as `by_image` has them."""
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, images=np.array(images), areas=self.by_image.numpy())


def _mean(values: np.ndarray) -> float:
    """Mean over the classes that occur."""
    return float(values[~np.isnan(values)].mean())
