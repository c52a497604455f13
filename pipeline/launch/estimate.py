"""What a run will cost: the parts time a few real steps of each kind, and the plan is added up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from common.terminal import aligned, duration
from pipeline.launch.local import environment, read_progress
from pipeline.launch.preview import checked_plan, with_existing_init
from pipeline.plan import machine
from pipeline.plan.layout import Layout
from pipeline.plan.machine import GIB, REPO_ROOT
from pipeline.plan.parts import ask
from pipeline.plan.records import is_done
from pipeline.plan.segments import reads_segments
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Step

_STEPS = 20  # that are timed of each kind


def estimate_run(settings: Settings) -> str:
    """The costs of what is left of the plan, part by part, as text."""
    paths, steps = Layout(settings.data.output_dir), checked_plan(settings)
    left = [step for step in steps if not is_done(step, paths)]
    making = [step for step in left if step.kind == "generate"]
    price = _price_of_segments(making[0]) if making else {}
    shards = settings.data.segment_shards
    seconds = step_seconds(left) | {step.name: price["seconds"] / shards for step in making}
    # The parts are kept beside what they are joined to.
    kept = kept_bytes(left) + price.get("bytes", 0) * (1 + (shards > 1))
    free = machine.free_bytes(paths.root)
    disk = f"disk: about {kept / GIB:.1f} GiB will be kept, {free / GIB:.0f} GiB are free"
    total = wall_seconds(left, seconds, overlaps=settings.compute.overlaps)
    wall = f"wall time: {duration(total)} ({total / 3600:.2f} h)"
    in_turn = sum(seconds.values())
    if in_turn > total:
        wall += f"; one step after another it would be {duration(in_turn)}"
    return f"{_table(left, seconds)}\n{wall}\n{disk}"


def _price_of_segments(step: Step) -> Mapping[str, float]:
    """What making all of them takes: `seconds` of one process, `bytes` of the store, and so on."""
    click.echo("timing the making of segments ...", err=True)
    out = step.outputs[0]
    there = next(folder for folder in out.parents if folder.is_dir())  # its own comes with the run
    whole = replace(step, options={**step.options, "shard": "0/1", "out": there / out.name})
    return ask([[*whole.command, "--estimate", "--json"]], [environment(step)])[0]


def kept_bytes(steps: Sequence[Step]) -> int:
    """About what these steps leave on the disk."""
    # A round leaves its checkpoint, of which last.pth is a second name; an evaluation two.
    files = {"pretrain": 1, "evaluate": 2}
    return sum(files.get(s.kind, 0) * s.answer.get("checkpoint_bytes", 0) for s in steps)


def step_seconds(steps: Sequence[Step]) -> dict[str, float]:
    """Step name -> expected seconds, from timing each kind of step, and each method, once."""
    found: dict[str, float] = {}
    timed: dict[Any, Mapping[str, float]] = {}
    reached: dict[str, float] = {}  # run -> epochs completed before the step
    will_make = any(step.kind in ("generate", "merge") for step in steps)
    for step in steps:
        if step.kind == "pack":
            click.echo("packing the segments, which a run would do first", err=True)
            step.outputs[0].parent.mkdir(parents=True, exist_ok=True)
            code = subprocess.run(step.command, cwd=REPO_ROOT, stdout=sys.stderr).returncode
            if code:
                raise RuntimeError(f"{step.name} ended with exit code {code}; see above")
        if step.kind not in ("pretrain", "evaluate"):
            continue
        key = (step.kind, step.options.get("mask_method"))
        if key not in timed:
            click.echo(f"timing {step.name} ...", err=True)
            now = {"will_make": True} if will_make and reads_segments(step) else {}
            timed[key] = _time(replace(step, options={**step.options, **now}))
        cost = timed[key]
        epochs = cost["epochs"]
        if step.kind == "pretrain":
            begun = reached.get(step.run, read_progress(step.folder).get("epoch", 0))
            epochs, reached[step.run] = max(step.epochs - begun, 0), step.epochs
        found[step.name] = cost["setup_seconds"] + epochs * cost["epoch_seconds"]
        if step.kind == "evaluate":
            found[step.name] += cost["evaluations"] * cost["evaluation_seconds"]
    for step in steps:
        if step.kind == "probe" and ("evaluate", None) in timed:
            # It looks at every training image once, and at the others as an evaluation does.
            cost, images = timed["evaluate", None], step.answer["images"]
            looks = 1 + images["train"] / images["val"]
            found[step.name] = cost["setup_seconds"] + looks * cost["evaluation_seconds"]
    return found


def _time(step: Step) -> Mapping[str, float]:
    """What the part says of a few steps."""
    command = [*with_existing_init(step).command, "--time-steps", str(_STEPS)]
    return ask([command], [environment(step)])[0]


def _table(left: Sequence[Step], seconds: Mapping[str, float]) -> str:
    """A line for each kind of step and run, and the sum."""
    groups: dict[str, list[Step]] = {}
    for step in left:
        groups.setdefault(f"{step.kind} {step.run}", []).append(step)
    rows = [("part", "steps", "time", "device-hours")]
    for name, group in {**groups, "all": list(left)}.items():
        total = sum(seconds.get(step.name, 0.0) for step in group)
        devices = sum(seconds.get(step.name, 0.0) * step.devices for step in group) / 3600
        rows.append((name, str(len(group)), duration(total), f"{devices:.2f}"))
    return aligned(rows, right=(1, 2, 3))


def wall_seconds(left: Sequence[Step], seconds: Mapping[str, float], *, overlaps: bool) -> float:
    """From start to end, as `benchmark.alternate` has it.

    A step waits for as many of its GPUs as it takes; without, for its lane: one, or with overlap
    one for each kind of step.
    """
    free_at: dict[int | str, float] = {}
    ends: dict[str, float] = {}
    for step in left:
        lanes: Sequence[int | str] = step.gpus or [step.lane if overlaps else "the only one"]
        taken = sorted(lanes, key=lambda lane: free_at.get(lane, 0.0))[: step.processes]
        begin = max(
            *(free_at.get(lane, 0.0) for lane in taken),
            *(ends.get(need, 0.0) for need in step.needs),
            0.0,
        )
        ends[step.name] = begin + seconds.get(step.name, 0.0)
        free_at |= dict.fromkeys(taken, ends[step.name])
    return max(ends.values(), default=0.0)
