"""What is known of each step: one small JSON file per step, and the plan of the latest call.

A step counts as done when its record says so, its outputs are there with the recorded sizes, and
it was made with the settings that are asked for now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from common import made_alike as settings
from common.files import write_json
from common.parsed import read_json
from pipeline.plan.layout import (
    BASELINES,
    DEFAULT_RATIO,
    DEFAULT_SEED,
    OWN,
    Layout,
    Run,
    parse_eval_name,
)
from pipeline.plan.parts import Facts
from pipeline.plan.steps import Step

# Settings in which the steps of a kind may differ within one output directory, or one report.
MAY_DIFFER = {
    "pretrain": frozenset({"mask_method", "coverage_ratio", "segments_from", "seed"}),
    "probe": frozenset({"init", "patch_size", "seed"}),
    "evaluate": frozenset({"init", "patch_size", "seed"}),
}

State = Literal["submitted", "running", "done", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step's state, kept in .segmae/steps/<name>.json."""

    name: str
    state: State
    run: str
    """Name of the run that the step belongs to."""
    kind: str
    fingerprint: Mapping[str, Any]
    """The step's settings; in an earlier version's records, what of them was given, as text."""
    outputs: Mapping[str, int] = field(default_factory=dict)
    """Path relative to the output directory -> bytes; filled in when done."""
    exit_code: int | None = None
    started: float = 0.0
    """Unix seconds at which the latest attempt began."""
    seconds: Annotated[FiniteFloat, Field(le=1e12)] = 0.0
    """Wall seconds over all finished attempts."""
    devices: Annotated[int, Field(ge=0, le=10**6)] = 1
    """GPUs, or 1 for the CPU: seconds x devices are the GPU-hours."""
    attempts: int = 0
    host: str = ""
    pid: int = 0
    """Of the latest attempt's child process."""
    job_id: str = ""
    """Slurm job, where there is one."""
    message: str = ""
    """For a failed step: what happened, with the last lines of its log."""

    @classmethod
    def of(cls, step: Step, state: State, earlier: Record | None, **more: Any) -> Record:
        """A new attempt at a step; earlier: what is known of those before."""
        return cls(
            name=step.name, state=state, run=step.run, kind=step.kind, fingerprint=step.settings,
            seconds=earlier.seconds if earlier else 0.0,
            attempts=(earlier.attempts if earlier else 0) + (state == "running"),
            devices=step.devices, **more,
        )  # fmt: skip

    @property
    def pretraining(self) -> Run:
        """What tells its run from others, by its settings: names may be an earlier version's."""
        eval_seed = 0  # an evaluation's seed is its pretraining's and the number of the finetuning
        if self.kind == "evaluate":
            eval_seed = parse_eval_name(self.name.removeprefix("evaluate_"))[2]
        method = self.fingerprint.get("mask_method", Run.parse(self.run).method)
        if not isinstance(method, str):
            raise ValueError(f"mask_method is {method!r}")
        return Run(
            method=method,
            coverage_ratio=float(self.fingerprint.get("coverage_ratio", DEFAULT_RATIO)),
            segments_from=str(self.fingerprint.get("segments_from", OWN)),
            seed=int(self.fingerprint.get("seed", DEFAULT_SEED)) - eval_seed,
        )


def read_record(paths: Layout, step_name: str) -> Record | None:
    """The step's record, or None if it never started; ValueError if the file is damaged."""
    path = paths.record(step_name)
    try:
        record = read_json(path, Record)
        try:
            _ = record.pretraining
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        return record
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; remove it to go on") from None


def read_all_records(paths: Layout) -> list[Record]:
    """All records of an output directory, by name."""
    names = sorted(path.stem for path in paths.records.glob("*.json"))
    found = [read_record(paths, name) for name in names]
    return [record for record in found if record is not None]


def write_record(paths: Layout, record: Record) -> None:
    """Replaces the step's record."""
    write_json(paths.record(record.name), asdict(record))


def write_plan(paths: Layout, steps: Iterable[Step]) -> None:
    """Keeps the plan, for `status` and the report."""
    kept = [
        PlannedStep(name=s.name, needs=list(s.needs), folder=os.path.relpath(s.folder, paths.root))
        for s in steps
    ]
    write_json(paths.plan, kept)


class PlannedStep(TypedDict):
    """What plan.json keeps of a step. folder: relative to the output directory."""

    name: str
    needs: list[str]
    folder: str


def read_plan(paths: Layout) -> list[PlannedStep]:
    """The steps of the latest call; raises ValueError where no run has been."""
    try:
        return read_json(paths.plan, Annotated[list[PlannedStep], Field(min_length=1)])
    except FileNotFoundError:
        raise ValueError(f"{paths.root} is not the output directory of a run") from None
    except ValueError as error:
        raise ValueError(f"{error}; call benchmark.py again") from None


def output_sizes(step: Step, paths: Layout) -> dict[str, int]:
    """Sizes of the step's outputs; raises FileNotFoundError naming those missing or empty."""
    missing = [path for path in step.outputs if not path.is_file() or path.stat().st_size == 0]
    if missing:
        raise FileNotFoundError(", ".join(str(path) for path in missing))
    return {os.path.relpath(path, paths.root): path.stat().st_size for path in step.outputs}


def is_done(step: Step, paths: Layout) -> bool:
    """Whether the step needs no more work: recorded as done, outputs whole, settings equal."""
    record = read_record(paths, step.name)
    if record is None or record.state != "done" or other_settings(step, record):
        return False
    try:
        return output_sizes(step, paths) == record.outputs
    except FileNotFoundError:
        return False


def other_settings(step: Step, record: Record, leave_out: Collection[str] = ()) -> list[str]:
    """`name: stored -> wanted` for what the step would make otherwise than the record's did."""
    wanted = {name: v for name, v in step.settings.items() if name not in leave_out}
    return settings.differences(record.fingerprint, wanted, step.older)


def differences(steps: Iterable[Step], paths: Layout, facts: Facts) -> list[str]:
    """How the settings differ from those the output directory's steps were made with.

    What is compared in one report has to be made alike, so a step is compared with all of its kind;
    only what tells runs and checkpoints apart may differ between them.
    """
    records = [(record, _shared(record.kind, record.fingerprint)) for record in _binding(paths)]
    found, compared = [], set()
    for step in steps:
        mine = _shared(step.kind, step.settings)
        for record, theirs in records:
            if record.kind != step.kind:
                continue
            own_run, leave_out = record.run == step.run, frozenset[str]()
            if record.name != step.name and not (own_run and step.kind == "pretrain"):
                leave_out = MAY_DIFFER[record.kind] | facts.idle(_method(record))
            pair = (step.kind, mine, theirs, _method(record))  # hundreds of steps are alike
            if leave_out and pair in compared:
                continue
            compared.add(pair)
            whose = "" if own_run else f" (of {record.run})"
            found += [f"{step.run}: {d}{whose}" for d in other_settings(step, record, leave_out)]
    return list(dict.fromkeys(found))


def made_alike(all_paths: Sequence[Layout], facts: Facts) -> bool:
    """Whether what these directories hold may stand on one line of a report."""
    kept: dict[str, Record] = {}
    for record in (record for paths in all_paths for record in _binding(paths)):
        first = kept.setdefault(record.kind, record)
        _, older = facts.resolve(record.kind, record.fingerprint)
        leave_out = MAY_DIFFER[record.kind].union(
            *(facts.idle(_method(r)) for r in (first, record))
        )
        wanted = {n: record.fingerprint.get(n, older[n]) for n in older.keys() - leave_out}
        if settings.differences(first.fingerprint, wanted, older):
            return False
    return True


def _shared(kind: str, values: Mapping[str, Any]) -> str:
    """What all steps of a kind have in common, to be compared at once."""
    left_out = MAY_DIFFER.get(kind, frozenset())
    return json.dumps({n: values[n] for n in sorted(values.keys() - left_out)})


def _method(record: Record) -> str | None:
    return record.fingerprint.get("mask_method")


def _binding(paths: Layout) -> list[Record]:
    return [r for r in read_all_records(paths) if r.kind in MAY_DIFFER and _binds(r, paths)]


def _binds(record: Record, paths: Layout) -> bool:
    """Whether later calls have to keep to a pretraining's, a probe's or an evaluation's settings.

    Not when what it made was removed, a pretraining's scores included, and not when it is a score
    that came to nothing: that one's own part judges whether it can go on with others.
    """
    scores = {"evaluate": paths.eval_output, "probe": paths.probe_output}
    if record.kind == "pretrain":
        of_run = f"{record.run}_[0-9]*"
        scored = any(any(folder.glob(of_run)) for folder in scores.values())
        return paths.pretrain_dir(record.run).exists() or scored
    folder = scores[record.kind] / record.name.removeprefix(f"{record.kind}_")
    return folder.exists() and record.state not in ("failed", "stopped")


def made_runs(paths: Layout) -> dict[Run, str]:
    """The names of the runs that are there: an earlier version named what varied within a call."""
    found: dict[Run, str] = {}
    for record in read_all_records(paths):
        is_baseline = Run.parse(record.run).method in BASELINES
        if record.kind != ("evaluate" if is_baseline else "pretrain"):
            continue
        if _binds(record, paths) or record.state == "submitted":
            found.setdefault(record.pretraining, record.run)
    return found
