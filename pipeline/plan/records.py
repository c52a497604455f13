"""What is known of each step, and which settings it binds later calls to.

A step's record is a small JSON file; the plan of the latest call, and run.yml, are kept beside. A
step counts as done when its record says so, its outputs are there with the recorded sizes, and it
was made with the settings that are asked for now (`is_done`).

What binds what: everything in an output directory is made alike (`differences`), so that one report
may compare it. A step has to agree with its own earlier attempt, and with the rounds of its own
pretraining, in all settings. One that is new has to agree with the finished steps of its kind in
all but those that tell runs and checkpoints apart (`MAY_DIFFER`).
"""

import os
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from common.files import write_json, write_text
from common.formats import StepProgress, parsed_plain, read_json, read_yaml
from common.options import REQUIRED, fields_of
from common.options import differences as differing_settings
from common.step_files import PROGRESS
from mae.config import GROUPS as PRETRAIN_GROUPS
from mae.config import PretrainConfig, idle_settings, make_method, training_flops
from pipeline.plan.layout import Layout, dataset_of
from pipeline.plan.machine import code_digest, hardware, versions
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step
from segmenter.config import GROUPS as FINETUNE_GROUPS
from segmenter.config import PROBE_GROUPS, recipe_names, recipe_values

# Settings in which the steps of a kind may differ within one output directory, or one report.
MAY_DIFFER = {
    "pretrain": frozenset({"mask_method", "coverage_ratio", "segments_from", "seed"}),
    "probe": frozenset({"init", "patch_size", "seed", "model"}),  # encoders of others have their own
    "evaluate": frozenset({"init", "patch_size", "seed", "model"}),
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
    gone: Sequence[str] = ()  # of these, what --keep has removed: it counts as done
    exit_code: int | None = None
    started: float = 0.0  # Unix seconds at which the latest attempt began
    seconds: Annotated[FiniteFloat, Field(le=1e12)] = 0.0  # wall, over all finished attempts
    # GPUs, or 1 for the CPU: seconds x devices are the GPU-hours.
    devices: Annotated[int, Field(ge=0, le=10**6)] = 1
    attempts: int = 0
    host: str = ""
    pid: int = 0  # of the latest attempt's child process
    job_id: str = ""  # Slurm's, where there is one
    code: str = ""  # digest of the sources, and of the images that it trains or scores on
    images: str = ""
    message: str = ""  # of a failed step: what happened, with the last lines of its log

    @classmethod
    def of(cls, step: Step, state: StepState, earlier: Self | None, **more: Any) -> Self:
        """A new attempt at a step; earlier: what is known of those before."""
        return cls(
            name=step.name, state=state, run=step.run, kind=step.kind, fingerprint=step.settings,
            seconds=earlier.seconds if earlier else 0.0,
            attempts=(earlier.attempts if earlier else 0) + (state == "running"),
            devices=step.devices, code=code_digest(step.plugin),
            images=step.facts.digest if step.facts else earlier.images if earlier else "", **more,
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
        return cast(Record, read_json(paths.record(step_name), Record))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; remove it to go on") from None


def read_all_records(paths: Layout) -> list[Record]:
    """All records of an output directory, by name."""
    files = sorted(paths.records.glob("*.json"))
    return [record for file in files if (record := read_record(paths, file.stem))]


def write_record(paths: Layout, record: Record) -> None:
    """Replaces the step's record."""
    write_json(paths.record(record.name), asdict(record))


def write_run_files(chosen: Settings, steps: Iterable[Step], paths: Layout) -> None:
    """run.yml for people, plan.json for `status` and the report."""
    content = {"settings": chosen.flat(), "command": shlex.join(sys.argv)}
    content |= {"versions": versions(), "hardware": hardware()}
    if spends := _spends(chosen, steps):
        content["budget"] = spends
    write_text(paths.run_yml, yaml.safe_dump(content, sort_keys=False))
    write_json(paths.plan, [
        PlannedStep(name=s.name, needs=list(s.needs), folder=os.path.relpath(s.folder, paths.root))
        for s in steps
    ])  # fmt: skip


def _spends(chosen: Settings, steps: Iterable[Step]) -> dict[str, Any]:
    """The budget as the report, and the same command again, need it; empty where there is none."""
    found, budget = {}, chosen.experiment.shared_budget
    for step in steps:
        if isinstance(config := step.config, PretrainConfig) and "budget" in step.settings:
            of_image = training_flops(config.model, make_method(config.method, config.model))
            flops = of_image * config.optimisation.effective_batch_size
            found[config.method.mask_method] = {"end": config.optimisation.end, "flops_per_step": flops}
    if budget is None or not found:
        return {}
    return {
        "asked": str(budget), "parts": budget.parts,
        "count_segments": chosen.experiment.count_segments, "methods": found,
    }  # fmt: skip


class _OfMethod(TypedDict):
    end: Annotated[FiniteFloat, Field(gt=0)]
    flops_per_step: Annotated[FiniteFloat, Field(gt=0)]


class Spends(TypedDict):
    """run.yml's budget. methods: the epochs of each, and what an optimizer step of it costs."""

    asked: str
    parts: Annotated[int, Field(ge=1)]
    count_segments: bool
    methods: dict[str, _OfMethod]


def read_spends(paths: Layout) -> Spends | None:
    """Of the latest call; None where it had no budget. Raises ValueError for a damaged run.yml."""
    content = read_yaml(paths.run_yml) if paths.run_yml.exists() else {}
    if "budget" not in content:
        return None
    return cast(Spends, parsed_plain(Spends, content["budget"], f"{paths.run_yml} is damaged: budget"))


def read_plan(paths: Layout) -> list[PlannedStep]:
    """The steps of the latest call; raises ValueError where no run has been."""
    try:
        return read_json(paths.plan, Annotated[list[PlannedStep], Field(min_length=1)])
    except FileNotFoundError:
        raise ValueError(f"{paths.root} is not the output directory of a run") from None
    except ValueError as error:
        raise ValueError(f"{error}; call benchmark.py again") from None


def read_progress(folder: Path) -> dict[str, Any]:
    """A step's progress.json, empty if it has not written one. Raises ValueError for a damaged."""
    try:
        return read_json(folder / PROGRESS, StepProgress)
    except FileNotFoundError:
        return {}


def output_sizes(step: Step, paths: Layout) -> dict[str, int]:
    """The step's outputs, by paths relative to the output directory: bytes, 0 for one missing."""
    sizes = {path: path.stat().st_size if path.is_file() else 0 for path in step.outputs}
    return {os.path.relpath(path, paths.root): size for path, size in sizes.items()}


def is_done(step: Step, paths: Layout) -> bool:
    """Whether the step needs no more work: recorded as done, outputs whole, settings equal."""
    record = read_record(paths, step.name)
    # A step of an earlier call may bear the name: then it was made otherwise, and is done again.
    if record is None or record.state != "done" or other_settings(step.settings, record):
        return False
    sizes, recorded = output_sizes(step, paths), record.outputs
    return sizes.keys() == recorded.keys() and all(
        size == recorded[path] or (path in record.gone and not size) for path, size in sizes.items()
    )


def other_settings(wanted: Mapping[str, Any], record: Record, leave_out: Collection[str] = ()) -> list[str]:
    """`name: stored -> wanted` for the settings in which the record's step was made otherwise."""
    compared = {name: value for name, value in wanted.items() if name not in leave_out}
    return differing_settings(_made_with(record), compared, {})


def differences(steps: Sequence[Step], paths: Layout) -> list[str]:
    """How the settings differ from those the output directory's steps were made with."""
    records, found = _binding(paths), []
    # Those of one kind and method are alike: a new step is compared with one of them.
    one_of_each = {(r.kind, r.method, dataset_of(r.name)): r for r in records}.values()
    for step in steps:
        of_run = [r for r in records if (r.kind, r.run) == (step.kind, step.run)]
        # All rounds of a pretraining are one training; a score is compared with itself.
        own = [r for r in of_run if step.kind == "pretrain" or r.name == step.name]
        others_of_kind = [
            r for r in one_of_each if r.kind == step.kind and dataset_of(r.name) == dataset_of(step.name)
        ]
        for record in own or others_of_kind:
            different = _may_differ(step.kind, record.fingerprint, step.settings)
            leave_out = () if own else different | idle_settings(record.method)
            whose = "" if record.run == step.run else f" (of {record.run})"
            others = other_settings(step.settings, record, leave_out)
            found += [f"{step.run}: {text}{whose}" for text in others]
    return list(dict.fromkeys(found))


def made_alike(all_paths: Sequence[Layout]) -> bool:
    """Whether what these directories hold may stand on one line of a report."""
    first: dict[tuple[str, str], Record] = {}  # of each kind and dataset: being alike is transitive
    for record in chain.from_iterable(map(_binding, all_paths)):
        other = first.setdefault((record.kind, dataset_of(record.name)), record)
        idle = _may_differ(record.kind, record.fingerprint, other.fingerprint)
        idle = idle | idle_settings(record.method) | idle_settings(other.method)
        if other_settings(_made_with(record), other, idle):
            return False
    return True


def _may_differ(kind: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> frozenset[str]:
    """Also the epochs, where both pretrainings spend one budget."""
    is_bound = one.get("budget") is not None and one.get("budget") == two.get("budget")
    return MAY_DIFFER[kind] | ({"epochs", "last_epoch"} if is_bound else frozenset())


def _made_with(record: Record) -> dict[str, Any]:
    """All settings. An earlier version's record holds, as text, only what was given.

    The rest was the recipe's, or the option's default, unless the option says (`older`) that it
    came later and what the behaviour before it was.
    """
    recipe, made = _recipe(str(record.fingerprint.get("recipe"))), dict[str, Any]()
    for name, known in fields_of(*_GROUPS.get(record.kind, {}).values()).items():
        is_new = known.older != known.default
        value = known.counts_as(record.fingerprint) if is_new else recipe.get(name, known.default)
        made[name] = None if value is REQUIRED else value
    return {**made, **record.fingerprint}


@cache  # those of the project do not change while it runs
def _recipe(name: str) -> dict[str, Any]:
    return recipe_values(name) if name in recipe_names() else {}


def _binding(paths: Layout) -> list[Record]:
    """The records whose settings later calls have to keep to.

    Not those of which what they made was removed, a pretraining's scores included, nor of scores
    that came to nothing: their own part judges whether it can go on with others.
    """
    scores, found = {"evaluate": paths.eval_output, "probe": paths.probe_output}, []
    for record in read_all_records(paths):
        if record.kind == "pretrain":
            # Scores outlive the pretraining that may be removed to make room.
            left = [folder.glob(f"{record.run}_[0-9]*") for folder in scores.values()]
            binds = paths.pretrain_dir(record.run).exists() or any(map(any, left))
        elif record.kind in scores:
            folder = scores[record.kind] / record.name.removeprefix(f"{record.kind}_")
            binds = folder.exists() and record.state not in ("failed", "stopped")
        else:  # segments and downloads
            binds = False
        found += [record] if binds else []
    return found
