"""--estimate: what a run will cost. The parts time some real steps of each kind, and the plan is
added up. Nothing is written but into a temporary folder.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from common.images import evenly_spread, find_images
from common.progress import duration
from mae.check import PretrainFacts
from mae.config import PretrainConfig
from pipeline.launch.local import environment
from pipeline.launch.view import devices_text, step_table
from pipeline.plan import machine
from pipeline.plan.check import ask, checked_plan, startable
from pipeline.plan.layout import Layout
from pipeline.plan.machine import GIB
from pipeline.plan.records import epochs_reached, is_done
from pipeline.plan.segments import MAKING, reads_segments
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Step

_BATCHES = 4  # of a timing on some of the images


def estimate_run(settings: Settings) -> str:
    """The costs of what is left of the plan, step by step, as text."""
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder)
        settings = _with_sample_in(aside / "sample", settings)
        paths, steps = Layout(settings.data.output_dir), checked_plan(settings)
        left = [step for step in steps if not is_done(step, paths)]
        making = [step for step in left if step.kind == "generate"]
        price = _price_of_segments(making[0]) if making else {}
        shards = settings.data.segment_shards
        seconds = step_seconds(left, aside)
    # Shards run side by side only where there are machines for them: each is counted.
    seconds |= {step.name: price["seconds"] / shards for step in making}
    # The parts are kept beside what they are joined to.
    kept = kept_bytes(left) + price.get("bytes", 0) * (1 + (shards > 1))
    total = wall_seconds(left, seconds, overlaps=settings.compute.overlaps)
    wall = f"wall time: {duration(total)} ({total / 3600:.2f} h)"
    if (in_turn := sum(seconds.values())) > total:  # some steps run beside each other
        wall += f"; one step after another it would be {duration(in_turn)}"
    hours = {step.name: seconds.get(step.name, 0.0) * step.devices / 3600 for step in left}
    columns = {
        "on": [devices_text(step) for step in left],
        "time": [duration(seconds.get(step.name, 0.0)) for step in left],
        "device-hours": [f"{hours[step.name]:.2f}" for step in left],
    }
    free = machine.free_bytes(paths.root) / GIB
    return "\n".join((
        step_table([step.name for step in left], columns, numbers=("time", "device-hours")),
        wall,
        f"device-hours: {sum(hours.values()):.2f}",
        f"disk: about {kept / GIB:.1f} GiB will be kept, {free:.0f} GiB are free",
    ))  # fmt: skip


def _with_sample_in(folder: Path, settings: Settings) -> Settings:
    """The same on sample data in `folder`, where those to use are not there yet."""
    data, sample = settings.data, settings.data.missing_sample
    if sample is None:
        return settings
    moved: dict[str, Any] = {
        name: folder / path.relative_to(sample)
        for name, path in vars(data).items()
        if isinstance(path, Path) and path.is_relative_to(sample)
    }
    return replace(settings, data=replace(data, **moved))


def _price_of_segments(step: Step) -> Mapping[str, float]:
    """What making all of them takes: `seconds` of one process, `bytes` of the store, and so on."""
    click.echo("timing the making of segments ...", err=True)
    out = step.outputs[0]
    there = next(folder for folder in out.parents if folder.is_dir())  # its own comes with the run
    # Of a word that is given twice, the last counts.
    whole = [*step.alone, "--shard", "0/1", "--out", str(there / out.name)]
    price: dict[str, float] = json.loads(
        ask([[*whole, "--estimate", "--json"]], [environment(step)])[0]
    )
    return price


def kept_bytes(steps: Sequence[Step]) -> int:
    """About what these steps leave on the disk."""
    # A round leaves its checkpoint, of which last.pth is a second name; an evaluation two.
    files = {"pretrain": 1, "evaluate": 2}
    return sum(files.get(s.kind, 0) * s.facts.checkpoint_bytes for s in steps if s.facts)


def step_seconds(steps: Sequence[Step], aside: Path) -> dict[str, float]:
    """Step name -> expected seconds, from timing each kind of step, and each method, once.

    aside: a folder for what is needed for that.
    """
    found: dict[str, float] = {}
    timed: dict[Any, Mapping[str, float]] = {}
    reached: dict[str, float] = {}  # run -> epochs completed before the step
    makes_segments = any(step.kind in MAKING for step in steps)
    for step in steps:
        if step.kind not in ("pretrain", "evaluate"):
            continue
        key = (step.kind, step.settings.get("mask_method"))
        if key not in timed:
            click.echo(f"timing {step.name} ...", err=True)
            waits = makes_segments and reads_segments(step)
            timed[key] = _time_on_some(step, aside) if waits else _time(step)
        cost = timed[key]
        epochs = cost["epochs"]
        # Both parts evaluate so often per epoch: with held-out images, or with all of a split.
        evaluations = cost["evaluations"] / epochs * cost["evaluation_seconds"]
        if step.kind == "pretrain":
            begun = reached.get(step.run, epochs_reached(step))
            epochs, reached[step.run] = max(step.epochs - begun, 0), step.epochs
        found[step.name] = cost["setup_seconds"] + epochs * (cost["epoch_seconds"] + evaluations)
    # A probe is not timed: what it does, an evaluation does.
    for step in steps:
        if step.kind == "probe" and ("evaluate", None) in timed and step.facts:
            # It sees every training image once, and the others as an evaluation does.
            cost, passes = timed["evaluate", None], 1 + step.facts.train / step.facts.val
            found[step.name] = cost["setup_seconds"] + passes * cost["evaluation_seconds"]
    return found


def _time(step: Step) -> dict[str, float]:
    """What the part says of some of its steps."""
    command = [*startable(step).command, "--dry-run", "time"]
    seconds: dict[str, float] = json.loads(ask([command], [environment(step)])[0])
    return seconds


def _time_on_some(step: Step, aside: Path) -> dict[str, float]:
    """The same of a pretraining whose segments are not there, or not packed, yet.

    It is timed on some of its images, whose segments are made aside by what takes no weights:
    shapes of another origin cost the same.
    """
    config, facts = step.config, step.facts
    assert isinstance(config, PretrainConfig) and isinstance(facts, PretrainFacts)
    batch = facts.plan.processes * facts.plan.micro_batch_size  # one part for each device
    folder, train = aside / f"batches-of-{batch}", config.data.in1k_dir / "train"
    store = folder / "masks.sqlite"
    if not folder.exists():
        for path in evenly_spread(find_images(train), _BATCHES * batch):
            link = folder / "train" / path  # nothing is copied
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(train / path)
        # Of the shape of a store only its size matters, and any model would take longer.
        make = ["generate", "felzenszwalb", "--images", str(folder / "train"), "--out", str(store)]
        ask([[sys.executable, "-m", "segments", *make]])
    data = replace(
        config.data, in1k_dir=folder, masks_dir=store, val_images=0, allow_missing_segments=True
    )
    config = replace(
        config, data=data, run=replace(config.run, output_dir=aside / "out"),
        optimisation=replace(config.optimisation, effective_batch_size=batch),
    )  # fmt: skip
    seconds = _time(replace(step, config=config))
    seconds["epoch_seconds"] = facts.plan.images_per_epoch / seconds["images_per_second"]
    return seconds


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
        begin = max(
            *(free_at.get(lane, 0.0) for lane in taken),
            *(ends.get(need, 0.0) for need in step.needs),
            0.0,
        )
        ends[step.name] = begin + seconds.get(step.name, 0.0)
        free_at |= dict.fromkeys(taken, ends[step.name])
    return max(ends.values(), default=0.0)
