"""The tables: results.csv, the scores on a terminal, and those of the page in words and numbers."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from common.console import aligned
from common.files import write_text
from pipeline.plan.layout import Layout, ratio_text
from pipeline.plan.records import read_all_records
from pipeline.report.scores import (
    COSTS,
    REFERENCE,
    Evaluation,
    Line,
    last_common_epochs,
    read_evaluations,
    read_run_yml,
)

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "best_mean_iou")
# Equal runs differ in the minutes and device-hours only.
COLUMNS = (
    *("method", "coverage_ratio", "segments_from", "seed", "eval_seed", "epochs"),
    *(*SCORES, "minutes", "device_hours", "train_flops"),
)
COST_TITLES = dict(zip(COSTS, ("device-hours", "train FLOPs"), strict=True))
_WIDEST = 110  # characters of a table on a terminal
_LEAST_CHANGE = 0.05  # in points; less is shown as 0.0
_MOST_CLASSES = 8  # shown for each method: those with the largest change


@dataclass(frozen=True, kw_only=True)
class Table:
    """What the page lays out: text by row and column, under titles."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    looks: Mapping[int, str] = field(default_factory=dict)  # number of a row -> its class in CSS


def write_results_csv(paths: Layout) -> list[Evaluation]:
    """Writes results.csv anew from the evaluations there are, and returns them."""
    evaluations = read_evaluations(paths)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_csv_row(evaluation) for evaluation in evaluations)
    write_text(paths.results_csv, stream.getvalue())
    return evaluations


def _csv_row(evaluation: Evaluation) -> dict[str, str]:
    scores = {name: evaluation.result.get(name) for name in SCORES}
    method, ratio, segments_from = evaluation.variant
    return {
        "method": method,
        "coverage_ratio": "" if ratio is None else ratio_text(ratio),
        "segments_from": segments_from,
        **{name: str(getattr(evaluation, name)) for name in ("seed", "eval_seed", "epochs")},
        **{name: "" if score is None else f"{score:.4f}" for name, score in scores.items()},
        "minutes": f"{evaluation.minutes:.2f}",
        "device_hours": "" if (hours := evaluation.device_hours) is None else f"{hours:.4f}",
        "train_flops": "" if (flops := evaluation.train_flops) is None else f"{flops:.6g}",
    }


def terminal_table(evaluations: Sequence[Evaluation]) -> str:
    """The scores as aligned text, a line per evaluation; with the cost where it fits."""
    found = score_table([(evaluation.variant.label, evaluation) for evaluation in evaluations])
    rows = [found.columns, *found.rows]
    text = aligned(rows, right=range(1, len(found.columns)))
    if len(text.split("\n")[0]) > _WIDEST:
        rows = [row[: found.columns.index("minutes") + 1] for row in rows]
        text = aligned(rows, right=range(1, len(rows[0])))
    return text


def score_table(labelled: Sequence[tuple[str, Evaluation]]) -> Table:
    """The cells of each evaluation, whose label comes first; the best by mean IoU stands out."""
    # A column that says the same in every row is left out.
    seeds = [n for n in ("seed", "eval_seed") if len({getattr(e, n) for _, e in labelled}) > 1]
    cost = [n for n in COSTS if any(getattr(e, n) is not None for _, e in labelled)]
    rows = []
    for label, evaluation in labelled:
        row = _csv_row(evaluation)
        scores = [f"{float(row[name]):.2f}" if row[name] else "" for name in SCORES[:3]]
        spent = [cost_text(name, getattr(evaluation, name)) for name in cost]
        minutes = f"{evaluation.minutes:.1f}"
        rows.append([label, *(row[n] for n in seeds), row["epochs"], *scores, minutes, *spent])
    miou = [evaluation.result.get("mean_iou") or 0 for _, evaluation in labelled]
    return Table(
        columns=[
            *("method", *(name.replace("_", " ") for name in seeds), "epochs"),
            *("pixel accuracy", "mean accuracy", "mean IoU", "minutes"),
            *(COST_TITLES[name] for name in cost),
        ],
        rows=rows,
        looks={index: "best" for index, score in enumerate(miou) if score == max(miou)},
    )


def cost_text(name: str, value: float | None) -> str:
    """A cost by its column's name, for people."""
    if value is None:
        return ""
    if name == "train_flops":
        return f"{value:.2e}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


@dataclass(frozen=True)
class ClassTables:
    """IoU class by class."""

    caption: str
    changes: Mapping[str, Table]  # against plain MAE, by the line's label
    all: Table


def class_tables(lines: Sequence[Line]) -> ClassTables | None:
    """At the last epochs after which all methods were finetuned; None if there are none."""
    lines = [line for line in lines if line.evaluations]
    trained, epochs = [line for line in lines if not line.is_baseline], last_common_epochs(lines)
    if epochs is None:
        return None
    iou = {line.label: _class_iou(line, epochs) for line in trained}
    reference = next((line.label for line in trained if line.method == REFERENCE), "")
    others = [label for label in iou if label != reference] if reference else []
    caption = f"IoU in percent after {epochs} epochs of pretraining."
    if others:
        caption += f" First the classes that change most against {reference}."
    names = dict.fromkeys(name for values in iou.values() for name in values)
    rows = [
        [name, *(_shown(values.get(name, math.nan)) for values in iou.values())] for name in names
    ]
    changes = {label: _changes(label, iou[label], reference, iou[reference]) for label in others}
    return ClassTables(caption, changes, Table(columns=["class", *iou], rows=rows))


def _class_iou(line: Line, epochs: int) -> dict[str, float]:
    """Class -> mean IoU over seeds in percent; NaN for a class that did not occur."""
    found: dict[str, list[float]] = {}
    for evaluation in line.evaluations:
        if evaluation.epochs == epochs:
            for name, value in (evaluation.result.get("class_iou") or {}).items():
                found.setdefault(name, []).extend([] if value is None else [value])
    return {name: fmean(values) if values else math.nan for name, values in found.items()}


def _changes(
    label: str, values: Mapping[str, float], reference: str, before: Mapping[str, float]
) -> Table:
    """The largest changes, gains first."""
    changes = {name: values[name] - before.get(name, math.nan) for name in values}
    seen = [name for name in changes if abs(changes[name]) >= _LEAST_CHANGE]
    largest = sorted(seen, key=lambda name: -abs(changes[name]))[:_MOST_CLASSES]
    names = sorted(largest, key=lambda name: -changes[name])
    return Table(
        columns=["class", reference, label, "change"],
        rows=[[n, _shown(before[n]), _shown(values[n]), f"{changes[n]:+.1f}"] for n in names],
        looks={i: "gain" if changes[name] >= 0 else "loss" for i, name in enumerate(names)},
    )


def _shown(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


def provenance(all_paths: Sequence[Layout]) -> tuple[dict[str, list[tuple[str, str]]], Table]:
    """What the numbers came from: pairs of name and value by title; apart, settings that differ."""
    run_ymls = [read_run_yml(paths) for paths in all_paths]
    flat = [dict(flatten(run_yml.get("settings", {}))) for run_yml in run_ymls]
    names = dict.fromkeys(name for settings in flat for name in settings)
    values = {name: [settings.get(name, "not given") for settings in flat] for name in names}
    common = [(name, texts[0]) for name, texts in values.items() if len(set(texts)) == 1]
    differing = [[name, *texts] for name, texts in values.items() if len(set(texts)) > 1]
    pairs = {"Common settings" if len(flat) > 1 else "Settings": common}
    for part in ("versions", "hardware"):
        found = (pair for run_yml in run_ymls for pair in flatten(run_yml.get(part, {})))
        pairs[part.capitalize()] = joined(found)
    pairs["Time spent"] = _time_spent(all_paths)
    columns = ["setting", *(paths.root.name for paths in all_paths)]
    shown = {title: rows for title, rows in pairs.items() if rows}
    return shown, Table(columns=columns, rows=differing)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as "group: name" and text; what was not given is left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}: {key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(str(item) for item in value) or "none"
    elif value is not None:
        yield prefix, str(value)


def joined(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """One pair for each name, with all the different texts that go with it."""
    texts: dict[str, dict[str, None]] = {}
    for name, text in pairs:
        texts.setdefault(name, {})[text] = None
    return [(name, ", ".join(different)) for name, different in texts.items()]


def _time_spent(all_paths: Sequence[Layout]) -> list[tuple[str, str]]:
    """Hours by kind of step, from the records: finished attempts, interrupted ones included."""
    hours: dict[str, tuple[float, float]] = {}
    for record in (record for paths in all_paths for record in read_all_records(paths)):
        wall, device = hours.get(record.kind, (0.0, 0.0))
        spent = record.seconds / 3600
        hours[record.kind] = (wall + spent, device + spent * record.devices)
    rows = [
        (f"{kind}, hours (times devices)", f"{wall:.2f} ({device:.2f})")
        for kind, (wall, device) in hours.items()
    ]
    total = sum(device for _, device in hours.values())
    return [*rows, ("total device-hours (GPUs, or the CPU as one)", f"{total:.2f}")]
