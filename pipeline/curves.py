"""What the report compares: evaluations put together into lines, and their scores by class."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.layout import BASELINES, Layout, Run
from pipeline.parts import ask_facts
from pipeline.records import made_alike, read_all_records
from pipeline.results import Evaluation, coverage_of, method_rank, read_evaluations, run_label

REFERENCE = "patches"  # plain MAE, what the others are compared with
_LEAST_CHANGE = 0.05  # in points; less is shown as 0.0
_MOST_CLASSES = 8  # shown for each method: those with the largest change


@dataclass(kw_only=True)
class Line:
    """What the charts show as one line: a method, and its ratio, over seeds and epochs."""

    label: str
    method: str
    style: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    pretrainings: list[Path] = field(default_factory=list)
    """Their folders; an evaluation may have outlived its pretraining, or not have begun."""

    @property
    def is_baseline(self) -> bool:
        """Whether nothing was pretrained here."""
        return self.method in BASELINES

    def scores(self, epochs: int) -> list[float]:
        """Mean IoU after `epochs`, in percent: one for each seed of pretraining.

        Several finetunings of one pretraining count as their mean, and so does a seed that is in
        several directories: neither tells how much chance there is in pretraining.
        """
        by_seed: dict[int, list[float]] = {}
        for evaluation in self.evaluations:
            score = evaluation.result.get("mean_iou")
            if evaluation.epochs == epochs and score is not None:
                by_seed.setdefault(evaluation.seed, []).append(score)
        return [fmean(scores) for scores in by_seed.values()]

    @property
    def epochs(self) -> list[int]:
        """Where it was evaluated, ascending."""
        return sorted({evaluation.epochs for evaluation in self.evaluations})


def last_common_epochs(lines: Sequence[Line]) -> int | None:
    """The last epochs after which all methods were evaluated, None if there are none."""
    evaluated = [set(line.epochs) for line in lines if not line.is_baseline]
    return max(set.intersection(*evaluated), default=None) if evaluated else None


def make_lines(all_paths: Sequence[Layout]) -> list[Line]:
    """All runs sorted into lines; baselines come first.

    Directories whose settings differ have lines of their own, which bear the directory's name.
    """
    apart = len(all_paths) > 1 and not made_alike(all_paths, ask_facts())
    lines: dict[str, Line] = {}
    for paths in all_paths:
        suffix = f" ({paths.root.name})" if apart else ""
        for evaluation in read_evaluations(paths):
            label = evaluation.label + suffix
            line = lines.setdefault(label, Line(label=label, method=evaluation.method))
            line.evaluations.append(evaluation)
        records = read_all_records(paths)
        for folder in sorted(paths.pretrain_output.glob("*/")):
            with contextlib.suppress(ValueError):  # not a run's name
                method = Run.parse(folder.name).method
                label = run_label(method, coverage_of(folder.name, records)) + suffix
                line = lines.setdefault(label, Line(label=label, method=method))
                line.pretrainings.append(folder)
    rank = method_rank(all_paths)
    ordered = sorted(lines.values(), key=lambda line: rank(line.method))
    for style, line in enumerate(ordered):
        line.style = style
    return ordered


def class_breakdown(lines: Sequence[Line]) -> dict[str, Any] | None:
    """IoU class by class, at the last epoch at which all methods were evaluated."""
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
    return {name: fmean(values) if values else None for name, values in found.items()}


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
