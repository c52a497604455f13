"""The scores of an output directory: read from its evaluations, kept in results.csv, shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from common.files import write_text
from common.parsed import ProbeResult, Result, parsed, read_json, read_log
from common.step_files import AREAS, LOG, PROBE_AREAS, RESULT
from common.terminal import aligned
from common.yamlfile import read_yaml
from pipeline.plan.layout import BASELINES, OWN, Layout, RunId, parse_eval_name, ratio_text
from pipeline.plan.records import Record, read_all_records
from pipeline.report.statistics import draw_images

if TYPE_CHECKING:
    import numpy as np

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "best_mean_iou")
# Equal runs differ in the minutes and device-hours only.
COLUMNS = (
    *("method", "coverage_ratio", "segments_from", "seed", "eval_seed", "epochs"),
    *(*SCORES, "minutes", "device_hours", "train_flops"),
)
# What pretraining has cost: column, and its title.
COST = {"device_hours": "device-hours", "train_flops": "train FLOPs"}
_WIDEST = 110  # characters of a table on a terminal


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that checkpoints are compared by."""

    words: str
    unit: str
    """The score in words, for an axis."""
    key: str
    """Where result.json has it."""
    areas: str = ""
    """The file of areas by image; none where there are no areas."""
    most: float = 100.0
    """The highest score there is."""


MIOU = "mean IoU (%)"
# By the names in a probe's result.json, in the order of what they are worth.
MEASURES = {
    "finetuning": Measure(words="complete finetuning", unit=MIOU, key="mean_iou", areas=AREAS),
    "linear": Measure(words="the frozen linear probe", unit=MIOU, key="mean_iou",
                      areas=PROBE_AREAS["linear"]),
    "knn": Measure(words="the frozen kNN probe", unit=MIOU, key="mean_iou",
                   areas=PROBE_AREAS["knn"]),
    "image_knn": Measure(words="kNN over whole images", unit="accuracy (%)", key="accuracy"),
    "rankme": Measure(words="the spread of its features", unit="RankMe (features used)",
                      key="rankme", most=float("inf")),
}  # fmt: skip
FINETUNING = MEASURES["finetuning"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One finished score of a checkpoint; in percent but for RankMe."""

    folder: Path
    method: str
    """A masking method, scratch or mae."""
    coverage_ratio: float | None
    """Wanted percent hidden; None where the method does not use it or it is not known."""
    segments_from: str
    """Whose segments were hidden: the image's own, or those of a control."""
    seed: int
    """Of pretraining."""
    eval_seed: int
    """Of finetuning."""
    epochs: int
    """Epochs of pretraining completed."""
    minutes: float
    """Wall minutes of finetuning and scoring and of the pretraining round before it."""
    device_hours: float | None
    """Of pretraining up to here, GPUs or the CPU as one; None where it is not known."""
    train_flops: float | None
    """Floating-point operations of pretraining up to here; None where it is not known."""
    result: dict[str, Any]
    """The whole result.json, or a probe's part of it."""
    measure: Measure = FINETUNING

    @property
    def label(self) -> str:
        """What a chart's legend calls its line: the method, with the ratio where it has one."""
        return run_label(self.method, self.coverage_ratio, self.segments_from)

    @property
    def score(self) -> float | None:
        """What it is compared by."""
        return self.result.get(self.measure.key)

    @cached_property
    def drawn(self) -> np.ndarray | None:
        """[DRAWS] scores on other images; None where an earlier version did not keep the areas."""
        file = self.folder / self.measure.areas
        return draw_images(file) if self.measure.areas and file.exists() else None


def run_label(method: str, coverage_ratio: float | None, segments_from: str = OWN) -> str:
    """A method, its ratio and its source of segments in words."""
    ratio = "" if coverage_ratio is None else f" {ratio_text(coverage_ratio)}%"
    return f"{method}{ratio}" + ("" if segments_from == OWN else f" {segments_from}")


def read_evaluations(paths: Layout) -> list[Evaluation]:
    """All finished evaluations: methods in the order of the run, then ratio, seed and epochs."""
    return _read(paths, paths.eval_output, Result)


def read_probes(paths: Layout) -> list[Evaluation]:
    """The same of the frozen probes: one for each score of each probe."""
    return _read(paths, paths.probe_output, ProbeResult)


def _read(paths: Layout, parent: Path, shape: type) -> list[Evaluation]:
    records, found = {record.name: record for record in read_all_records(paths)}, []
    logs: dict[str, dict[Any, Any]] = {}
    for folder in parent.glob("*"):
        try:
            run, epochs, number = parse_eval_name(folder.name)
        except ValueError:
            continue  # not an evaluation
        if not (folder / RESULT).exists():
            continue  # not finished
        result = read_json(folder / RESULT, shape)
        if run not in logs:
            log = read_log(paths.pretrain_dir(run) / LOG)
            logs[run] = {entry["epoch"]: entry.get("train_flops") for entry in log}
        # Of several finetunings of a checkpoint, the first bears its pretraining.
        names = [f"evaluate_{folder.name}", *([] if number else [f"pretrain_{run}_{epochs}"])]
        seconds = [records[name].seconds for name in names if name in records]
        eval_seed = result.get("seed", RunId.parse(run).seed + number)
        if shape is ProbeResult:  # its own seed may be the same for all
            eval_seed = RunId.parse(run).seed
        common: dict[str, Any] = {
            "folder": folder, "method": RunId.parse(run).method,
            "coverage_ratio": coverage_of(run, records.values()),
            "segments_from": RunId.parse(run).segments_from,
            "seed": eval_seed - number, "eval_seed": eval_seed, "epochs": epochs,
            "minutes": sum(seconds) / 60 if seconds else float(result.get("minutes") or 0),
            "device_hours": _device_hours(run, epochs, records),
            "train_flops": logs[run].get(epochs),
        }  # fmt: skip
        parts = {"finetuning": result} if shape is Result else result
        for name, measure in MEASURES.items():
            if (part := parts.get(name)) is not None:
                part = part if isinstance(part, dict) else {name: part}
                found.append(Evaluation(**common, result=part, measure=measure))
    rank = method_rank([paths])
    return sorted(
        found,
        key=lambda e: (
            *(rank(e.method), e.coverage_ratio or 0, e.segments_from != OWN, e.segments_from),
            *(e.seed, e.eval_seed, e.epochs),
        ),
    )


def _device_hours(run: str, epochs: int, records: Mapping[str, Record]) -> float | None:
    """Of all rounds up to `epochs`; None without a record of the last of them."""
    rounds = {
        int(name.rsplit("_", 1)[1]): record.seconds * record.devices / 3600
        for name, record in records.items()
        if name.startswith(f"pretrain_{run}_") and record.run == run
    }
    return (
        sum(hours for end, hours in rounds.items() if end <= epochs) if epochs in rounds else None
    )


def coverage_of(run: str, records: Iterable[Record]) -> float | None:
    """A run's coverage ratio, by its pretraining's record or its name; None if it has none.

    run.yml holds what the latest call wanted, which may have been about other runs.
    """
    for record in records:
        if record.kind == "pretrain" and record.run == run:
            ratio = record.fingerprint.get("coverage_ratio")
            return None if ratio is None else float(ratio)
    return RunId.parse(run).coverage_ratio if "-cov" in run else None


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
        "segments_from": evaluation.segments_from,
        **{name: str(getattr(evaluation, name)) for name in ("seed", "eval_seed", "epochs")},
        **{name: "" if score is None else f"{score:.4f}" for name, score in scores.items()},
        "minutes": f"{evaluation.minutes:.2f}",
        "device_hours": "" if (hours := evaluation.device_hours) is None else f"{hours:.4f}",
        "train_flops": "" if (flops := evaluation.train_flops) is None else f"{flops:.6g}",
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
    """The scores as aligned text, a line per evaluation; with the cost where it fits."""
    rows = score_rows([(evaluation.label, evaluation) for evaluation in evaluations])
    text = aligned(rows, right=range(1, len(rows[0])))
    if len(text.split("\n")[0]) > _WIDEST:
        rows = [row[: rows[0].index("minutes") + 1] for row in rows]
        text = aligned(rows, right=range(1, len(rows[0])))
    return text


def score_rows(labelled: Sequence[tuple[str, Evaluation]]) -> list[list[str]]:
    """Titles, then the cells of each evaluation, whose label comes first."""
    seeds = [n for n in ("seed", "eval_seed") if len({getattr(e, n) for _, e in labelled}) > 1]
    titles = ["method", *(name.replace("_", " ") for name in seeds), "epochs"]
    titles += ["pixel accuracy", "mean accuracy", "mean IoU", "minutes"]
    cost = [n for n in COST if any(getattr(e, n) is not None for _, e in labelled)]
    rows = [[*titles, *(COST[name] for name in cost)]]
    for label, evaluation in labelled:
        row = as_row(evaluation)
        scores = [f"{float(row[name]):.2f}" if row[name] else "" for name in SCORES[:3]]
        spent = [cost_text(name, getattr(evaluation, name)) for name in cost]
        minutes = f"{evaluation.minutes:.1f}"
        rows.append([label, *(row[n] for n in seeds), row["epochs"], *scores, minutes, *spent])
    return rows


def cost_text(name: str, value: float | None) -> str:
    """A cost by its column's name, for people."""
    if value is None:
        return ""
    if name == "train_flops":
        return f"{value:.2e}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
