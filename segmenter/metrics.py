"""Accuracy and intersection over union, from mmsegmentation's metric, summed up as areas.

Areas need a few numbers per class whatever the size of the dataset, and are integers, so that
sums over processes are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segmenter.classes import quiet_imports

with quiet_imports():
    from mmseg.evaluation import IoUMetric


class Areas:
    """Intersection, union, prediction and label areas in pixels, by class: [4, K] float64.

    unreadable_images: how many could not be counted.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.total = torch.zeros(4, num_classes, dtype=torch.float64)
        self.unreadable_images = 0

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Count one image: [H, W] predicted classes and labels, uint8, on any device."""
        areas = IoUMetric.intersect_and_union(
            predicted, labels, self.num_classes, self.ignore_index
        )
        self.total += torch.stack(areas).double()

    def scores(self, names: Sequence[str]) -> dict[str, Any]:
        """What the areas amount to, by mmsegmentation's formulas, in percent, 0 to 100.

        class_iou: by name; None for a class that neither side has.
        """
        metrics = IoUMetric.total_area_to_metrics(*self.total)
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


def _mean(values: np.ndarray) -> float:
    """Mean over the classes that occur; 0 if none does."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0
