"""The tables: results.csv, the scores on a terminal, and those of the page in words and numbers."""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from common.console import aligned
from common.files import write_text
from pipeline.plan.layout import Layout, ratio_text
from pipeline.plan.records import read_all_records
from pipeline.report import scores
from pipeline.report.scores import COSTS, REFERENCE, Evaluation, Line

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "best_mean_iou")
# Of results.csv, with their forms. Equal runs differ in the minutes and device-hours only.
COLUMNS = {
    "method": "", "coverage_ratio": "", "segments_from": "", "seed": "", "eval_seed": "",
    "epochs": "", **dict.fromkeys(SCORES, ".4f"), "minutes": ".2f", "device_hours": ".4f",
    "train_flops": ".6g", "device_hours_with_segments": ".4f",
}  # fmt: skip
_WIDEST = 110  # characters of a table on a terminal
_LEAST_CHANGE = 0.05  # in points; less is shown as 0.0
_MOST_CLASSES = 8  # shown for each method: those with the largest change


class Table(NamedTuple):
    """What the page lays out."""

    # Title of the column -> text, or ends and middle of a bar; the same titles in each.
    rows: Sequence[Mapping[str, Any]]
    looks: Sequence[str] = ()  # of each row: its class in CSS


def write_results_csv(paths: Layout) -> None:
    """Writes results.csv anew from the evaluations there are."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_csv_row(evaluation) for evaluation in scores.read_evaluations(paths))
    write_text(paths.results_csv, stream.getvalue())


def _csv_row(evaluation: Evaluation) -> dict[str, str]:
    known = evaluation.result | vars(evaluation) | vars(evaluation.run) | evaluation.costs
    if (ratio := evaluation.run.coverage_ratio) is not None:
        known["coverage_ratio"] = ratio_text(ratio)
    known = {name: value for name, value in known.items() if value is not None}
    return {n: f"{known[n]:{form}}" if n in known else "" for n, form in COLUMNS.items()}


def terminal_table(evaluations: Sequence[Evaluation]) -> str:
    """The scores as aligned text, a line per evaluation; with the cost where it fits."""
    rows = score_table([(evaluation.run.label, evaluation) for evaluation in evaluations]).rows
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    for most in range(len(cells[0]), 0, -1):  # costs come last
        text = aligned([row[:most] for row in cells], right=range(1, most))
        if len(text.split("\n")[0]) <= _WIDEST:
            break
    return text


def aligned_table(table: Table) -> str:
    """A table as aligned text."""
    cells = [list(table.rows[0]), *(list(row.values()) for row in table.rows)]
    return aligned(cells, right=range(1, len(cells[0])))


def score_table(labelled: Sequence[tuple[str, Evaluation]]) -> Table:
    """The cells of each evaluation, whose label comes first; the best by mean IoU stands out."""
    titles = {name: name.replace("_", " ").replace("iou", "IoU") for name in SCORES[:3]}
    rows = [
        {"method": label, "seed": str(one.run.seed), "eval seed": str(one.eval_seed),
         "epochs": str(one.epochs),
         **{title: f"{one.result[name]:.2f}" for name, title in titles.items()},
         "minutes": f"{one.minutes:.1f}", **cost_cells(one.costs)}
        for label, one in labelled
    ]  # fmt: skip
    # Seeds that are the same in every row are left out, and costs of which nothing is known.
    idle = [name for name in ("seed", "eval seed") if len({row[name] for row in rows}) < 2]
    idle += [name for name in COSTS.values() if not any(row[name] for row in rows)]
    rows = [{name: row[name] for name in row if name not in idle} for row in rows]
    miou = [one.result["mean_iou"] for _, one in labelled]
    return Table(rows, ["best" if score == max(miou) else "" for score in miou])


def cost_cells(costs: Mapping[str, float | None]) -> dict[str, str]:
    """What a pretraining has cost, for people; nothing where that is not known."""
    cells = {}
    for name, value in costs.items():
        form = ".2e" if name == "train_flops" else ".3g" if (value or 0) < 1000 else ".0f"
        cells[COSTS[name]] = "" if value is None else f"{value:{form}}"
    return cells


def class_tables(lines: Sequence[Line]) -> dict[str, Any]:
    """IoU class by class, at the last epochs after which all methods were finetuned.

    caption: text; changes: line's label -> table, against plain MAE; all: table. Empty if there are
    no such epochs.
    """
    lines = [line for line in lines if line.evaluations]
    epochs = scores.last_common_epochs(lines)
    if epochs is None:
        return {}
    trained = [line for line in lines if not line.is_baseline]
    iou = {line.label: _class_iou(line, epochs) for line in trained}
    reference = next((line.label for line in trained if line.method == REFERENCE), "")
    others = [label for label in iou if label != reference] if reference else []
    caption = f"IoU in percent after {epochs} epochs of pretraining."
    if others:
        caption += f" First the classes that change most against {reference}."
    names = dict.fromkeys(name for values in iou.values() for name in values)
    rows = [{"class": n, **{label: _shown(iou[label], n) for label in iou}} for n in names]
    changes = {label: _changes(iou, label, reference) for label in others}
    return {"caption": caption, "changes": changes, "all": Table(rows)}


def _class_iou(line: Line, epochs: int) -> dict[str, float]:
    """Class -> mean IoU over seeds in percent; NaN for a class that did not occur."""
    found: dict[str, list[float]] = {}
    for evaluation in line.evaluations:
        if evaluation.epochs == epochs:
            for name, value in evaluation.result["class_iou"].items():
                found.setdefault(name, []).extend([] if value is None else [value])
    return {name: fmean(values) if values else math.nan for name, values in found.items()}


def _changes(iou: Mapping[str, Mapping[str, float]], label: str, reference: str) -> Table:
    """The largest changes, gains first. iou: by label and class."""
    values, before = iou[label], iou[reference]
    changes = {name: values[name] - before.get(name, math.nan) for name in values}
    seen = [name for name in changes if abs(changes[name]) >= _LEAST_CHANGE]
    largest = sorted(seen, key=lambda name: -abs(changes[name]))[:_MOST_CLASSES]
    names = sorted(largest, key=lambda name: -changes[name])
    rows = [
        {"class": name, reference: _shown(before, name), label: _shown(values, name),
         "change": f"{changes[name]:+.1f}"}
        for name in names
    ]  # fmt: skip
    return Table(rows, ["gain" if changes[name] >= 0 else "loss" for name in names])


def _shown(values: Mapping[str, float], name: str) -> str:
    return "–" if math.isnan(values.get(name, math.nan)) else f"{values[name]:.1f}"


def provenance(all_paths: Sequence[Layout]) -> tuple[dict[str, list[tuple[str, str]]], Table]:
    """What the numbers came from: pairs of name and value by title; apart, settings that differ."""
    run_ymls = [scores.read_run_yml(paths) for paths in all_paths]
    flat = [dict(flatten(run_yml.get("settings", {}))) for run_yml in run_ymls]
    folders, common, differing = scores.names_of(all_paths), [], []
    for name in dict.fromkeys(name for settings in flat for name in settings):
        texts = [settings.get(name, "not given") for settings in flat]
        if len(set(texts)) == 1:
            common.append((name, texts[0]))
        else:
            differing.append({"setting": name, **dict(zip(folders, texts, strict=True))})
    pairs = {"Common settings" if len(flat) > 1 else "Settings": common}
    for part in ("versions", "hardware"):
        found = (pair for run_yml in run_ymls for pair in flatten(run_yml.get(part, {})))
        pairs[part.capitalize()] = joined(found)
    pairs["Time spent"] = _time_spent(all_paths)
    return {title: rows for title, rows in pairs.items() if rows}, Table(differing)


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
    wall, device = defaultdict[str, float](float), defaultdict[str, float](float)
    for record in (record for paths in all_paths for record in read_all_records(paths)):
        wall[record.kind] += record.seconds / 3600
        device[record.kind] += record.seconds / 3600 * record.devices
    rows = [(f"{k}, hours (times devices)", f"{wall[k]:.2f} ({device[k]:.2f})") for k in wall]
    total = f"{sum(device.values()):.2f}"
    return [*rows, ("total device-hours (GPUs, or the CPU as one)", total)]
