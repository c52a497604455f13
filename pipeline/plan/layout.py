"""Every path and name of an output directory: one function builds each, one parses it.

    paths, run = Layout(Path("/runs/a")), RunId(method="four_channels", coverage_ratio=25.0)
    paths.pretrain_dir(run.name)  # /runs/a/pretrain_output/four_channels-cov25

The names of the files inside a step's folder are in common.step_files, where the parts find them.
"""

import re
import typing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Self

from common.options import MOST_SEED
from mae.config import MethodConfig, OptimisationConfig, SegmentsFrom

BASELINES = ("scratch", "mae")  # evaluated at epoch 0, shared by all masking methods
UNTRAINED = "untrained"  # a reference line of each method's own: its model at epoch 0
EVAL_SEEDS_APART = 1_000_000  # so that the finetunings of two pretrainings share no seed
OWN, *CONTROLS = typing.get_args(SegmentsFrom)  # whose segments are hidden
# What a run's name leaves out: pretraining's own defaults.
DEFAULT_RATIO, DEFAULT_SEED = MethodConfig.coverage_ratio, OptimisationConfig.seed
# The controls are known by name, so that a folder that somebody copied aside is no run.
_RUN_NAME = re.compile(
    r"(?P<method>[A-Za-z]\w*)(-cov(?P<coverage>\d+(\.\d+)?))?"
    rf"(-(?P<segments_from>{'|'.join(CONTROLS)}))?(-seed(?P<seed>\d+))?"
)
_ON = "-on-"  # before the name of a dataset that is not the plan's first
_EVAL_NAME = re.compile(
    rf"(?P<run>.+?)_(?P<epochs>\d+)({_ON}(?P<dataset>[\w.]+))?(-evalseed(?P<eval_seed>\d+))?"
)


@dataclass(frozen=True, kw_only=True)
class RunId:
    """What tells one pretraining from another in an output directory.

    A method without segments, and a baseline, count as having the default ones.
    """

    method: str
    coverage_ratio: float | None = DEFAULT_RATIO  # None: it is known that the method uses none
    segments_from: str = OWN
    seed: int = DEFAULT_SEED

    @property
    def name(self) -> str:
        """The method, and what is not the default."""
        ratio, source, seed = self.coverage_ratio, self.segments_from, self.seed
        text = self.method
        text += "" if ratio in (DEFAULT_RATIO, None) else f"-cov{ratio_text(ratio)}"
        text += "" if source == OWN else f"-{source}"
        return text + ("" if seed == DEFAULT_SEED else f"-seed{seed}")

    @property
    def label(self) -> str:
        """In words: what the runs of all seeds have in common."""
        ratio, source = self.coverage_ratio, self.segments_from
        text = self.method + ("" if ratio is None else f" {ratio_text(ratio)}%")
        return text + ("" if source == OWN else f" {source}")

    @classmethod
    def parse(cls, name: str) -> Self:
        """The inverse of `name`. Raises ValueError for a name that is not a run's."""
        match = _RUN_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not a run name such as four_channels-cov25-seed1")
        return cls(
            method=match["method"], coverage_ratio=float(match["coverage"] or DEFAULT_RATIO),
            segments_from=match["segments_from"] or OWN, seed=int(match["seed"] or DEFAULT_SEED),
        )  # fmt: skip


def ratio_text(ratio: float) -> str:
    """All digits of a ratio: no exponent, whose "-" would stand for a part of the name."""
    return f"{Decimal(repr(ratio)).normalize():f}"


def seed_of_eval(seed: int, number: int) -> int:
    """Of the finetuning with that number, from 0, of a pretraining with that seed."""
    return (seed + number * EVAL_SEEDS_APART) % (MOST_SEED + 1)


def eval_name(run: str, epochs: int, eval_seed: int = 0, dataset: str = "") -> str:
    """The name of an evaluation; eval_seed counts the finetunings of one checkpoint from 0.

    dataset: its name, unless it is the plan's first.
    """
    on = f"{_ON}{dataset}" if dataset else ""
    return f"{run}_{epochs}{on}" + (f"-evalseed{eval_seed}" if eval_seed else "")


def parse_eval_name(name: str, dataset: str = "") -> tuple[RunId, int, int]:
    """The inverse: run, epochs completed, eval_seed; ValueError for a name that is none of the dataset's."""
    match = _EVAL_NAME.fullmatch(name)
    if match is None or (match["dataset"] or "") != dataset:
        raise ValueError(f"{name!r} is not an evaluation such as four_channels_5")
    return RunId.parse(match["run"]), int(match["epochs"]), int(match["eval_seed"] or 0)


def dataset_of(name: str) -> str:
    """The dataset in the name of an evaluation, or of its step; "" of the plan's first, or of none."""
    match = _EVAL_NAME.fullmatch(name)
    return (match and match["dataset"]) or ""


class Layout:
    """The paths below one output directory. `run` is a run's name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # What a user looks for.
        self.run_yml = root / "run.yml"  # the settings, versions and hardware
        self.results_csv = root / "results.csv"  # one row per evaluation
        self.preregistration = root / "preregistration.yml"  # a plan that was frozen before the run
        self.report_html = root / "report.html"  # the page that answers the question
        self.pretrain_output = root / "pretrain_output"  # a folder for each run
        self.probe_output = root / "probe_output"  # a folder for each checkpoint that was probed
        self.eval_output = root / "eval_output"  # a folder for each evaluation
        self.segments = root / "segments.sqlite"  # if their own folder cannot be written to
        # Bookkeeping.
        self.bookkeeping = root / ".segmae"
        self.lock = self.bookkeeping / "lock"  # who is running here
        self.plan = self.bookkeeping / "plan.json"  # the steps of the latest call
        self.records = self.bookkeeping / "steps"
        self.slurm = self.bookkeeping / "slurm"  # submitit's: pickled jobs and their logs

    def pretrain_dir(self, run: str) -> Path:
        """One pretraining run's folder."""
        return self.pretrain_output / run

    def probe_dir(self, run: str, epochs: int, dataset: str = "") -> Path:
        """One probe's folder."""
        return self.probe_output / eval_name(run, epochs, dataset=dataset)

    def eval_dir(self, run: str, epochs: int, eval_seed: int = 0, dataset: str = "") -> Path:
        """One evaluation's folder."""
        return self.eval_output / eval_name(run, epochs, eval_seed, dataset)

    def record(self, step_name: str) -> Path:
        """One step's record."""
        return self.records / f"{step_name}.json"


def is_run_yml(head: bytes) -> bool:
    """Whether a file that begins so is a run.yml, of any version."""
    return head.startswith((b"settings:", b"command:"))


def is_results_csv(head: bytes) -> bool:
    """The same of results.csv."""
    return head.startswith(b"method,")


def is_report(head: bytes) -> bool:
    """The same of a page of the report."""
    return b"<title>SegMAE: " in head
