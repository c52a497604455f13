"""What the report compares: evaluations put together into lines, and their scores by class."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.plan.layout import BASELINES, Layout, RunId
from pipeline.plan.records import made_alike, read_all_records
from pipeline.report.charts import COLORS
from pipeline.report.results import (
    FINETUNING,
    Evaluation,
    Measure,
    coverage_of,
    method_rank,
    read_evaluations,
    read_probes,
    run_label,
)
from pipeline.report.statistics import Estimate, estimate

if TYPE_CHECKING:
    import numpy as np

REFERENCE = "patches"  # plain MAE, what the others are compared with
_LEAST_CHANGE = 0.05  # in points; less is shown as 0.0
_MOST_CLASSES = 8  # shown for each method: those with the largest change


@dataclass(kw_only=True)
class Line:
    """What the charts show as one line: a method, and its ratio, over seeds and epochs."""

    label: str
    family: str
    """The label of the line that hides the images' own segments."""
    method: str
    style: int = 0
    scored: list[Evaluation] = field(default_factory=list)
    """By any measure."""
    pretrainings: list[Path] = field(default_factory=list)
    """Their folders; an evaluation may have outlived its pretraining, or not have begun."""

    @property
    def is_baseline(self) -> bool:
        """Whether nothing was pretrained here."""
        return self.method in BASELINES

    @property
    def evaluations(self) -> list[Evaluation]:
        """The complete finetunings."""
        return [one for one in self.scored if one.measure is FINETUNING]

    def epochs(self, measure: Measure = FINETUNING) -> list[int]:
        """Where it was scored, ascending."""
        known = (e for e in self.scored if e.measure is measure and e.score is not None)
        return sorted({e.epochs for e in known})

    def by_seed(self, epochs: int, measure: Measure = FINETUNING) -> dict[int, list[Evaluation]]:
        """What was scored after `epochs` (of a baseline, any), by the seed of pretraining."""
        found: dict[int, list[Evaluation]] = {}
        epochs = 0 if self.is_baseline else epochs  # of which there are none
        for one in self.scored:
            if one.measure is measure and one.epochs == epochs and one.score is not None:
                found.setdefault(one.seed, []).append(one)
        return found

    def scores(self, epochs: int, measure: Measure = FINETUNING) -> dict[int, float]:
        """Seed of pretraining -> score after `epochs`.

        Several finetunings of one pretraining count as their mean, and so does a seed that is in
        several directories: neither tells how much chance there is in pretraining.
        """
        found = self.by_seed(epochs, measure)
        return {seed: fmean(one.result[measure.key] for one in found[seed]) for seed in found}

    def drawn(self, epochs: int, measure: Measure) -> dict[int, np.ndarray] | None:
        """The same on other images; None where an earlier version did not keep the areas."""
        found = {}
        for seed, several in self.by_seed(epochs, measure).items():
            known = [one.drawn for one in several if one.drawn is not None]
            if len(known) < len(several):
                return None
            found[seed] = sum(known[1:], known[0]) / len(known)
        return found

    def estimate(self, epochs: int, measure: Measure = FINETUNING) -> Estimate | None:
        """The mean over seeds; None where nothing gives it an interval."""
        drawn = self.drawn(epochs, measure)
        scores = list(self.scores(epochs, measure).values())
        return estimate(scores, None if drawn is None else list(drawn.values()))

    def cost(self, epochs: int, name: str) -> float | None:
        """Mean device_hours or train_flops of its pretrainings up to here; None if not known."""
        found = [getattr(one, name) for one in self.scored if one.epochs == epochs]
        known = [cost for cost in found if cost is not None]
        return fmean(known) if known else None


def last_common_epochs(lines: Sequence[Line], measure: Measure = FINETUNING) -> int | None:
    """The last epochs after which all methods were scored, None if there are none."""
    scored = [set(line.epochs(measure)) for line in lines if not line.is_baseline]
    return max(set.intersection(*scored), default=None) if scored else None


def make_lines(all_paths: Sequence[Layout]) -> list[Line]:
    """All runs sorted into lines; baselines come first.

    Directories whose settings differ have lines of their own, which bear the directory's name.
    """
    apart = len(all_paths) > 1 and not made_alike(all_paths)
    lines: dict[str, Line] = {}

    def line_of(paths: Layout, method: str, ratio: float | None, segments_from: str) -> Line:
        suffix = f" ({paths.root.name})" if apart else ""
        label = run_label(method, ratio, segments_from) + suffix
        new = Line(label=label, family=run_label(method, ratio) + suffix, method=method)
        return lines.setdefault(label, new)

    for paths in all_paths:
        for one in [*read_evaluations(paths), *read_probes(paths)]:
            line = line_of(paths, one.method, one.coverage_ratio, one.segments_from)
            line.scored.append(one)
        records = read_all_records(paths)
        for folder in sorted(paths.pretrain_output.glob("*/")):
            with contextlib.suppress(ValueError):  # not a run's name
                run = RunId.parse(folder.name)
                ratio = coverage_of(folder.name, records)
                line_of(paths, run.method, ratio, run.segments_from).pretrainings.append(folder)
    rank = method_rank(all_paths)
    ordered = sorted(lines.values(), key=lambda line: rank(line.method))
    families: dict[str, list[Line]] = {}
    for line in ordered:
        families.setdefault(line.family, []).append(line)
    for color, family in enumerate(families.values()):
        for variant, line in enumerate(family):
            line.style = color + COLORS * variant
    return ordered


def class_breakdown(lines: Sequence[Line]) -> dict[str, Any] | None:
    """IoU class by class, at the last epoch at which all methods were evaluated."""
    lines = [line for line in lines if line.evaluations]
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
