"""IoU class by class: what each method gains and loses against plain MAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from pipeline.curves import REFERENCE, Line, last_common_epochs

_LEAST_CHANGE = 0.05  # in points; less is shown as 0.0
_MOST_CLASSES = 8  # shown for each method: those with the largest change


def class_breakdown(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Tables for the report, at the last epoch at which all methods were evaluated."""
    trained, epochs = [line for line in lines if not line.is_baseline], last_common_epochs(lines)
    if epochs is None:
        return None
    iou = {line.label: _class_iou(line, epochs) for line in trained}
    reference = next((line.label for line in trained if line.method == REFERENCE), None)
    others = [line.label for line in trained if line.label != reference] if reference else []
    names = list(dict.fromkeys(name for values in iou.values() for name in values))
    caption = f"IoU in percent after {epochs} epochs of pretraining."
    if others:
        caption += f" First the classes that change most against {reference}."
    return {
        "caption": caption,
        "reference": reference,
        "changes": [
            {"label": label, "rows": _changes(iou[label], iou[str(reference)])} for label in others
        ],
        "names": list(iou),
        "all": [
            {"name": name, "cells": [_shown(values.get(name)) for values in iou.values()]}
            for name in names
        ],
    }


def _class_iou(line: Line, epochs: int) -> dict[str, float | None]:
    """Class -> mean IoU over seeds in percent; None for a class that did not occur."""
    found: dict[str, list[float]] = {}
    for evaluation in line.evaluations:
        if evaluation.epochs == epochs:
            for name, value in (evaluation.result.get("class_iou") or {}).items():
                found.setdefault(name, []).extend([] if value is None else [value])
    return {name: mean(values) if values else None for name, values in found.items()}


def _changes(
    values: Mapping[str, float | None], reference: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """The largest changes, gains first."""
    changes = {
        name: value - before
        for name, value in values.items()
        if value is not None and (before := reference.get(name)) is not None
    }
    seen = [name for name in changes if abs(changes[name]) >= _LEAST_CHANGE]
    largest = sorted(seen, key=lambda name: -abs(changes[name]))[:_MOST_CLASSES]
    return [
        {
            "name": name,
            "reference": _shown(reference[name]),
            "value": _shown(values[name]),
            "change": changes[name],
        }
        for name in sorted(largest, key=lambda name: -changes[name])
    ]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
