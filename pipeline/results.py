"""The scores of an output directory: read from its evaluations, kept in results.csv, shown."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import layout
from pipeline.layout import BASELINES, Layout, RunName
from pipeline.records import read_record, write_text
from pipeline.settings import METHODS, METHODS_WITH_SEGMENTS

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "best_mean_iou")
# Equal runs differ in the minutes only.
COLUMNS = ("method", "coverage_ratio", "seed", "epochs", *SCORES, "minutes")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One finished evaluation; scores in percent."""

    folder: Path
    method: str
    """A masking method, scratch or mae."""
    coverage_ratio: float | None
    """Wanted percent hidden; None where the method does not use it or it is not known."""
    seed: int | None
    epochs: int
    """Epochs of pretraining completed."""
    minutes: float
    """Wall minutes of finetuning and scoring and of the pretraining round before it."""
    result: dict[str, Any]
    """The whole result.json."""

    @property
    def label(self) -> str:
        """What a chart's legend calls its line: the method, with the ratio where it has one."""
        if self.coverage_ratio is None:
            return self.method
        return f"{self.method} {self.coverage_ratio:g}%"


def read_evaluations(paths: Layout) -> list[Evaluation]:
    """All finished evaluations: methods in their usual order, then ratio, seed and epochs."""
    found = []
    for folder in paths.eval_output.glob("*"):
        try:
            run, epochs = layout.parse_eval_name(folder.name)
            result = json.loads(layout.result(folder).read_text(encoding="utf-8"))
        except (ValueError, FileNotFoundError, NotADirectoryError):
            continue  # not an evaluation, or not finished
        found.append(_evaluation(paths, folder, run, epochs, result))
    order = {method: index for index, method in enumerate((*BASELINES, *METHODS))}
    return sorted(
        found,
        key=lambda e: (order.get(e.method, 99), e.coverage_ratio or 0, e.seed or 0, e.epochs),
    )


def _evaluation(
    paths: Layout,
    folder: Path,
    run: RunName,
    epochs: int,
    result: dict[str, Any],
) -> Evaluation:
    names = (f"pretrain_{run}_{epochs}", f"evaluate_{run}_{epochs}")
    records = [read_record(paths, name) for name in names]
    seconds = [record.seconds for record in records if record is not None]
    return Evaluation(
        folder=folder,
        method=run.method,
        coverage_ratio=coverage_of(run, paths),
        seed=result.get("seed", run.seed),
        epochs=epochs,
        minutes=sum(seconds) / 60 if seconds else float(result.get("minutes") or 0),
        result=result,
    )


def coverage_of(run: RunName, paths: Layout) -> float | None:
    """A run's coverage ratio: in its name or in its pretraining's record; None if it has none.

    run.yml holds what the latest call wanted, which may have been about other runs.
    """
    if run.coverage_ratio is not None or run.method not in METHODS_WITH_SEGMENTS:
        return run.coverage_ratio
    for path in sorted(paths.records.glob(f"pretrain_{run}_*.json")):
        record = read_record(paths, path.stem)
        if record is not None and record.run == str(run) and "coverage_ratio" in record.fingerprint:
            return float(record.fingerprint["coverage_ratio"])
    return None


def read_run_yml(paths: Layout) -> dict[str, Any]:
    """The settings of the latest call; empty if there are none."""
    try:
        loaded = yaml.safe_load(paths.run_yml.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def as_row(evaluation: Evaluation) -> dict[str, str]:
    """One line of results.csv."""
    result, ratio = evaluation.result, evaluation.coverage_ratio
    scores = {
        name: f"{result[name]:.4f}" if isinstance(result.get(name), int | float) else ""
        for name in SCORES
    }
    return {
        "method": evaluation.method,
        "coverage_ratio": "" if ratio is None else f"{ratio:g}",
        "seed": "" if evaluation.seed is None else str(evaluation.seed),
        "epochs": str(evaluation.epochs),
        **scores,
        "minutes": f"{evaluation.minutes:.2f}",
    }


def write_results_csv(paths: Layout) -> list[Evaluation]:
    """Writes results.csv anew from the evaluations there are, and returns them."""
    evaluations = read_evaluations(paths)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_row(evaluation) for evaluation in evaluations)
    write_text(paths.results_csv, stream.getvalue())
    return evaluations


def table(evaluations: list[Evaluation]) -> str:
    """The scores as aligned text, a line per evaluation."""
    several_seeds = len({evaluation.seed for evaluation in evaluations}) > 1
    titles = ["method", *(["seed"] if several_seeds else []), "epochs"]
    titles += ["pixel accuracy", "mean accuracy", "mean IoU", "minutes"]
    lines = [titles]
    for evaluation in evaluations:
        row = as_row(evaluation)
        scores = [row[name] for name in SCORES[:3]]
        lines.append(
            [
                evaluation.label,
                *([row["seed"]] if several_seeds else []),
                row["epochs"],
                *(f"{float(score):.2f}" if score else "-" for score in scores),
                f"{evaluation.minutes:.1f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
