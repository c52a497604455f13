"""Is this machine, and are these folders, ready for a run? What is not, and what to do about it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline import machine
from pipeline.estimate import kept_bytes
from pipeline.machine import GIB
from pipeline.plan import Step
from pipeline.preview import checked_plan, what_it_does
from pipeline.segments import MAKING
from pipeline.settings import Settings
from pipeline.terminal import aligned

_LITTLE_MEMORY_GIB = 2.0


class Finding(NamedTuple):
    """One line of the doctor's report."""

    subject: str
    text: str
    fix: str = ""
    """What to do; empty if nothing has to be done."""


def examine(settings: Callable[[], Settings], groups: Mapping[str, Any]) -> list[Finding]:
    """Everything worth knowing before a run; `settings` makes those of the flags, if they fit.

    groups: the flags themselves; where they name no data, it is about the machine only.
    """
    findings = [*_software(), *_machine(groups)]
    if groups["data"].in1k_dir or groups["data"].dataset:
        findings += _run(settings)
    return findings


def findings_text(findings: list[Finding]) -> str:
    """Aligned lines; what has to be fixed is marked and comes with its remedy."""
    rows = []
    for finding in findings:
        rows.append(("FIX" if finding.fix else "ok", finding.subject, finding.text))
        rows += [("", "", f"-> {finding.fix}")] if finding.fix else []
    wrong = sum(bool(finding.fix) for finding in findings)
    return f"{aligned(rows)}\n{f'{wrong} to fix' if wrong else 'ready'}"


def _software() -> Iterator[Finding]:
    for name, version in machine.versions().items():
        fix = "set the environment up with ./run_benchmark.sh, or install requirements.txt"
        missing = version == "not installed"
        yield Finding(name, version, fix if missing else "")


def _machine(groups: Mapping[str, Any]) -> Iterator[Finding]:
    hardware, compute = machine.hardware(), groups["compute"]
    gpus, cores, wanted = hardware["gpus"], hardware["cpu_cores"], compute.num_gpus
    fix = ""
    if (wanted or 0) > len(gpus) and groups["cluster"].launcher == "local":
        fix = f"--num-gpus {wanted}, but there are {len(gpus)}: give fewer, or check the driver"
    yield Finding("devices", ", ".join(gpus) or "no GPU, CPU only", fix)
    if gpus and not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))):
        fix = "install gcc (Debian: build-essential, python3-dev), or models run uncompiled"
        yield Finding("C compiler", "none", fix)
    processes = compute.num_processes or (len(gpus) if wanted is None else wanted) or 1
    workers = groups["parts"].pretrain.get("workers")
    text = f"{cores} cores, {processes} processes"
    fix = ""
    if isinstance(workers, int):
        text += f", {workers} workers each for pretraining"
        if workers * processes > cores:
            fix = f"{workers * processes} workers on {cores} cores: set pretrain workers to "
            fix += f"{max(cores // processes - 1, 0)}"
    yield Finding("processors", text, fix)
    free = psutil.virtual_memory().available / GIB
    fix = "close other programs, or use fewer workers" if free < _LITTLE_MEMORY_GIB else ""
    yield Finding("memory", f"{free:.1f} of {hardware['memory_gib']} GiB available", fix)
    shm = Path("/dev/shm")
    if shm.exists():
        free = machine.free_bytes(shm) / GIB
        fix = "give it more (docker: --shm-size=16g), or use workers=0"
        too_little = free < 1 and workers != 0
        yield Finding("shared memory", f"{free:.1f} GiB free", fix if too_little else "")


def _run(make_settings: Callable[[], Settings]) -> Iterator[Finding]:
    """The run itself: the parts' own judgement of flags and data, and disk space."""
    try:
        steps = checked_plan(settings := make_settings())
    except ValueError as error:
        yield Finding("flags", "a run would be refused", str(error).replace("\n", "; "))
        return
    yield Finding("flags", f"a plan of {len(steps)} steps")
    making = [step for step in steps if step.kind in MAKING]
    if making:
        yield Finding("segments", f"{what_it_does(making[0])} ({len(making)} steps)")
    for subject, kind in (("images", "pretrain"), ("dataset", "evaluate")):
        step: Step | None = next((s for s in steps if s.kind == kind and s.answer), None)
        if step is not None:
            counts = ", ".join(f"{count} {name}" for name, count in step.answer["images"].items())
            yield Finding(subject, counts.replace("_", " "))
    kept, free = kept_bytes(steps), machine.free_bytes(settings.data.output_dir)
    text = f"{free / GIB:.0f} GiB free, the run keeps about {kept / GIB:.1f} GiB"
    fix = "free some, or use another --output-dir" if free < kept else ""
    yield Finding("disk", text, fix)
