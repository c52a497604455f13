"""--estimate: what a run will cost. The parts time some real steps of each kind, and the plan is
added up. Nothing is written but into a temporary folder.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import click

from common.environment import PROGRESS_FILE
from common.progress import duration
from pipeline.launch.local import environment
from pipeline.launch.view import devices_text, disk_text, step_table
from pipeline.plan.check import ask, checked_plan, startable, without_segments
from pipeline.plan.layout import Layout
from pipeline.plan.records import is_done, read_progress
from pipeline.plan.segments import MAKING, reads_segments
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Step


def estimate_run(settings: Settings) -> str:
    """The costs of what is left of the plan, step by step, as text."""
    with tempfile.TemporaryDirectory() as folder:
        data, sample = settings.data, settings.data.missing_sample
        if sample is not None:  # a question writes none where they belong

            def moved(value: Any) -> Any:
                if isinstance(value, tuple):
                    return tuple(map(moved, value))
                within = isinstance(value, Path) and value.is_relative_to(sample)
                return Path(folder) / value.relative_to(sample) if within else value

            there = {name: moved(value) for name, value in vars(data).items()}
            settings = replace(settings, data=replace(data, **there))
        paths, steps = Layout(settings.data.output_dir), checked_plan(settings)
        left = [step for step in steps if not is_done(step, paths)]
        making = [step for step in left if step.kind == "generate"]
        price = _price_of_segments(making[0]) if making else {}
        seconds = step_seconds(left)
    shards = settings.data.segment_shards
    # Shards run side by side only where there are machines for them: each is counted.
    seconds |= {step.name: price["seconds"] / shards for step in making}
    # The parts are kept beside what they are joined to.
    segments = price.get("bytes", 0) * (1 + (shards > 1))
    total = wall_seconds(left, seconds, overlaps=settings.compute.overlaps)
    wall = f"wall time: {duration(total)} ({total / 3600:.2f} h)"
    if (in_turn := sum(seconds.values())) > total:  # some steps run beside each other
        wall += f"; one step after another it would be {duration(in_turn)}"
    hours = [seconds[step.name] * step.devices / 3600 for step in left]
    columns = {
        "on": [devices_text(step) for step in left],
        "time": [duration(seconds[step.name]) for step in left],
        "device-hours": [f"{one:.2f}" for one in hours],
    }
    table = step_table([step.name for step in left], columns, numbers=("time", "device-hours"))
    disk = disk_text(left, settings, besides=segments)
    return f"{table}\n{wall}\ndevice-hours: {sum(hours):.2f}\n{disk}"


def _price_of_segments(step: Step) -> Mapping[str, float]:
    """What making all of them takes: `seconds` of one process, `bytes` of the store, and so on."""
    out = step.outputs[0]
    there = next(folder for folder in out.parents if folder.is_dir())  # its own comes with the run
    # Of a word that is given twice, the last counts.
    whole = ["--shard", "0/1", "--out", str(there / out.name), "--estimate", "--json"]
    return _asked([*step.command, *whole], step)


def _asked(command: Sequence[str], step: Step) -> dict[str, float]:
    """The numbers that a part answers with."""
    click.echo(f"timing {step.name} ...", err=True)
    silent = {**environment(step), PROGRESS_FILE: ""}  # a question leaves nothing in the folder
    return cast(dict[str, float], json.loads(ask([(command, silent)])[0]))


def step_seconds(steps: Sequence[Step]) -> dict[str, float]:
    """Step name -> expected seconds, from timing each kind of step, and each method, once."""
    found = {step.name: 0.0 for step in steps}
    timed: dict[Any, Mapping[str, float]] = {}
    reached: dict[str, float] = {}  # run -> epochs completed before the step
    makes_segments = any(step.kind in MAKING for step in steps)
    for step in steps:
        if step.kind not in ("pretrain", "evaluate"):
            continue
        key = (step.kind, step.settings.get("mask_method"))
        if key not in timed:
            now = startable(step)
            now = without_segments(now) if makes_segments and reads_segments(step) else now
            timed[key] = _asked([*now.command, "--dry-run", "time"], step)
        cost = timed[key]
        epochs = cost["epochs"]
        # Both parts evaluate so often per epoch: with held-out images, or with all of a split.
        evaluations = cost["evaluations"] / epochs * cost["evaluation_seconds"]
        if step.kind == "pretrain":
            begun = reached.get(step.run, read_progress(step.folder).get("epoch", 0))
            epochs, reached[step.run] = max(step.epochs - begun, 0), step.epochs
        found[step.name] = cost["setup_seconds"] + epochs * (cost["epoch_seconds"] + evaluations)
    # A probe is not timed: what it does, an evaluation does.
    for step in steps:
        if step.kind == "probe" and ("evaluate", None) in timed and step.facts:
            # It sees every training image once, and the others as an evaluation does.
            cost, passes = timed["evaluate", None], 1 + step.facts.train / step.facts.val
            found[step.name] = cost["setup_seconds"] + passes * cost["evaluation_seconds"]
    return found


def wall_seconds(left: Sequence[Step], seconds: Mapping[str, float], *, overlaps: bool) -> float:
    """From start to end, as `benchmark.alternate` has it.

    A step waits for as many of its GPUs as it takes; without, for its lane: one, or with overlap
    one for each kind of step.
    """
    free_at: dict[int | str, float] = {}
    ends: dict[str, float] = {}
    for step in left:
        # A lane is a GPU, or on the CPU a kind of step.
        lanes: Sequence[int | str] = step.gpus or [step.lane if overlaps else "the only one"]
        taken = sorted(lanes, key=lambda lane: free_at.get(lane, 0.0))[: step.processes]
        waits_for = [free_at.get(lane, 0.0) for lane in taken]
        waits_for += [ends.get(need, 0.0) for need in step.needs]  # what is done has no end here
        ends[step.name] = max(waits_for) + seconds[step.name]
        free_at |= dict.fromkeys(taken, ends[step.name])
    return max(ends.values(), default=0.0)
