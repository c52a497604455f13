"""The scores of output directories: read from their evaluations, put together into lines.

    lines = make_lines([Layout(Path("output"))])
    lines[0].level(50, FINETUNING)  # its mean over seeds after 50 epochs, with an interval

What tells one pretraining from another stands in the name of its folder, once and for all: method,
seed and source of segments are read off it. What they cost stands in records and logs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from common.parsed import ProbeResult, Result, parsed, read_json, read_log
from common.step_files import AREAS, LOG, PROBE_AREAS, RESULT
from common.yamlfile import read_yaml
from pipeline.plan.layout import (
    BASELINES,
    DEFAULT_RATIO,
    OWN,
    Layout,
    Run,
    parse_eval_name,
    ratio_text,
)
from pipeline.plan.parts import ask_facts
from pipeline.plan.records import Record, made_alike, read_all_records
from pipeline.report.statistics import Interval, draw_images, interval

if TYPE_CHECKING:
    import numpy as np

REFERENCE = "patches"  # plain MAE, what the others are compared with


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that checkpoints are compared by."""

    words: str
    unit: str  # the score in words, for an axis
    key: str  # where result.json has it
    areas: str = ""  # the file of areas by image; none where there are no areas
    most: float = 100.0  # the highest score there is


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
    method: str  # a masking method, scratch or mae
    coverage_ratio: float | None  # wanted percent hidden; None where the method uses none
    segments_from: str  # whose segments were hidden: the image's own, or those of a control
    seed: int  # of pretraining
    eval_seed: int  # of finetuning
    epochs: int  # of pretraining, completed
    minutes: float  # of finetuning and scoring, and of the pretraining round before it
    # Of pretraining up to here, GPUs or the CPU as one; None where it is not known.
    device_hours: float | None
    train_flops: float | None
    result: dict[str, Any]  # the whole result.json, or a probe's part of it
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
    records, found = read_all_records(paths), []
    seconds = {record.name: record.seconds for record in records}
    costs: dict[str, tuple[dict[int, float], dict[int, float]]] = {}
    for folder in parent.glob("*"):
        try:
            name, epochs, number = parse_eval_name(folder.name)
        except ValueError:
            continue  # not an evaluation
        if not (folder / RESULT).exists():
            continue  # not finished
        run, result = Run.parse(name), read_json(folder / RESULT, shape)
        if name not in costs:
            costs[name] = _costs(paths, name, records)
        hours, flops = costs[name]
        # Of several finetunings of a checkpoint, the first bears its pretraining.
        steps = [f"evaluate_{folder.name}", *([] if number else [f"pretrain_{name}_{epochs}"])]
        timed = [seconds[step] for step in steps if step in seconds]
        common: dict[str, Any] = {
            "folder": folder, "method": run.method, "segments_from": run.segments_from,
            "coverage_ratio": coverage_of(run, records), "epochs": epochs,
            "seed": run.seed, "eval_seed": run.seed + number,
            "minutes": sum(timed) / 60 if timed else float(result.get("minutes") or 0),
            "device_hours": hours.get(epochs), "train_flops": flops.get(epochs),
        }  # fmt: skip
        # A finetuning's file is its score, a probe's has a part for each of several: a dictionary,
        # or a bare number (rankme).
        parts = {"finetuning": result} if shape is Result else result
        for key, measure in MEASURES.items():
            if (part := parts.get(key)) is not None:
                part = part if isinstance(part, dict) else {key: part}
                found.append(Evaluation(**common, result=part, measure=measure))
    rank = method_rank([paths])
    return sorted(
        found,
        key=lambda e: (
            *(rank(e.method), e.coverage_ratio or 0, e.segments_from != OWN, e.segments_from),
            *(e.seed, e.eval_seed, e.epochs),
        ),
    )


def _costs(
    paths: Layout, run: str, records: Iterable[Record]
) -> tuple[dict[int, float], dict[int, float]]:
    """Device-hours and FLOPs of a pretraining from its start, by the epochs completed."""
    rounds = sorted(
        (int(record.name.rsplit("_", 1)[1]), record.seconds * record.devices / 3600)
        for record in records
        if record.kind == "pretrain" and record.run == run
    )
    hours = accumulate(hours for _, hours in rounds)
    log = read_log(paths.pretrain_dir(run) / LOG)
    # The log counts FLOPs from the start on its own, over rounds and continuations.
    flops = {entry["epoch"]: entry["train_flops"] for entry in log if "train_flops" in entry}
    return dict(zip((epochs for epochs, _ in rounds), hours, strict=True)), flops


def coverage_of(run: Run, records: Iterable[Record]) -> float | None:
    """A run's coverage ratio; None where its method uses none, which its record tells.

    The name leaves the default out, and run.yml is of the latest call, perhaps of other methods.
    """
    for record in records:
        if record.kind == "pretrain" and record.run == run.name:
            ratio = record.fingerprint.get("coverage_ratio")
            return None if ratio is None else float(ratio)
    return None if run.coverage_ratio == DEFAULT_RATIO else run.coverage_ratio


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
        methods = read_run_yml(paths).get("settings", {}).get("mask_method")
        order += map(str, methods) if isinstance(methods, list) else []
    return lambda method: (order.index(method) if method in order else len(order), method)


@dataclass(frozen=True, kw_only=True)
class Level:
    """Where a line stands after some epochs: the mean over its seeds."""

    score: float
    seeds: int
    interval: Interval | None  # None where nothing gives it one

    @property
    def spread(self) -> Interval | None:
        """The interval if it holds chance between seeds, which one seed tells nothing of."""
        return self.interval if self.seeds > 1 else None


@dataclass(kw_only=True)
class Line:
    """What the charts show as one line: a method, and its ratio, over seeds and epochs."""

    label: str
    family: str  # the label of the line that hides the images' own segments
    method: str
    style: tuple[int, int] = (0, 0)  # number of the family, and in the family
    scored: list[Evaluation] = field(default_factory=list)  # by any measure
    # Folders; an evaluation may have outlived its pretraining, or not have begun.
    pretrainings: list[Path] = field(default_factory=list)

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

    def by_seed(self, epochs: int, measure: Measure) -> dict[int, list[Evaluation]]:
        """What was scored after `epochs` (of a baseline, any), by the seed of pretraining."""
        found: dict[int, list[Evaluation]] = {}
        epochs = 0 if self.is_baseline else epochs  # of which there are none
        for one in self.scored:
            if one.measure is measure and one.epochs == epochs and one.score is not None:
                found.setdefault(one.seed, []).append(one)
        return found

    def scores(self, epochs: int, measure: Measure) -> dict[int, float]:
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

    def level(self, epochs: int, measure: Measure) -> Level:
        """The mean over seeds, of which at least one was scored after `epochs`."""
        scores = list(self.scores(epochs, measure).values())
        drawn = self.drawn(epochs, measure)
        found = interval(scores, None if drawn is None else list(drawn.values()))
        return Level(score=fmean(scores), seeds=len(scores), interval=found)

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
    apart = len(all_paths) > 1 and not made_alike(all_paths, ask_facts())
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
                run = Run.parse(folder.name)
                line = line_of(paths, run.method, coverage_of(run, records), run.segments_from)
                line.pretrainings.append(folder)
    rank = method_rank(all_paths)
    ordered = sorted(lines.values(), key=lambda line: rank(line.method))
    families: dict[str, list[Line]] = {}
    for line in ordered:  # a method and its controls share a colour
        families.setdefault(line.family, []).append(line)
    for color, family in enumerate(families.values()):
        for variant, line in enumerate(family):
            line.style = (color, variant)
    return ordered
