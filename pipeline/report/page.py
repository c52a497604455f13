"""report.html: one offline page that answers the question first, from what the folders hold now.

`write_report` reads top to bottom like the page. Several output directories make one page; the
same method in directories of equal settings is one line, with the spread over their seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import check_output_file, check_replaceable, write_text
from common.parsed import read_log
from common.step_files import LOG
from pipeline.plan.layout import Layout
from pipeline.plan.records import read_all_records, read_plan
from pipeline.report.answer import answer
from pipeline.report.charts import HEIGHT, Point, Series, line_chart
from pipeline.report.curves import Line, class_breakdown, make_lines
from pipeline.report.pictures import picture_sections
from pipeline.report.provenance import flatten, joined, provenance
from pipeline.report.results import (
    FINETUNING,
    MEASURES,
    cost_text,
    is_results_csv,
    score_rows,
    table,
    write_results_csv,
)


def write_all(paths: Layout) -> str:
    """Writes results.csv and report.html from what there is; returns the table to show."""
    evaluations = write_results_csv(paths)
    write_report([paths.root], paths.report_html)
    if not evaluations:
        return f"no evaluation has finished; {paths.report_html}"
    return f"\n{table(evaluations)}\n\n{paths.results_csv}\n{paths.report_html}"


def is_report(head: bytes) -> bool:
    """Whether a file that begins so is a page of `write_report`."""
    return b"<title>SegMAE: " in head


def write_report(folders: Sequence[Path], page: Path) -> None:
    """Writes the page; raises ValueError for a folder that is no output directory."""
    import jinja2

    all_paths = [Layout(folder) for folder in folders]
    check_output_file(page, is_own=is_report)
    for paths in all_paths:  # whoever calls this writes them, too
        check_replaceable(paths.results_csv, "report", is_own=is_results_csv)
    for paths in all_paths:
        if not any(
            folder.exists()
            for folder in (paths.pretrain_output, paths.probe_output, paths.eval_output)
        ):
            if paths.run_yml.exists():
                continue  # a run that has just begun
            raise ValueError(f"{paths.root} is not the output directory of a run")
    every_line = make_lines(all_paths)
    lines = [line for line in every_line if line.evaluations]
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    )
    content = {
        "cost_text": cost_text,
        "title": "Mean IoU against pretraining",
        "subtitle": f"{', '.join(p.root.name for p in all_paths)}; {time.strftime('%F %H:%M')}",
        "chart_height": HEIGHT,
        "progress": _progress_note(all_paths),
        **_answers(every_line),
        **_scores(lines),
        "loss_charts": _training_charts(every_line),
        "classes": class_breakdown(lines),
        "pictures": picture_sections(all_paths),
        **provenance(all_paths),
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


def _answers(lines: Sequence[Line]) -> dict[str, Any]:
    """What the measures say: complete finetuning first, the probes where there is none yet."""
    found = [answer(lines, measure) for measure in MEASURES.values()]
    scored = [one for one in found if one] or [{"sentences": []}]
    first, *others = sorted(scored, key=lambda one: not one["sentences"])
    if not first["sentences"]:
        first["sentences"] = ["No evaluation has finished yet."]
    elif first["measure"] is not FINETUNING:
        said = "No finetuning has been scored yet; this is what frozen probes say."
        first["sentences"].insert(0, said)
    return {"answer": first, "probes": others}


def _scores(lines: Sequence[Line]) -> dict[str, Any]:
    """The table of all scores, and how they were made; where evaluations differ, all values."""
    found = [(line.label, evaluation) for line in lines for evaluation in line.evaluations]
    best = max((e.result.get("mean_iou") or 0 for _, e in found), default=0)
    columns, *cells = score_rows(found)
    rows = [
        {"cells": row, "best": evaluation.result.get("mean_iou") == best}
        for row, (_, evaluation) in zip(cells, found, strict=True)
    ]
    parts = ("dataset", "model", "protocol", "recipe")
    protocol = joined(
        (name.removeprefix("protocol: "), text)
        for _, evaluation in found
        for name, text in flatten({part: evaluation.result.get(part) for part in parts})
    )
    return {"columns": columns, "rows": rows, "protocol": protocol}


def _training_charts(lines: Sequence[Line]) -> list[str]:
    """Pretraining loss, held-out loss and rate per run; finetuning loss of each last evaluation."""
    pretraining = [(line, read_log(folder / LOG)) for line in lines for folder in line.pretrainings]
    last = [
        (line, read_log(line.evaluations[-1].folder / LOG)) for line in lines if line.evaluations
    ]
    scored = [(line, log) for line, log in last if sum("val_mean_iou" in e for e in log) > 1]
    charts = [
        _log_chart(logs, key, f"epochs of {work}", title, caption)
        for logs, work, key, title, caption in (
            (pretraining, "pretraining", "train_loss", "reconstruction loss",
             "Pretraining loss on the training images. Methods hide different pixels, "
             "so compare a line's course, not its height."),
            (pretraining, "pretraining", "val_loss", "held-out loss",
             "Reconstruction loss on the images in val/."),
            (pretraining, "pretraining", "train_lr", "learning rate",
             "Learning rate of pretraining."),
            (last, "finetuning", "train_loss", "finetuning loss",
             "Finetuning loss of each line's last evaluation."),
            (scored, "finetuning", "val_mean_iou", "mean IoU (%)",
             "Mean IoU while finetuning, at each line's last evaluation."),
        )
    ]  # fmt: skip
    return [chart for chart in charts if chart]


def _log_chart(
    logs: Sequence[tuple[Line, list[dict[str, Any]]]],
    key: str,
    x_title: str,
    y_title: str,
    caption: str,
) -> str:
    """One chart of a log's column; runs of other seeds look alike."""
    series = []
    for line, entries in logs:
        points = [
            Point(x=entry["epoch"], y=entry[key])
            for entry in entries
            if isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
        ]
        series.append(Series(label=line.label, points=points, style=line.style))
    return line_chart({x_title: series}, caption, y_title=y_title)
