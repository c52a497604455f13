"""Any encoders on any datasets: a table for each measure, with the mean rank over the datasets.

A mean of mean IoUs is not given: a point of one dataset is not a point of another.
"""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from common.files import read_text
from common.step_files import RESULT
from pipeline.plan.layout import Layout, dataset_of
from pipeline.report.scores import MEASURES, Level, Line, Measure, make_lines
from pipeline.report.statistics import CONFIDENCE
from pipeline.report.tables import Table


class Benchmark(NamedTuple):
    """What one measure says of all encoders."""

    measure: Measure
    table: Table
    datasets: int


def benchmarks(all_paths: Sequence[Layout]) -> list[Benchmark]:
    """One for each measure, where there are several datasets, or nothing was pretrained."""
    folders = [f for p in all_paths for f in (*p.eval_output.glob("*/"), *p.probe_output.glob("*/"))]
    # The first dataset of a plan has the plain names.
    suffixes = sorted({dataset_of(folder.name) for folder in folders})
    by_dataset = {suffix: make_lines(all_paths, suffix) for suffix in suffixes}
    lines = [line for lines in by_dataset.values() for line in lines]
    if len(suffixes) < 2 and any(not line.is_baseline for line in lines):
        return []
    found = []
    for measure in (one for one in MEASURES.values() if one.areas):
        levels = {suffix: _levels(lines, measure) for suffix, lines in by_dataset.items()}
        levels = {suffix: level for suffix, level in levels.items() if level}
        if levels:
            found.append(Benchmark(measure, _table(levels, lines, measure), len(levels)))
    return found


def _levels(lines: Sequence[Line], measure: Measure) -> dict[str, Level]:
    """Where each line stands, after the last epochs that all methods have."""
    trained = [set(line.epochs(measure)) for line in lines if not line.is_baseline]
    epochs = max(set.intersection(*trained), default=0) if trained else 0
    scored = [
        line
        for line in lines
        if epochs in line.epochs(measure) or (line.is_baseline and line.epochs(measure))
    ]
    return {line.label: line.level(epochs, measure) for line in scored}


def _table(levels: Mapping[str, Mapping[str, Level]], lines: Sequence[Line], measure: Measure) -> Table:
    """A row for each encoder, the best by rank first."""
    facts = {line.label: _facts(line) for line in lines}
    names = {suffix: suffix or _first_name(lines) for suffix in levels}
    ranks = _mean_ranks(levels)
    labels = list(dict.fromkeys(label for level in levels.values() for label in level))
    labels.sort(key=lambda label: ranks[label][0] if label in ranks else np.inf)
    rows = []
    for label in labels:
        row = {"encoder": label}
        for suffix, level in levels.items():
            row[f"{names[suffix]}, {measure.unit}"] = _with_interval(level[label]) if label in level else ""
        if label in ranks and len(levels) > 1:
            rank, *ends = ranks[label]
            row["mean rank"] = f"{rank:.2f}" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")
        elif len(levels) > 1:
            row["mean rank"] = ""
        rows.append({**row, **facts[label]})
    return Table(rows)


def _facts(line: Line) -> dict[str, str]:
    """What an encoder costs, as its scores say: millions of weights, GFLOPs of an image."""
    told: Any = json.loads(read_text(line.scored[0].folder / RESULT)).get("encoder") if line.scored else None
    cost = told if isinstance(told, dict) else {}
    values = {
        "parameters": "million weights",
        "flops_per_image": "GFLOPs an image",
        "image_size": "at pixels",
    }
    units = {"parameters": 1e6, "flops_per_image": 1e9, "image_size": 1}
    numbers = {n: cost[n] for n in values if isinstance(cost.get(n), int | float)}
    return {title: f"{numbers[n] / units[n]:.4g}" if n in numbers else "" for n, title in values.items()}


def _first_name(lines: Sequence[Line]) -> str:
    """What the dataset with the plain names calls itself."""
    plain = (one.folder for line in lines for one in line.scored if not dataset_of(one.folder.name))
    dataset: Any = next((json.loads(read_text(folder / RESULT)).get("dataset") for folder in plain), None)
    return str(dataset["name"]) if isinstance(dataset, dict) and "name" in dataset else "dataset"


def _drawn(level: Level) -> np.ndarray | None:
    """[DRAWS]: means over seeds, had other images been drawn; None where areas were not kept."""
    drawn = [one for one in level.drawn.values() if len(one)]
    return np.mean(drawn, axis=0) if drawn and len(drawn) == len(level.scores) else None


def _with_interval(level: Level) -> str:
    """The score; its interval holds chance in the images, and between seeds where there are some."""
    drawn = _drawn(level)
    low, high = (level.spread.low, level.spread.high) if level.spread else _ends(drawn)
    return f"{level.score:.2f}" + ("" if np.isnan(low) else f" ({max(0.0, low):.2f} to {high:.2f})")


def _ends(drawn: np.ndarray | None) -> tuple[float, float]:
    if drawn is None:
        return np.nan, np.nan
    outside = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [outside, 100 - outside])
    return float(low), float(high)


def _mean_ranks(levels: Mapping[str, Mapping[str, Level]]) -> dict[str, tuple[float, ...]]:
    """Mean rank over the datasets of those that are scored on all, 1 is best; and its 95% interval.

    The images of every dataset are drawn anew, the same for all encoders, which are ranked again.
    """
    from scipy.stats import rankdata  # slow to import

    labels = [
        label for label in next(iter(levels.values())) if all(label in level for level in levels.values())
    ]
    if not labels:
        return {}
    ranks = [rankdata([-level[label].score for label in labels]) for level in levels.values()]
    means = {label: (fmean(rank[n] for rank in ranks),) for n, label in enumerate(labels)}
    drawn = [[_drawn(level[label]) for label in labels] for level in levels.values()]
    if any(one is None for several in drawn for one in several):
        return {label: tuple(mean) for label, mean in means.items()}
    # [datasets, encoders, DRAWS], ranked among the encoders.
    again = rankdata(-np.array(drawn), axis=1).mean(axis=0)
    return {label: (*means[label], *_ends(again[n])) for n, label in enumerate(labels)}
