"""The scores of an output directory: read from its evaluations, kept in results.csv, shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from common.files import write_text
from common.layout import RESULT
from common.parsed import Result, parsed, read_json
from common.yamlfile import read_yaml
from pipeline.layout import BASELINES, Layout, Run, parse_eval_name, ratio_text
from pipeline.records import Record, read_all_records
from pipeline.terminal import aligned

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "best_mean_iou")
# Equal runs differ in the minutes only.
COLUMNS = ("method", "coverage_ratio", "seed", "eval_seed", "epochs", *SCORES, "minutes")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One finished evaluation; scores in percent."""

    folder: Path
    method: str
    """A masking method, scratch or mae."""
    coverage_ratio: float | None
    """Wanted percent hidden; None where the method does not use it or it is not known."""
    seed: int
    """Of pretraining."""
    eval_seed: int
    """Of finetuning."""
    epochs: int
    """Epochs of pretraining completed."""
    minutes: float
    """Wall minutes of finetuning and scoring and of the pretraining round before it."""
    result: dict[str, Any]
    """The whole result.json."""

    @property
    def label(self) -> str:
        """What a chart's legend calls its line: the method, with the ratio where it has one."""
        return run_label(self.method, self.coverage_ratio)


def run_label(method: str, coverage_ratio: float | None) -> str:
    """A method and its ratio in words."""
    return method if coverage_ratio is None else f"{method} {ratio_text(coverage_ratio)}%"


def read_evaluations(paths: Layout) -> list[Evaluation]:
    """All finished evaluations: methods in the order of the run, then ratio, seed and epochs."""
    records, found = {record.name: record for record in read_all_records(paths)}, []
    for folder in paths.eval_output.glob("*"):
        try:
            run, epochs, number = parse_eval_name(folder.name)
        except ValueError:
            continue  # not an evaluation
        if not (folder / RESULT).exists():
            continue  # not finished
        result = read_json(folder / RESULT, Result)
        # Of several finetunings of a checkpoint, the first bears its pretraining.
        names = [f"evaluate_{folder.name}", *([] if number else [f"pretrain_{run}_{epochs}"])]
        seconds = [records[name].seconds for name in names if name in records]
        eval_seed = result.get("seed", Run.parse(run).seed + number)
        found.append(
            Evaluation(
                folder=folder, method=Run.parse(run).method,
                coverage_ratio=coverage_of(run, records.values()),
                seed=eval_seed - number, eval_seed=eval_seed, epochs=epochs,
                minutes=sum(seconds) / 60 if seconds else float(result.get("minutes") or 0),
                result=result,
            )
        )  # fmt: skip
    rank = method_rank([paths])
    return sorted(
        found,
        key=lambda e: (rank(e.method), e.coverage_ratio or 0, e.seed, e.eval_seed, e.epochs),
    )


def coverage_of(run: str, records: Iterable[Record]) -> float | None:
    """A run's coverage ratio, by its pretraining's record or its name; None if it has none.

    run.yml holds what the latest call wanted, which may have been about other runs.
    """
    for record in records:
        if record.kind == "pretrain" and record.run == run:
            ratio = record.fingerprint.get("coverage_ratio")
            return None if ratio is None else float(ratio)
    return Run.parse(run).coverage_ratio if "-cov" in run else None


@with_config(ConfigDict(extra="allow"))
class RunYml(TypedDict):
    """What a report needs of run.yml; versions and hardware are only shown."""

    settings: NotRequired[dict[str, Any]]
    versions: NotRequired[dict[str, Any]]
    hardware: NotRequired[dict[str, Any]]


def read_run_yml(paths: Layout) -> dict[str, Any]:
    """Settings, versions and hardware of the latest call; empty if there are none."""
    if not paths.run_yml.exists():
        return {}
    return parsed(RunYml, read_yaml(paths.run_yml), f"{paths.run_yml} is damaged")


def method_rank(all_paths: Sequence[Layout]) -> Callable[[str], tuple[int, str]]:
    """Sorts methods: baselines, then as the calls named them, then by the alphabet."""
    order = list(BASELINES)
    for paths in all_paths:
        named = read_run_yml(paths).get("settings", {})
        earlier = named.get("experiment")
        methods = named.get("mask_method")
        if not methods and isinstance(earlier, dict):
            methods = earlier.get("mask_methods")
        order += map(str, methods) if isinstance(methods, list) else []
    return lambda method: (order.index(method) if method in order else len(order), method)


def as_row(evaluation: Evaluation) -> dict[str, str]:
    """One line of results.csv."""
    scores = {name: evaluation.result.get(name) for name in SCORES}
    ratio = evaluation.coverage_ratio
    return {
        "method": evaluation.method,
        "coverage_ratio": "" if ratio is None else ratio_text(ratio),
        **{name: str(getattr(evaluation, name)) for name in ("seed", "eval_seed", "epochs")},
        **{name: "" if score is None else f"{score:.4f}" for name, score in scores.items()},
        "minutes": f"{evaluation.minutes:.2f}",
    }


def is_results_csv(head: bytes) -> bool:
    """Whether a file that begins so was written by `write_results_csv`, of any version."""
    return head.startswith(COLUMNS[0].encode() + b",")


def write_results_csv(paths: Layout) -> list[Evaluation]:
    """Writes results.csv anew from the evaluations there are, and returns them."""
    evaluations = read_evaluations(paths)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_row(evaluation) for evaluation in evaluations)
    write_text(paths.results_csv, stream.getvalue())
    return evaluations


def table(evaluations: Sequence[Evaluation]) -> str:
    """The scores as aligned text, a line per evaluation."""
    rows = score_rows([(evaluation.label, evaluation) for evaluation in evaluations])
    return aligned(rows, right=range(1, len(rows[0])))


def score_rows(labelled: Sequence[tuple[str, Evaluation]]) -> list[list[str]]:
    """Titles, then the cells of each evaluation, whose label comes first."""
    seeds = [n for n in ("seed", "eval_seed") if len({getattr(e, n) for _, e in labelled}) > 1]
    titles = ["method", *(name.replace("_", " ") for name in seeds), "epochs"]
    rows = [[*titles, "pixel accuracy", "mean accuracy", "mean IoU", "minutes"]]
    for label, evaluation in labelled:
        row = as_row(evaluation)
        scores = [f"{float(row[name]):.2f}" if row[name] else "" for name in SCORES[:3]]
        minutes = f"{evaluation.minutes:.1f}"
        rows.append([label, *(row[name] for name in seeds), row["epochs"], *scores, minutes])
    return rows
