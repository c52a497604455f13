"""Is this machine, and are these folders, ready for a run? What is not, and what to do about it."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from common.console import aligned
from common.environment import CUDA_REMEDY, least_driver
from common.images import read_rgb
from mae.check import PretrainFacts, shared_memory_bytes
from pipeline.plan import machine
from pipeline.plan.check import ask, checked_plan
from pipeline.plan.keep import disk_bytes
from pipeline.plan.machine import GIB
from pipeline.plan.segments import MAKING
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step

SHARED_MEMORY = Path("/dev/shm")
_SET_UP = "set the environment up with ./run_benchmark.sh, or install requirements.txt"


class Finding(NamedTuple):
    """One line of the doctor's report."""

    subject: str
    text: str
    fix: str = ""  # what to do; empty if nothing has to be done


def examine(settings: Callable[[], Settings], groups: Mapping[str, Any]) -> Iterator[Finding]:
    """Everything worth knowing before a run; `settings` makes those of the flags, if they fit.

    groups: the flags themselves; where they name no data, it is about the machine only.
    """
    for name, version in machine.versions().items():
        yield Finding(name, version, _SET_UP if version == "not installed" else "")
    yield from _machine(groups)
    if groups["data"].in1k_dir or groups["data"].datasets:
        yield from _run(settings)


def findings_text(findings: list[Finding]) -> str:
    """Aligned lines; what has to be fixed is marked and comes with its remedy."""
    rows = []
    for subject, text, fix in findings:
        rows.append(("FIX" if fix else "ok", subject, text))
        rows += [("", "", f"-> {fix}")] if fix else []
    wrong = sum(bool(finding.fix) for finding in findings)
    return f"{aligned(rows)}\n{f'{wrong} to fix' if wrong else 'ready'}"


def _machine(groups: Mapping[str, Any]) -> Iterator[Finding]:
    hardware, compute = machine.hardware(), groups["compute"]
    gpus, cores, wanted = hardware["gpus"], hardware["cpu_cores"], compute.num_gpus
    fix = ""
    if (wanted or 0) > len(gpus) and groups["cluster"].launcher == "local":
        fix = f"--num-gpus {wanted}, but there are {len(gpus)}: give fewer, or check the driver"
    listed = ", ".join(f"{count} x {name}" for name, count in Counter(gpus).items())
    yield Finding("devices", listed or "no GPU, CPU only", fix)
    if gpus and wanted != 0:
        yield from _torch_on(machine.gpus())
    processes = compute.num_processes or (len(gpus) if wanted is None else wanted) or 1
    text, fix = f"{cores} cores, {processes} processes", ""
    workers = groups["parts"].pretrain.get("workers")
    if isinstance(workers, int):  # else each process takes as many as there are cores for
        text += f", {workers} workers each for pretraining"
        if (everybody := workers * processes) > cores:
            fitting = max(cores // processes - 1, 0)  # a core stays for the process itself
            fix = f"{everybody} workers on {cores} cores: set pretrain workers to {fitting}"
    yield Finding("processors", text, fix)
    free = psutil.virtual_memory().available / GIB
    fix = "close other programs, or use fewer workers" if free < 2 else ""
    yield Finding("memory", f"{free:.1f} of {hardware['memory_gib']} GiB available", fix)


def _shared_memory(step: Step, images: PretrainFacts) -> Finding:
    """Loader processes hand their batches over in it."""
    config: Any = step.config
    needed = shared_memory_bytes(config, images.plan, step.processes) / GIB
    free = machine.free_bytes(SHARED_MEMORY) / GIB
    fix = f"give it more (docker: --shm-size={math.ceil(needed) + 1}g), or use fewer workers"
    text = f"{free:.1f} GiB free, loaders hold up to {needed:.1f} GiB"
    return Finding("shared memory", text, fix if free < needed else "")


def _torch_on(gpus: list[machine.Gpu]) -> Iterator[Finding]:
    """What the installed torch makes of the GPUs that the driver has."""
    try:  # in a process of its own: no torch here
        torch = json.loads(ask([([sys.executable, "-m", "engine.devices"], {})])[0])
    except ValueError as error:
        yield Finding("torch on GPUs", "it cannot be asked", str(error).replace("\n", "; "))
        return
    misfits, seen, visible = list(_misfits(torch, gpus)), len(torch["gpus"]), machine.visible_gpus()
    yield from misfits
    if seen < len(visible) and not misfits:
        text = torch["error"] or f"torch sees {seen} of {len(visible)}"
        fix = "see that this user and container may use them; of slices (MIG) a process sees one"
        yield Finding("torch on GPUs", text, fix)
    for index, gpu in enumerate(torch["gpus"]):
        free, total = gpu["free_bytes"] / GIB, gpu["total_bytes"] / GIB
        text = f"{free:.1f} of {total:.1f} GiB free, {'' if gpu['bf16'] else 'no '}bf16 in hardware"
        # A driver and the desktop take some of it; less than that is somebody's work.
        fix = "" if free > 0.9 * total else "nvidia-smi names the programs that use it"
        if gpu["error"]:
            text = f"torch cannot compute on it: {gpu['error']}"
            is_misfit = misfits or "no kernel image" in gpu["error"]
            fix = CUDA_REMEDY if is_misfit else "nvidia-smi -q shows whether the card is in order"
        yield Finding(f"GPU {index}", text, fix)
    if torch["lacks_to_compile"]:  # without a GPU nothing is compiled unless it is asked for
        fix = "install it, or models run uncompiled (Debian: build-essential, python3-dev)"
        yield Finding("compiling", f"there is no {torch['lacks_to_compile']}", fix)


def _misfits(torch: Mapping[str, Any], gpus: list[machine.Gpu]) -> Iterator[Finding]:
    """Cards and drivers that are too old for this build of torch, each kind once.

    Torch itself sees no card at all where the driver is too old. A card that is too new is seen,
    and fails at the one kernel that is tried on each.
    """
    build, cuda = f"torch {torch['torch']}", torch["cuda"]
    if not cuda:
        yield Finding("torch on GPUs", f"{build} is built without CUDA", _SET_UP)
        return
    needed = least_driver(cuda)
    oldest = min(int(re.sub(r"\D", "", arch)) for arch in torch["archs"])  # sm_75 -> 75
    for gpu in dict.fromkeys(gpus):  # eight of a kind are said once
        causes, capability = [], 10 * gpu.capability[0] + gpu.capability[1]
        if gpu.driver < needed:
            here = f"here is {gpu.driver}"
            causes.append(f"CUDA {cuda} of {build} needs driver {needed} or newer, {here}")
        if capability < oldest:
            causes.append(f"{build} has kernels from sm_{oldest} on, not for sm_{capability}")
        if causes:
            yield Finding(gpu.name, "; ".join(causes), CUDA_REMEDY)


def _unreadable(images: PretrainFacts) -> str:
    """What is wrong where none of some images can be read; training replaces single ones."""
    found = []
    for path in images.some_images:
        try:
            read_rgb(path)
        except ValueError as error:
            found.append(str(error).replace("\n", "; "))
    return found[0] if found and len(found) == len(images.some_images) else ""


def _run(make_settings: Callable[[], Settings]) -> Iterator[Finding]:
    """The run itself: the parts' own judgement of flags and data, and disk space."""
    try:
        steps = checked_plan(settings := make_settings())
    except ValueError as error:
        yield Finding("flags", "a run would be refused", str(error).replace("\n", "; "))
        return
    yield Finding("flags", f"a plan of {len(steps)} steps")
    if making := [step for step in steps if step.kind in MAKING]:  # which comes first
        yield Finding("segments", f"{making[0].what} ({len(making)} steps)")
    facts = {step.kind: step.facts for step in reversed(steps) if step.facts}
    if isinstance(images := facts.get("pretrain"), PretrainFacts):
        yield _shared_memory(next(step for step in steps if step.facts is images), images)
        counts = f"{images.train} train, {images.left_out} left out, {images.val} val"
        yield Finding("images", f"{counts}, {images.val_left_out} val left out", _unreadable(images))
    if (dataset := facts.get("evaluate")) is not None:
        yield Finding("dataset", f"{dataset.train} train, {dataset.val} val")
    disk, free = disk_bytes(steps, settings.parts.keep), machine.free_bytes(settings.data.output_dir)
    taken = f"{disk.peak / GIB:.1f} GiB, {disk.end / GIB:.1f} in the end"
    text = f"{free / GIB:.0f} GiB free, the run takes about {taken}"
    fix = "free some, use another --output-dir, or --keep less"
    yield Finding("disk", text, fix if free < disk.peak else "")
