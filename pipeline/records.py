"""What is known of each step: one small JSON file per step, written aside and renamed.

A step counts as done when its record says so, its outputs are there with the recorded sizes, and
it was made with the settings that are asked for now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.layout import BASELINES, Layout, RunName
from pipeline.plan import Step, Variant

# Options in which the steps of a kind may differ within one output directory.
MAY_DIFFER = {
    "fetch": frozenset({"model", "out"}),
    "pretrain": frozenset({"mask_method", "coverage_ratio", "seed"}),
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
    fingerprint: Mapping[str, str]
    """The settings that its results depend on."""
    outputs: Mapping[str, int] = field(default_factory=dict)
    """Path relative to the output directory -> bytes; filled in when done."""
    exit_code: int | None = None
    started: float = 0.0
    """Unix seconds at which the latest attempt began."""
    seconds: float = 0.0
    """Wall seconds over all finished attempts."""
    devices: int = 1
    """GPUs, or 1 for the CPU: seconds x devices are the GPU-hours."""
    attempts: int = 0
    host: str = ""
    pid: int = 0
    """Of the latest attempt's child process."""
    job_id: str = ""
    """Slurm job, where there is one."""


def read_record(paths: Layout, step_name: str) -> Record | None:
    """The step's record, or None if it never started; ValueError if the file is damaged."""
    path = paths.record(step_name)
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a step record ({error}); remove it to go on") from None


def read_all_records(paths: Layout) -> list[Record]:
    """All records of an output directory, by name."""
    names = sorted(path.stem for path in paths.records.glob("*.json"))
    found = [read_record(paths, name) for name in names]
    return [record for record in found if record is not None]


def write_record(paths: Layout, record: Record) -> None:
    """Replaces the step's record."""
    write_json(paths.record(record.name), asdict(record))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON beside `path`, then renames: a file that exists is complete."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text beside `path`, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def output_sizes(step: Step, paths: Layout) -> dict[str, int]:
    """Sizes of the step's outputs; raises FileNotFoundError naming those missing or empty."""
    missing = [path for path in step.outputs if not path.is_file() or path.stat().st_size == 0]
    if missing:
        raise FileNotFoundError(", ".join(str(path) for path in missing))
    return {os.path.relpath(path, paths.root): path.stat().st_size for path in step.outputs}


def is_done(step: Step, paths: Layout) -> bool:
    """Whether the step needs no more work: recorded as done, outputs whole, settings equal."""
    record = read_record(paths, step.name)
    if record is None or record.state != "done":
        return False
    if record.fingerprint != step.fingerprint(paths.root):
        return False
    try:
        return output_sizes(step, paths) == record.outputs
    except FileNotFoundError:
        return False


def differences(steps: Iterable[Step], paths: Layout) -> list[str]:
    """How the settings differ from those the output directory's steps were made with.

    What is compared in one report has to be made alike, so a step is compared with all of its kind;
    only what tells runs and checkpoints apart may differ between them.
    """
    records = [record for record in read_all_records(paths) if _binds(record, paths)]
    found = []
    for step in steps:
        asked = step.fingerprint(paths.root)
        for record in (record for record in records if record.kind == step.kind):
            own_run = step.kind == "pretrain" and record.run == str(step.run)
            own = own_run or record.name == step.name
            keys = asked.keys() | record.fingerprint.keys()
            whose = "" if record.run == str(step.run) else f" for {record.run}"
            found += [
                f"{step.run}: {key} was {record.fingerprint.get(key, 'not given')}{whose}, "
                f"is now {asked.get(key, 'not given')}"
                for key in sorted(keys if own else keys - MAY_DIFFER[step.kind])
                if asked.get(key) != record.fingerprint.get(key)
            ]
    return list(dict.fromkeys(found))


def _binds(record: Record, paths: Layout) -> bool:
    """Whether later calls have to keep to a record's settings.

    Not when what it made was removed, a pretraining's scores included, and not when it is an
    evaluation that came to nothing: that one's own part judges whether it can go on with others.
    """
    if record.kind == "pretrain":
        scores = paths.eval_output.glob(f"{record.run}_[0-9]*")
        return (paths.pretrain_output / record.run).exists() or any(scores)
    if record.kind == "evaluate":
        folder = paths.eval_output / record.name.removeprefix("evaluate_")
        return folder.exists() and record.state not in ("failed", "stopped")
    return True


def made_runs(paths: Layout) -> dict[Variant, RunName]:
    """The runs that are there, by what they vary in, so that a plan goes on with them by name."""
    found: dict[Variant, RunName] = {}
    for record in read_all_records(paths):
        run = RunName.parse(record.run)
        if record.kind == "fetch" or (record.kind == "evaluate") != (run.method in BASELINES):
            continue
        if _binds(record, paths) or record.state == "submitted":
            ratio, seed = (record.fingerprint.get(key, "0") for key in ("coverage_ratio", "seed"))
            found.setdefault((run.method, float(ratio), int(seed)), run)
    return found
