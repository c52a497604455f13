"""The scores of output directories: read from their evaluations, put together into lines.

    lines = make_lines([Layout(Path("output"))])
    lines[0].level(50, FINETUNING).spread  # after 50 epochs, with an interval

What tells one pretraining from another stands in the name of its folder, once and for all: method,
seed and source of segments are read off it. What they cost stands in records and logs.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import TypedDict

from common.areas import draw_images, images_of
from common.formats import ProbeResult, Result, parsed, read_json, read_log, read_yaml
from common.step_files import AREAS, LOG, PROBE_AREAS, RESULT, epochs_of
from pipeline.plan.budget import epochs_at
from pipeline.plan.layout import BASELINES, CONTROLS, OWN, Layout, RunId, parse_eval_name
from pipeline.plan.records import Record, Spends, made_alike, read_all_records, read_spends
from pipeline.plan.segments import MAKING
from pipeline.report.statistics import Interval, interval

# Of pretraining: columns of results.csv, and how they are called for people.
COSTS = {
    "device_hours": "device-hours", "train_flops": "train FLOPs",
    "device_hours_with_segments": "with segments",
}  # fmt: skip
REFERENCE = "patches"  # plain MAE, what the others are compared with
SOURCES = (OWN, *CONTROLS)  # in the order in which they stand everywhere


class Measure(NamedTuple):
    """Something that checkpoints are compared by."""

    words: str
    short: str  # the same as a column's title
    unit: str = "mean IoU (%)"  # the score in words, for an axis
    key: str = "mean_iou"  # where result.json has it
    areas: str = ""  # the file of areas by image; none where there are no areas
    most: float = 100.0  # the highest score there is


# By the names in a probe's result.json, in the order of what they are worth.
MEASURES = {
    "finetuning": Measure("complete finetuning", "finetuned", areas=AREAS),
    "linear": Measure("the frozen linear probe", "linear probe", areas=PROBE_AREAS["linear"]),
    "knn": Measure("the frozen kNN probe", "kNN", areas=PROBE_AREAS["knn"]),
    "knn_raw": Measure("kNN on raw tokens", "kNN, raw tokens", areas=PROBE_AREAS["knn_raw"]),
    "dinov2_linear": Measure("DINOv2's linear probe", "DINOv2's", areas=PROBE_AREAS["dinov2_linear"]),
    "dinov3_linear": Measure("DINOv3's linear probe", "DINOv3's", areas=PROBE_AREAS["dinov3_linear"]),
    "capi_knn": Measure("CAPI's kNN probe", "CAPI's kNN", areas=PROBE_AREAS["capi_knn"]),
    "capi_logreg": Measure("CAPI's logistic regression", "CAPI's", areas=PROBE_AREAS["capi_logreg"]),
    "hummingbird": Measure("Hummingbird's retrieval", "Hummingbird's", areas=PROBE_AREAS["hummingbird"]),
    "image_linear": Measure(
        "a linear classifier of whole images", "image linear", "accuracy (%)", "accuracy"
    ),
    "image_knn": Measure("kNN over whole images", "image kNN", "accuracy (%)", "accuracy"),
    "rankme": Measure(
        "the spread of its features", "RankMe", "RankMe (features used)", "rankme", most=math.inf
    ),
}
FINETUNING = MEASURES["finetuning"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One finished score of a checkpoint; in percent but for RankMe."""

    folder: Path
    run: RunId  # the pretraining, or a baseline
    eval_seed: int  # of finetuning
    epochs: int  # of pretraining, completed
    minutes: float  # of finetuning and scoring, and of the pretraining round before it
    # Of pretraining up to here (COSTS), GPUs or the CPU as one; None where it is not known.
    costs: dict[str, float | None]
    result: dict[str, Any]  # the whole result.json, or a probe's part of it
    measure: Measure = FINETUNING
    is_reference: bool = False  # of an encoder that no run here pretrained

    @property
    def score(self) -> float | None:
        """What it is compared by."""
        return self.result.get(self.measure.key)

    @cached_property
    def drawn(self) -> np.ndarray | None:
        """[DRAWS] scores on other images; None where an earlier version did not keep the areas."""
        return draw_images(self.areas) if self.areas else None

    @cached_property
    def images(self) -> int | None:
        """Tells the validation images from others; None where no areas were kept."""
        return images_of(self.areas) if self.areas else None

    @property
    def areas(self) -> Path | None:
        """The file of areas by image; None where none were kept."""
        names = [self.measure.areas]
        if self.measure is MEASURES["knn_raw"]:  # an earlier version knew no other kNN
            names.append(PROBE_AREAS["knn"])
        files = (self.folder / name for name in names if name)
        return next(filter(Path.exists, files), None)


def read_evaluations(paths: Layout, shape: type = Result, dataset: str = "") -> list[Evaluation]:
    """All finished ones, by the methods in the order of the run, then ratio, seed and epochs.

    shape: Result for finetunings; ProbeResult for the frozen probes, one for each of their scores.
    dataset: unless it is the plan's first.
    """
    parent = paths.eval_output if shape is Result else paths.probe_output
    records, rank, found = read_all_records(paths), method_rank([paths]), list[Evaluation]()
    # What was pretrained in another directory has its costs there.
    source = read_run_yml(paths).get("settings", {}).get("pretrained_from")
    pretrained = Layout(Path(source)) if isinstance(source, str) else paths
    records += read_all_records(pretrained) if isinstance(source, str) else []
    seconds = {record.name: record.seconds for record in records}
    costs = cache(lambda run: _costs(pretrained, run, records))
    for file in parent.glob(f"*/{RESULT}"):  # written last: it is finished
        folder = file.parent
        try:
            run, epochs, number = parse_eval_name(folder.name, dataset)
        except ValueError:
            continue  # somebody else's folder
        result = read_json(file, shape)
        # Of several finetunings of a checkpoint, the first bears its pretraining.
        steps = [f"evaluate_{folder.name}", *([] if number else [f"pretrain_{run.name}_{epochs}"])]
        timed = [seconds[step] for step in steps if step in seconds]
        common: dict[str, Any] = {
            "folder": folder, "run": as_recorded(run, records),
            "eval_seed": result["seed"], "epochs": epochs,
            "is_reference": run.method in BASELINES or _is_foreign(result["settings"].get("init"), epochs),
            "minutes": sum(timed) / 60 if timed else float(result.get("minutes") or 0),
            "costs": {cost: known.get(epochs) for cost, known in costs(run.name).items()},
        }  # fmt: skip
        # A finetuning's file is one score. A probe's has several: dictionaries, or bare numbers.
        parts = {"finetuning": result} if shape is Result else result
        if "knn" in parts and "knn_raw" not in parts:  # an earlier version whitened nothing
            parts = {**parts, "knn_raw": parts["knn"], "knn": None}
        for key, measure in MEASURES.items():
            if (part := parts.get(key)) is not None:
                part = part if isinstance(part, dict) else {key: part}
                found.append(Evaluation(**common, result=part, measure=measure))

    def place(one: Evaluation) -> tuple[Any, ...]:
        run, ratio, source = one.run, one.run.coverage_ratio or 0, one.run.segments_from
        return rank(run.method), ratio, SOURCES.index(source), run.seed, one.eval_seed, one.epochs

    return sorted(found, key=place)


def _is_foreign(init: object, epochs: int) -> bool:
    """Whether an encoder, as settings have it, is none that a round of pretraining left."""
    return init is not None and epochs == 0 and epochs_of(Path(str(init))) != epochs


def _costs(paths: Layout, run: str, records: Iterable[Record]) -> dict[str, dict[int, float]]:
    """What a pretraining has cost from its start up to some epochs, where it is known."""
    rounds = sorted(
        (int(record.name.rsplit("_", 1)[1]), record.seconds * record.devices / 3600)
        for record in records
        if record.kind == "pretrain" and record.run == run
    )
    ends, hours = [end for end, _ in rounds], list(accumulate(hours for _, hours in rounds))
    # Whoever hides segments has to make them once, or to find them made: then that is not known.
    making = [record for record in records if record.kind in MAKING]
    made = sum(record.seconds * record.devices for record in making) / 3600
    needs = any("segments_from" in r.fingerprint for r in records if (r.kind, r.run) == ("pretrain", run))
    in_all = [spent + made * needs for spent in hours] if making else []
    log = read_log(paths.pretrain_dir(run) / LOG)  # counts FLOPs from the start on
    flops = {entry["epoch"]: entry["train_flops"] for entry in log if "train_flops" in entry}
    return {
        "device_hours": dict(zip(ends, hours, strict=True)), "train_flops": flops,
        "device_hours_with_segments": dict(zip(ends, in_all, strict=False)),
    }  # fmt: skip


def as_recorded(run: RunId, records: Iterable[Record]) -> RunId:
    """The run without a ratio where its method uses none, which its records tell.

    The name leaves the default out, and run.yml is of the latest call, perhaps of other methods.
    """
    made = [one for one in records if one.kind == "pretrain" and one.run == run.name]
    is_named = run.coverage_ratio != RunId.coverage_ratio
    is_used = "coverage_ratio" in made[-1].fingerprint if made else is_named
    return run if is_used else replace(run, coverage_ratio=None)


class RunYml(TypedDict, total=False):
    """What a report shows of run.yml."""

    settings: dict[str, Any]
    versions: dict[str, Any]
    hardware: dict[str, Any]


def read_run_yml(paths: Layout) -> dict[str, Any]:
    """Settings, versions and hardware of the latest call; empty if there are none."""
    content = read_yaml(paths.run_yml) if paths.run_yml.exists() else {}
    return parsed(RunYml, content, f"{paths.run_yml} is damaged")


def planned_epochs(paths: Layout) -> int:
    """Where pretraining ends, as the call said; 0: it is not known."""
    known = read_run_yml(paths).get("settings", {}).get("pretrain_epochs")
    return known if isinstance(known, int) else 0


def method_rank(all_paths: Sequence[Layout]) -> Callable[[str], tuple[int, str]]:
    """Sorts methods: baselines, then as the calls named them, then by the alphabet."""
    order = list(BASELINES)
    for paths in all_paths:
        methods = read_run_yml(paths).get("settings", {}).get("mask_method")
        order += map(str, methods) if isinstance(methods, list) else []
    return lambda method: (order.index(method) if method in order else len(order), method)


class Level(NamedTuple):
    """Where a line stands after some epochs; by the seed of pretraining.

    Several finetunings of one pretraining count as their mean, and so does a seed that is in
    several directories: neither tells how much chance there is in pretraining.
    """

    score: float  # the mean over seeds
    spread: Interval | None  # its interval; of one seed, nothing tells the chance between seeds
    scores: dict[int, float]
    drawn: dict[int, Any]  # [DRAWS] on other images; empty where areas were not kept
    costs: dict[str, float | None]  # device_hours and train_flops, means over its pretrainings
    images: frozenset[int | None] = frozenset()  # on which it was scored: one, unless they differ


@dataclass(kw_only=True, eq=False)
class Line:
    """What the charts show as one line: a method, and its ratio, over seeds and epochs."""

    label: str
    family: str  # the label of the line that hides the images' own segments
    method: str
    source: str = OWN  # of the segments
    coverage_ratio: float | None = None
    home: str = ""  # the directory, where those of several are told apart
    end: int = 0  # epochs of the whole pretraining, as its call said; 0: that is not known
    spends: Spends | None = None  # the budget of its call, where it had one
    style: tuple[int, int] = (0, 0)  # number of the family, from 0, and of the source; -1: a baseline
    scored: list[Evaluation] = field(default_factory=list)  # by any measure
    # Folders; an evaluation may have outlived its pretraining, or not have begun.
    pretrainings: list[Path] = field(default_factory=list)
    is_untrained: bool = False  # the method's own model before its first epoch
    is_reference: bool = False  # an encoder that no run here pretrained

    @property
    def is_baseline(self) -> bool:
        """Whether nothing was pretrained here."""
        return self.is_untrained or self.is_reference or self.method in BASELINES

    @property
    def evaluations(self) -> list[Evaluation]:
        """The complete finetunings."""
        return [one for one in self.scored if one.measure is FINETUNING]

    def epochs(self, measure: Measure = FINETUNING) -> list[int]:
        """Where it was scored, ascending."""
        known = (e for e in self.scored if e.measure is measure and e.score is not None)
        return sorted({e.epochs for e in known})

    def epochs_at(self, point: int) -> int:
        """Its epochs after so many parts of its budget; without one, a part is an epoch."""
        return epochs_at(self.exact_end, point, self.spends["parts"]) if self.spends else point

    @property
    def exact_end(self) -> float:
        """Epochs of the whole pretraining; a budget ends within the last one."""
        return self.spends["methods"][self.method]["end"] if self.spends else self.end

    def points(self, measure: Measure) -> set[int]:
        """The parts of its budget after which it was scored."""
        there = set(self.epochs(measure))
        return (
            {p for p in range(self.spends["parts"] + 1) if self.epochs_at(p) in there}
            if self.spends
            else there
        )

    def level(self, epochs: int, measure: Measure) -> Level:
        """Its scores after `epochs`, where it has some; a baseline's are the same after any."""
        there = [one for one in self.scored if one.epochs == epochs or self.is_baseline]
        by_seed: dict[int, list[Evaluation]] = {}
        for one in there:
            if one.measure is measure and one.score is not None:
                by_seed.setdefault(one.run.seed, []).append(one)
        scores = {seed: fmean(e.result[measure.key] for e in by_seed[seed]) for seed in by_seed}
        images: dict[int, Any] = {seed: [e.drawn for e in by_seed[seed]] for seed in by_seed}
        has_areas = all(one is not None for several in images.values() for one in several)
        drawn = {s: sum(images[s]) / len(images[s]) for s in images} if has_areas else {}
        spread = interval(list(scores.values()), list(drawn.values()) or None)
        spent = {n: [cost for e in there if (cost := e.costs[n]) is not None] for n in COSTS}
        costs = {name: fmean(known) if known else None for name, known in spent.items()}
        spread = spread if len(scores) > 1 else None
        scored_on = frozenset(e.images for several in by_seed.values() for e in several)
        return Level(fmean(scores.values()), spread, scores, drawn, costs, scored_on)


def compared_epochs(lines: Sequence[Line], measure: Measure = FINETUNING) -> dict[str, int]:
    """Label -> the epochs after which each line is compared with the others; empty if it cannot be.

    Its own end where all have reached theirs, else the last that all methods have in common: after
    equal epochs, or equal shares of their budgets.
    """
    trained = [line for line in lines if not line.is_baseline]
    ends = {line.label: line.end for line in trained if line.end in line.epochs(measure)}
    if len(ends) < len(trained):
        common = set.intersection(*(line.points(measure) for line in trained))
        ends = {line.label: line.epochs_at(max(common)) for line in trained if common}
    return {line.label: 0 for line in lines if line.is_baseline} | ends if ends else {}


def names_of(all_paths: Sequence[Layout]) -> list[str]:
    """What tells output directories apart: the ends of their paths, unless these are alike."""
    ends = [paths.root.name for paths in all_paths]
    return ends if len(set(ends)) == len(ends) else [str(paths.root) for paths in all_paths]


def _scored(paths: Layout, dataset: str) -> list[Evaluation]:
    finetuned = read_evaluations(paths, dataset=dataset)
    return [*finetuned, *read_evaluations(paths, ProbeResult, dataset)]


def make_lines(all_paths: Sequence[Layout], dataset: str = "") -> list[Line]:
    """All runs sorted into lines; baselines come first, what is untrained among them.

    dataset: unless it is the plans' first. Directories whose settings differ have lines of their
    own, which bear the directory's name.
    """
    apart = len(all_paths) > 1 and not made_alike(all_paths)
    lines: dict[str, Line] = {}

    def line_of(
        run: RunId,
        home: str,
        end: int,
        spends: Spends | None,
        *,
        is_untrained: bool = False,
        is_reference: bool = False,
    ) -> Line:
        suffix = f" ({home})" if home else ""
        label, family = (r.label + suffix for r in (run, replace(run, segments_from=OWN)))
        # Ratios and controls change nothing of the model before the first epoch.
        label = f"untrained {run.method}{suffix}" if is_untrained else label
        spends = spends if spends and run.method in spends["methods"] and not is_untrained else None
        end = math.ceil(spends["methods"][run.method]["end"]) if spends else end
        if is_reference and run.method not in BASELINES:  # whatever its name, it has no ratio
            label = family = f"{run.method}{suffix}"
        source = OWN if is_untrained else run.segments_from
        line = Line(
            label=label, family=family, method=run.method, source=source, home=home, end=end, spends=spends,
            coverage_ratio=run.coverage_ratio, is_untrained=is_untrained,
            is_reference=is_reference,
        )  # fmt: skip
        return lines.setdefault(label, line)

    for paths, name in zip(all_paths, names_of(all_paths), strict=True):
        home, end, spends = name if apart else "", planned_epochs(paths), read_spends(paths)
        for one in _scored(paths, dataset):
            is_untrained = one.epochs == 0 and not one.is_reference
            told = {"is_untrained": is_untrained, "is_reference": one.is_reference}
            line_of(one.run, home, end, spends, **told).scored.append(one)
        records = read_all_records(paths)
        for folder in sorted(paths.pretrain_output.glob("*/")):
            with contextlib.suppress(ValueError):  # not a run's name
                run = RunId.parse(folder.name)
                line_of(as_recorded(run, records), home, end, spends).pretrainings.append(folder)
    rank = method_rank(all_paths)
    families = list(dict.fromkeys(line.family for line in lines.values() if not line.is_baseline))

    def place(line: Line) -> tuple[Any, ...]:
        known = families.index(line.family) if line.family in families else -1
        return not line.is_baseline, rank(line.method), known, SOURCES.index(line.source)

    ordered = sorted(lines.values(), key=place)
    families = list(dict.fromkeys(line.family for line in ordered if not line.is_baseline))
    baselines = [line.label for line in ordered if line.is_baseline]
    for line in ordered:  # a method and its controls share a colour, a source has its marker
        number = -1 if line.is_baseline else families.index(line.family)
        of_family = baselines.index(line.label) if line.is_baseline else SOURCES.index(line.source)
        line.style = (number, of_family)
    return ordered
