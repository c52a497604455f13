"""What is known of each step, and which settings it binds later calls to.

A step's record is a small JSON file; the plan of the latest call, and run.yml, are kept beside. A
step counts as done when its record says so, its outputs are there with the recorded sizes, and it
was made with the settings that are asked for now (`is_done`).

What binds what: everything in an output directory is made alike (`differences`), so that one report
may compare it. A new step has to agree with every finished step of its kind in all settings but
those that tell runs and checkpoints apart (`MAY_DIFFER`); with its own earlier attempt, and with
the rounds of its own pretraining, in those too.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from common.files import write_json, write_text
from common.formats import StepProgress, read_json
from common.options import REQUIRED, fields_of
from common.options import differences as differing_settings
from common.step_files import PROGRESS
from mae.config import GROUPS as PRETRAIN_GROUPS
from mae.config import idle_settings
from pipeline.plan.layout import Layout
from pipeline.plan.machine import hardware, versions
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Step
from segmenter.config import GROUPS as FINETUNE_GROUPS
from segmenter.config import PROBE_GROUPS, recipe_names, recipe_values

# Settings in which the steps of a kind may differ within one output directory, or one report.
MAY_DIFFER = {
    "pretrain": frozenset({"mask_method", "coverage_ratio", "segments_from", "seed"}),
    "probe": frozenset({"init", "patch_size", "seed"}),
    "evaluate": frozenset({"init", "patch_size", "seed"}),
}
_GROUPS = {"pretrain": PRETRAIN_GROUPS, "probe": PROBE_GROUPS, "evaluate": FINETUNE_GROUPS}

StepState = Literal["submitted", "running", "done", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step's state, kept in .segmae/steps/<name>.json."""

    name: str
    state: StepState
    run: str  # the name of the run that the step belongs to
    kind: str
    # The step's settings; in an earlier version's records, what of them was given, as text.
    fingerprint: Mapping[str, Any]
    # Path relative to the output directory -> bytes; filled in when done.
    outputs: Mapping[str, int] = field(default_factory=dict)
    exit_code: int | None = None
    started: float = 0.0  # Unix seconds at which the latest attempt began
    seconds: Annotated[FiniteFloat, Field(le=1e12)] = 0.0  # wall, over all finished attempts
    # GPUs, or 1 for the CPU: seconds x devices are the GPU-hours.
    devices: Annotated[int, Field(ge=0, le=10**6)] = 1
    attempts: int = 0
    host: str = ""
    pid: int = 0  # of the latest attempt's child process
    job_id: str = ""  # Slurm's, where there is one
    message: str = ""  # of a failed step: what happened, with the last lines of its log

    @classmethod
    def of(cls, step: Step, state: StepState, earlier: Record | None, **more: Any) -> Record:
        """A new attempt at a step; earlier: what is known of those before."""
        return cls(
            name=step.name, state=state, run=step.run, kind=step.kind, fingerprint=step.settings,
            seconds=earlier.seconds if earlier else 0.0,
            attempts=(earlier.attempts if earlier else 0) + (state == "running"),
            devices=step.devices, **more,
        )  # fmt: skip

    @property
    def method(self) -> str | None:
        """The masking method of a pretraining; other steps have none."""
        method = self.fingerprint.get("mask_method")
        return None if method is None else str(method)  # what a file holds may be anything


class PlannedStep(TypedDict):
    """What plan.json keeps of a step. folder: relative to the output directory."""

    name: str
    needs: list[str]
    folder: str


def read_record(paths: Layout, step_name: str) -> Record | None:
    """The step's record, or None if it never started; ValueError if the file is damaged."""
    try:
        record: Record = read_json(paths.record(step_name), Record)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; remove it to go on") from None
    return record


def read_all_records(paths: Layout) -> list[Record]:
    """All records of an output directory, by name."""
    names = sorted(path.stem for path in paths.records.glob("*.json"))
    found = [read_record(paths, name) for name in names]
    return [record for record in found if record is not None]


def write_record(paths: Layout, record: Record) -> None:
    """Replaces the step's record."""
    write_json(paths.record(record.name), asdict(record))


def write_run_files(chosen: Settings, steps: Iterable[Step], paths: Layout) -> None:
    """run.yml for people, plan.json for `status` and the report."""
    content = {
        "settings": chosen.flat(),
        "command": shlex.join(sys.argv),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_text(paths.run_yml, yaml.safe_dump(content, sort_keys=False))
    planned = [
        PlannedStep(name=s.name, needs=list(s.needs), folder=os.path.relpath(s.folder, paths.root))
        for s in steps
    ]
    write_json(paths.plan, planned)


def read_plan(paths: Layout) -> list[PlannedStep]:
    """The steps of the latest call; raises ValueError where no run has been."""
    try:
        return read_json(paths.plan, Annotated[list[PlannedStep], Field(min_length=1)])
    except FileNotFoundError:
        raise ValueError(f"{paths.root} is not the output directory of a run") from None
    except ValueError as error:
        raise ValueError(f"{error}; call benchmark.py again") from None


def epochs_reached(step: Step) -> float:
    """How far its run is, in epochs, by the progress file. Raises ValueError for a damaged one."""
    try:
        return float(read_json(step.folder / PROGRESS, StepProgress).get("epoch", 0))
    except FileNotFoundError:
        return 0.0


def output_sizes(step: Step, paths: Layout) -> dict[str, int]:
    """Sizes of the step's outputs; raises FileNotFoundError naming those missing or empty."""
    missing = [path for path in step.outputs if not path.is_file() or path.stat().st_size == 0]
    if missing:
        raise FileNotFoundError(", ".join(str(path) for path in missing))
    return {os.path.relpath(path, paths.root): path.stat().st_size for path in step.outputs}


def is_done(step: Step, paths: Layout) -> bool:
    """Whether the step needs no more work: recorded as done, outputs whole, settings equal."""
    record = read_record(paths, step.name)
    # A step of an earlier call may bear the name: then it was made otherwise, and is done again.
    if record is None or record.state != "done" or other_settings(step, record):
        return False
    try:
        return output_sizes(step, paths) == record.outputs
    except FileNotFoundError:
        return False


def other_settings(step: Step, record: Record, leave_out: Collection[str] = ()) -> list[str]:
    """`name: stored -> wanted` for what the step would make otherwise than the record's did."""
    wanted = {name: value for name, value in step.settings.items() if name not in leave_out}
    return differing_settings(record.fingerprint, wanted, _older(record))


def differences(steps: Sequence[Step], paths: Layout) -> list[str]:
    """How the settings differ from those the output directory's steps were made with."""
    records, found = list(_binding(paths)), []
    # Hundreds of steps share all but MAY_DIFFER: one of each such kind is compared with one.
    several = {(record.kind, record.method, _shared(record)): record for record in records}
    compared = {(step.kind, _shared(step)): step for step in reversed(steps)}
    for step in steps:
        for record in records:
            is_round = step.kind == "pretrain" == record.kind and step.run == record.run
            if is_round or step.name == record.name:
                found += [f"{step.run}: {text}" for text in other_settings(step, record)]
    for step in reversed(compared.values()):
        for record in several.values():
            if record.kind == step.kind:
                leave_out = MAY_DIFFER[step.kind] | idle_settings(record.method)
                whose = "" if record.run == step.run else f" (of {record.run})"
                other = other_settings(step, record, leave_out)
                found += [f"{step.run}: {text}{whose}" for text in other]
    return list(dict.fromkeys(found))


def made_alike(all_paths: Sequence[Layout]) -> bool:
    """Whether what these directories hold may stand on one line of a report."""
    first: dict[str, Record] = {}  # of each kind: being alike is transitive
    for record in (record for paths in all_paths for record in _binding(paths)):
        other, older = first.setdefault(record.kind, record), _older(record)
        leave_out = {
            *MAY_DIFFER[record.kind], *idle_settings(record.method), *idle_settings(other.method)
        }  # fmt: skip
        known = {name: record.fingerprint.get(name, older[name]) for name in older}
        wanted = {name: value for name, value in known.items() if name not in leave_out}
        if differing_settings(other.fingerprint, wanted, _older(other)):
            return False
    return True


def _older(record: Record) -> dict[str, Any]:
    """What each setting counts as where an earlier version's record does not have it.

    Such a record holds what was given only. The rest was the recipe's, or the option's default,
    unless the option says (`older`) that it came later and what the behaviour before it was.
    """
    recipe = _recipe(str(record.fingerprint.get("recipe")))
    older = {}
    for name, known in fields_of(*_GROUPS.get(record.kind, {}).values()).items():
        is_new = known.older != known.default
        value = known.older if is_new else recipe.get(name, known.default)
        older[name] = None if value is REQUIRED else value
    return older


@cache  # those of the project do not change while it runs
def _recipe(name: str) -> dict[str, Any]:
    return recipe_values(name) if name in recipe_names() else {}


def _shared(made: Step | Record) -> str:
    """What steps of a kind have in common, as text that can be looked up."""
    values = made.settings if isinstance(made, Step) else made.fingerprint
    kept = values.keys() - MAY_DIFFER.get(made.kind, frozenset())
    return json.dumps({name: values[name] for name in sorted(kept)})


def _binding(paths: Layout) -> Iterator[Record]:
    return (record for record in read_all_records(paths) if _binds(record, paths))


def _binds(record: Record, paths: Layout) -> bool:
    """Whether later calls have to keep to its settings.

    Not when what it made was removed, a pretraining's scores included, and not when it is a score
    that came to nothing: that one's own part judges whether it can go on with others.
    """
    scores = {"evaluate": paths.eval_output, "probe": paths.probe_output}
    if record.kind == "pretrain":
        of_run = f"{record.run}_[0-9]*"
        # Scores outlive the pretraining that may be removed to make room.
        scored = any(any(folder.glob(of_run)) for folder in scores.values())
        return paths.pretrain_dir(record.run).exists() or scored
    if record.kind not in scores:  # segments and downloads
        return False
    folder = scores[record.kind] / record.name.removeprefix(f"{record.kind}_")
    return folder.exists() and record.state not in ("failed", "stopped")
