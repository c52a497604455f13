"""Accuracy and intersection over union, from mmsegmentation's metric, summed up as areas.

Areas are a few integers per image and class, so that sums over processes are exact, and images
can be drawn anew afterwards, as the report does for its intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import replacing
from segmenter.classes import quiet_imports

with quiet_imports():
    from mmseg.evaluation import IoUMetric


class Areas:
    """Areas in pixels of every image, by class.

    by_image: [N, 3, K] int64: intersection, prediction, label; 0 for an image not counted.
    unreadable_images: how many could not be counted.
    """

    def __init__(self, num_images: int, num_classes: int, ignore_index: int) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.by_image = torch.zeros(num_images, 3, num_classes, dtype=torch.int64)
        self.unreadable_images = 0

    def add(self, index: int, predicted: Tensor, labels: Tensor) -> None:
        """Count an image: [H, W] predicted classes and labels, uint8, on any device."""
        intersection, _, *areas = IoUMetric.intersect_and_union(
            predicted, labels, self.num_classes, self.ignore_index
        )
        self.by_image[index] = torch.stack([intersection, *areas])

    def scores(self, names: Sequence[str]) -> dict[str, Any]:
        """What the areas amount to, by mmsegmentation's formulas, in percent, 0 to 100.

        class_iou: by name; None for a class that neither side has.
        """
        intersection, predicted, label = self.by_image.sum(0).double()
        union = predicted + label - intersection
        metrics = IoUMetric.total_area_to_metrics(intersection, union, predicted, label)
        iou = metrics["IoU"] * 100
        return {
            "pixel_accuracy": float(metrics["aAcc"]) * 100,
            "mean_accuracy": _mean(metrics["Acc"] * 100),
            "mean_iou": _mean(iou),
            "class_iou": {
                name: None if np.isnan(value) else float(value)
                for name, value in zip(names, iou, strict=True)
            },
            "unreadable_images": self.unreadable_images,
        }

    def save(self, path: Path, images: Sequence[str]) -> None:
        """An .npz file of `images`, their names, and `areas` as `by_image` has them."""
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, images=np.array(images), areas=self.by_image.numpy())


def _mean(values: np.ndarray) -> float:
    """Mean over the classes that occur; 0 if none does."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0
