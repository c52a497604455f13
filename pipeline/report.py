"""report.html: one offline page that answers the question first, from what the folders hold now.

`write_report` reads top to bottom like the page. Several output directories make one page; the
same method in directories of equal settings is one line, with the spread over their seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from common.files import write_text
from common.layout import LOG
from common.logbook import read_log
from pipeline.breakdown import class_breakdown
from pipeline.charts import HEIGHT, Chart, Point, Series, line_chart
from pipeline.curves import REFERENCE, Line, kept_apart, last_common_epochs, line_label, make_lines
from pipeline.layout import Layout
from pipeline.pictures import picture_sections
from pipeline.provenance import differing_settings, flatten, joined, provenance
from pipeline.records import read_all_records, read_plan
from pipeline.results import Evaluation, read_run_yml, score_rows, table, write_results_csv


@dataclass(frozen=True)
class _Log:
    """A log.txt and how its line looks."""

    label: str
    style: int
    entries: list[dict[str, Any]]


def write_all(paths: Layout) -> str:
    """Writes results.csv and report.html from what there is; returns the table to show."""
    evaluations = write_results_csv(paths)
    write_report([paths.root], paths.report_html)
    if not evaluations:
        return f"no evaluation has finished; {paths.report_html}"
    return f"\n{table(evaluations)}\n\n{paths.results_csv}\n{paths.report_html}"


def write_report(folders: Sequence[Path], page: Path) -> None:
    """Writes the page; raises ValueError for a folder that is no output directory."""
    import jinja2

    all_paths = [Layout(folder) for folder in folders]
    for paths in all_paths:
        if not (paths.pretrain_output.exists() or paths.eval_output.exists()):
            if paths.run_yml.exists():
                continue  # a run that has just begun
            raise ValueError(f"{paths.root} is not the output directory of a run")
    apart = kept_apart(all_paths)
    lines = make_lines(all_paths, apart=apart)
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    )
    settings = [read_run_yml(paths) for paths in all_paths]
    content = {
        "title": "Mean IoU against pretraining",
        "subtitle": f"{', '.join(p.root.name for p in all_paths)}; {time.strftime('%F %H:%M')}",
        "chart_height": HEIGHT,
        "progress": _progress_note(all_paths),
        **_answer(lines),
        **_scores(lines),
        "loss_charts": _training_charts(all_paths, lines, apart=apart),
        "classes": class_breakdown(lines),
        "pictures": picture_sections(all_paths),
        "differing": differing_settings(all_paths, settings),
        "settings": provenance(all_paths, settings),
    }
    write_text(page, template.render(content))


def _progress_note(all_paths: Sequence[Layout]) -> str:
    """How far a run is that has not finished."""
    notes = []
    for paths in all_paths:
        if not paths.plan.exists():
            continue
        steps = read_plan(paths)
        states = {record.name: record.state for record in read_all_records(paths)}
        done = sum(states.get(step["name"]) == "done" for step in steps)
        failed = [step["name"] for step in steps if states.get(step["name"]) == "failed"]
        if done < len(steps):
            failure = f"; failed: {', '.join(failed)}" if failed else ""
            notes.append(f"{paths.root.name}: {done} of {len(steps)} steps are done{failure}.")
    return " ".join(notes)


def _answer(lines: Sequence[Line]) -> dict[str, Any]:
    """The sentences, remarks and chart at the top of the page."""
    trained, common = [line for line in lines if not line.is_baseline], last_common_epochs(lines)
    sentences: list[str] = []
    remarks: list[str] = []
    if not lines:
        sentences.append("No evaluation has finished yet.")
    if common is not None:
        sentences, remarks = _compare(trained, common)
    elif trained:
        sentences.append("The methods have not been evaluated at a common epoch yet.")
    for line in lines:
        if line.is_baseline:
            name = {"scratch": "without pretraining", "mae": "the official MAE checkpoint"}
            sentences.append(f"For comparison, {name[line.method]}: {_spread(line.scores(0))}.")
    chart = _miou_chart(lines)
    several = any(len(line.scores(epochs)) > 1 for line in lines for epochs in line.epochs)
    caption = "Mean IoU on the validation set against epochs of pretraining."
    if several:
        caption += " Points are means over seeds, bars reach from the lowest to the highest."
    return {"answer": sentences, "remarks": remarks, "miou_chart": chart, "miou_caption": caption}


def _compare(lines: Sequence[Line], epochs: int) -> tuple[list[str], list[str]]:
    """The best method, its distance to `patches`, and what speaks against trusting it."""
    ranked = sorted(lines, key=lambda line: -mean(line.scores(epochs)))
    best, unit = ranked[0], "epoch" if epochs == 1 else "epochs"
    if len(lines) == 1:
        only = f"{best.label} reaches {_spread(best.scores(epochs))} mean IoU"
        return [f"After {epochs} {unit} of pretraining, {only}."], []
    sentences = [
        f"After {epochs} {unit} of pretraining, {best.label} is best: "
        f"{_spread(best.scores(epochs))} mean IoU."
    ]
    reference = next((line for line in lines if line.method == REFERENCE), ranked[1])
    others = [line for line in ranked if line is not reference]
    differences = [
        f"{line.label} {mean(line.scores(epochs)) - mean(reference.scores(epochs)):+.2f}"
        for line in others
    ]
    sentences.append(f"Against {reference.label}, in points: {', '.join(differences)}.")
    within = [o.label for o in others if _within_spread(o.scores(epochs), reference.scores(epochs))]
    remarks = []
    if min(len(line.scores(epochs)) for line in lines) < 2:
        remarks.append(
            "There is one seed per method here, so nothing tells a real difference from chance: "
            "run several, such as --seed 0,1,2."
        )
    elif within:
        remarks.append(
            f"The difference to {reference.label} is within the spread over seeds for "
            f"{', '.join(within)}: it may be chance."
        )
    return sentences, remarks


def _within_spread(scores: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the two ranges over seeds overlap."""
    return max(scores) >= min(others) and max(others) >= min(scores)


def _spread(scores: Sequence[float]) -> str:
    if len(scores) == 1:
        return f"{scores[0]:.2f}%"
    if not scores:
        return "not scored"
    return f"{mean(scores):.2f}% ({min(scores):.2f} to {max(scores):.2f}, {len(scores)} seeds)"


def _miou_chart(lines: Sequence[Line]) -> Chart | None:
    """A baseline of epoch 0 is drawn as a level over the whole width."""
    last = max((line.epochs[-1] for line in lines), default=0)
    series = []
    for line in lines:
        points = []
        for epochs in line.epochs:
            scores = line.scores(epochs)
            if scores:
                at = [0, last] if line.is_baseline and last > 0 else [epochs]
                spread = {"low": min(scores), "high": max(scores)} if len(scores) > 1 else {}
                points += [Point(x=x, y=mean(scores), **spread) for x in at]
        if points:
            series.append(Series(label=line.label, points=points, style=line.style))
    if not series:
        return None
    return line_chart(
        series,
        title="Mean IoU against epochs of pretraining, a line per method",
        x_title="epochs of pretraining",
        y_title="mean IoU (%)",
    )


def _scores(lines: Sequence[Line]) -> dict[str, Any]:
    """The table of all scores, and how they were made."""
    found = [(line.label, evaluation) for line in lines for evaluation in line.evaluations]
    best = max((e.result.get("mean_iou") or 0 for _, e in found), default=0)
    columns, *cells = score_rows(found)
    rows = [
        {"cells": row, "best": evaluation.result.get("mean_iou") == best}
        for row, (_, evaluation) in zip(cells, found, strict=True)
    ]
    return {"columns": columns, "rows": rows, "protocol": _protocol([e for _, e in found])}


def _protocol(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """Recipe, crops and windows; where evaluations differ, all values."""
    parts = ("dataset", "model", "protocol", "recipe")
    return joined(
        (name.removeprefix("protocol: "), text)
        for evaluation in evaluations
        for name, text in flatten({part: evaluation.result.get(part) for part in parts})
    )


def _training_charts(
    all_paths: Sequence[Layout], lines: Sequence[Line], *, apart: bool
) -> list[tuple[Chart, str]]:
    """Pretraining loss, held-out loss and rate per run; finetuning loss of each last evaluation."""
    charts: list[tuple[Chart, str]] = []
    logs = _pretrain_logs(all_paths, lines, apart=apart)
    for key, title, caption in (
        ("train_loss", "reconstruction loss",
         "Pretraining loss on the training images. Methods hide different pixels, "
         "so compare a line's course, not its height."),
        ("val_loss", "held-out loss", "Reconstruction loss on the images in val/."),
        ("train_lr", "learning rate", "Learning rate of pretraining."),
    ):  # fmt: skip
        charts += _log_chart(logs, key, "epochs of pretraining", title, caption)
    last = [
        _Log(line.label, line.style, read_log(line.evaluations[-1].folder / LOG)) for line in lines
    ]
    caption = "Finetuning loss of each line's last evaluation."
    charts += _log_chart(last, "train_loss", "epochs of finetuning", "finetuning loss", caption)
    caption = "Mean IoU while finetuning, at each line's last evaluation."
    scored = [log for log in last if sum("val_mean_iou" in entry for entry in log.entries) > 1]
    x_title, y_title = "epochs of finetuning", "mean IoU (%)"
    return charts + _log_chart(scored, "val_mean_iou", x_title, y_title, caption)


def _pretrain_logs(
    all_paths: Sequence[Layout], lines: Sequence[Line], *, apart: bool
) -> list[_Log]:
    """The log of every pretraining run, looking like its line; runs of other seeds look alike."""
    styles = {line.label: line.style for line in lines}
    logs = []
    for paths in all_paths:
        for folder in sorted(paths.pretrain_output.glob("*/")):
            try:
                label = line_label(folder.name, paths, apart=apart)
            except ValueError:
                continue  # not a run's name
            style = styles.setdefault(label, len(styles))
            logs.append(_Log(label, style, read_log(folder / LOG)))
    return sorted(logs, key=lambda log: log.style)


def _log_chart(
    logs: Sequence[_Log],
    y_key: str,
    x_title: str,
    y_title: str,
    caption: str,
) -> list[tuple[Chart, str]]:
    """One chart of a log's column, or none where no log has it."""
    series = []
    for log in logs:
        points = [
            Point(x=entry["epoch"], y=entry[y_key])
            for entry in log.entries
            if isinstance(entry.get(y_key), int | float) and math.isfinite(entry[y_key])
        ]
        if points:
            series.append(Series(label=log.label, points=points, style=log.style))
    if not series:
        return []
    chart = line_chart(series, title=caption, x_title=x_title, y_title=y_title)
    return [(chart, caption)]
