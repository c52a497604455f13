"""Every path and file name of an output directory: one function builds each, one parses it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

BASELINES = ("scratch", "mae")  # evaluated at epoch 0, shared by all masking methods
_CHECKPOINT = re.compile(r"checkpoint-(\d+)\.pth")
_RECONSTRUCTIONS = re.compile(r"reconstructions-(\d+)\.png")
_EVAL_NAME = re.compile(r"(?P<run>.+)_(?P<epochs>\d+)")
_RUN_NAME = re.compile(
    r"(?P<method>[a-z][a-z_]*)(-cov(?P<coverage>\d+(\.\d+)?))?(-seed(?P<seed>\d+))?"
)


@dataclass(frozen=True, kw_only=True)
class RunName:
    """A run's name taken apart; parts that do not vary within a call are None."""

    method: str
    coverage_ratio: float | None = None
    seed: int | None = None

    def __str__(self) -> str:
        coverage = "" if self.coverage_ratio is None else f"-cov{self.coverage_ratio:g}"
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.method}{coverage}{seed}"

    @classmethod
    def parse(cls, text: str) -> RunName:
        """The inverse of `str`; raises ValueError for a name that is not a run's."""
        match = _RUN_NAME.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a run name such as four_channels-cov15-seed0")
        coverage, seed = match["coverage"], match["seed"]
        return cls(
            method=match["method"],
            coverage_ratio=None if coverage is None else float(coverage),
            seed=None if seed is None else int(seed),
        )


def checkpoint_epochs(path: Path) -> int | None:
    """Epochs completed in a checkpoint, read off its file name; None for other files."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def reconstructions_epochs(path: Path) -> int | None:
    """Epochs completed when a reconstruction image was drawn; None for other files."""
    match = _RECONSTRUCTIONS.fullmatch(path.name)
    return int(match[1]) if match else None


def parse_eval_name(name: str) -> tuple[RunName, int]:
    """Run and epochs completed of an evaluation's folder name; ValueError if it is not one."""
    match = _EVAL_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not an evaluation such as four_channels_5")
    return RunName.parse(match["run"]), int(match["epochs"])


@dataclass(frozen=True)
class Layout:
    """The paths below one output directory."""

    root: Path

    # What a user looks for.
    @property
    def run_yml(self) -> Path:
        """The resolved settings, versions and hardware."""
        return self.root / "run.yml"

    @property
    def results_csv(self) -> Path:
        """One row per evaluation."""
        return self.root / "results.csv"

    @property
    def report_html(self) -> Path:
        """The page that answers the question."""
        return self.root / "report.html"

    @property
    def pretrain_output(self) -> Path:
        """The folder of all pretraining runs."""
        return self.root / "pretrain_output"

    @property
    def eval_output(self) -> Path:
        """The folder of all evaluations."""
        return self.root / "eval_output"

    def pretrain_dir(self, run: RunName) -> Path:
        """One pretraining run's folder."""
        return self.pretrain_output / str(run)

    def checkpoint(self, run: RunName, epochs: int) -> Path:
        """The checkpoint that a round leaves; `epochs` are the epochs completed."""
        return self.pretrain_dir(run) / f"checkpoint-{epochs}.pth"

    def reconstructions(self, run: RunName, epochs: int) -> Path:
        """The reconstructions drawn with that checkpoint."""
        return self.pretrain_dir(run) / f"reconstructions-{epochs}.png"

    def official_checkpoint(self, model: str) -> Path:
        """The official MAE release checkpoint that `--stack` starts from."""
        return self.pretrain_output / f"mae_pretrain_{model}.pth"

    def eval_dir(self, run: RunName, epochs: int) -> Path:
        """One evaluation's folder."""
        return self.eval_output / f"{run}_{epochs}"

    # Bookkeeping.
    @property
    def bookkeeping(self) -> Path:
        """The lock, the plan and the step records."""
        return self.root / ".segmae"

    @property
    def lock(self) -> Path:
        """Who is running here."""
        return self.bookkeeping / "lock"

    @property
    def plan(self) -> Path:
        """The steps of the latest call, for `status`."""
        return self.bookkeeping / "plan.json"

    @property
    def records(self) -> Path:
        """The folder of the step records."""
        return self.bookkeeping / "steps"

    def record(self, step_name: str) -> Path:
        """One step's record."""
        return self.records / f"{step_name}.json"

    @property
    def slurm(self) -> Path:
        """Submitit's folder: pickled jobs and their logs."""
        return self.bookkeeping / "slurm"


# The files inside a step's folder, the same for both parts.
def console_log(folder: Path) -> Path:
    """What the step printed."""
    return folder / "console.log"


def epoch_log(folder: Path) -> Path:
    """One JSON object per epoch."""
    return folder / "log.txt"


def progress(folder: Path) -> Path:
    """Where the step is now."""
    return folder / "progress.json"


def result(folder: Path) -> Path:
    """An evaluation's scores; written last."""
    return folder / "result.json"


def predictions(folder: Path) -> Path:
    """Some validation images with their predicted classes."""
    return folder / "predictions.png"
