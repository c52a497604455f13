"""What a run will cost: times a few dozen real steps of each part and adds the plan up.

The parts run as they will (same commands, devices, processes) on links to a small part of the
data, in a temporary folder. Each is run twice, on less and on more, so that starting up (fixed) and
working (per image) come apart:

    pretraining seconds = start + images x epochs x per image
    evaluation seconds  = start + images x epochs x per training image
                                + validation images x evaluations x per validation image
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import yaml

from pipeline import disk, layout, preview
from pipeline.curves import read_log
from pipeline.datasets import (
    SegmentationData,
    image_files,
    link_image_subset,
    link_pair_subset,
)
from pipeline.layout import Layout
from pipeline.local import duration, environment
from pipeline.plan import Step, make_plan
from pipeline.process import REPO_ROOT
from pipeline.records import is_done, made_runs
from pipeline.settings import Settings

_STEPS = 12  # of an epoch that is timed
_EPOCHS = 3  # timed; the first of them counts as warming up
_FEW_VAL, _MORE_VAL = 8, 40  # validation images of the two evaluations


@dataclass(frozen=True, kw_only=True)
class PretrainCost:
    """Seconds of a pretraining round: `fixed` for each, `per_image` for each image and epoch."""

    fixed: float
    per_image: float

    def seconds(self, images: int, epochs: float) -> float:
        """Of a round of `epochs` over `images`."""
        return self.fixed + images * epochs * self.per_image


@dataclass(frozen=True, kw_only=True)
class EvaluationCost:
    """Seconds of an evaluation: fixed, per image and epoch, per scored validation image."""

    fixed: float
    per_train_image: float
    per_val_image: float

    def seconds(self, train: int, epochs: int, val: int, evaluations: int) -> float:
        """Of finetuning for `epochs` and scoring `evaluations` times."""
        training = train * epochs * self.per_train_image
        return self.fixed + training + val * evaluations * self.per_val_image


def estimate_run(settings: Settings) -> str:
    """The costs of what is left of the plan, part by part, as text."""
    paths = Layout(settings.output_dir)
    steps = make_plan(settings, made_runs(paths))
    preview.check(settings, steps, paths)
    left = [step for step in steps if not is_done(step, paths)]
    with tempfile.TemporaryDirectory(prefix="segmae-estimate-") as folder:
        seconds = step_seconds(settings, left, Path(folder))
        kept = disk.kept_bytes(steps, _checkpoint_sizes(left, Path(folder)))
    return f"{_text(settings, left, seconds)}\n{_disk_text(settings, kept)}"


def _checkpoint_sizes(steps: Sequence[Step], folder: Path) -> dict[str, int]:
    """Kind of step -> bytes of the largest checkpoint that timing it left."""
    sizes: dict[str, int] = {}
    for step in steps:
        for path in (folder / step.name).glob("out*/*.pth"):
            sizes[step.kind] = max(sizes.get(step.kind, 0), path.stat().st_size)
    return sizes


def step_seconds(settings: Settings, steps: Sequence[Step], folder: Path) -> dict[str, float]:
    """Step name -> expected seconds, from timing each kind of step once in `folder`."""
    found: dict[str, float] = {}
    pretrain_costs: dict[str, PretrainCost] = {}
    evaluation: EvaluationCost | None = None
    images = len(image_files(settings.data.in1k_dir / "train"))
    ends: dict[str, int] = {}  # run -> epochs completed before the step
    for step in steps:
        if step.kind == "pretrain":
            cost = pretrain_costs.get(step.run.method)
            if cost is None:
                cost = _time_pretraining(settings, step, folder / step.name)
                pretrain_costs[step.run.method] = cost
            begun = ends.get(str(step.run), _epochs_done(step))
            found[step.name] = cost.seconds(images, step.epochs - begun)
            ends[str(step.run)] = step.epochs
        elif step.kind == "evaluate":
            if evaluation is None:
                evaluation = _time_evaluation(settings, step, folder / step.name)
            found[step.name] = _evaluation_seconds(settings, evaluation)
    return found


def _epochs_done(step: Step) -> int:
    return len(read_log(layout.epoch_log(step.folder)))


def _time_pretraining(settings: Settings, step: Step, folder: Path) -> PretrainCost:
    """One short run, whose log tells the time in epochs from the time around them."""
    click.echo(f"timing {step.run.method} ...", err=True)
    batch = settings.schedule.batch_size * step.processes
    count = link_image_subset(settings.data.in1k_dir, _STEPS * batch, folder / "in1k")
    options: dict[str, object] = {
        "in1k_dir": folder / "in1k",
        "effective_batch_size": min(batch, count // step.processes * step.processes),
        "epochs": _EPOCHS,
        "stop_after": _EPOCHS,
        "output_dir": folder / "out",
        "resume": "never",
    }
    total, epochs = _run(step, options)
    per_epoch = median(entry["epoch_seconds"] for entry in epochs[1:])
    fixed = total - sum(entry["epoch_seconds"] for entry in epochs)
    # The first epoch warms caches and compiles: that is paid in every round.
    fixed += max(epochs[0]["epoch_seconds"] - per_epoch, 0.0)
    return PretrainCost(fixed=fixed, per_image=per_epoch / count)


def _time_evaluation(settings: Settings, step: Step, folder: Path) -> EvaluationCost:
    """Two short runs that differ in the number of validation images."""
    click.echo("timing an evaluation ...", err=True)
    data = SegmentationData.open(settings.data.eval_dataset)
    batch = int(str(_recipe_value(settings, "batch_size")))
    train = min(_STEPS * batch, len(list(data.pairs("train"))))
    val = len(list(data.pairs("val")))
    runs = []
    for count in (min(_FEW_VAL, val), min(_MORE_VAL, val)):
        subset = folder / f"data-{count}"
        options: dict[str, object] = {
            "dataset": link_pair_subset(data, {"train": train, "val": count}, subset),
            "init": "random",
            "patch_size": settings.pretrain.get("patch_size"),
            "epochs": _EPOCHS,
            "eval_every": _EPOCHS,
            "output_dir": folder / f"out-{count}",
            "resume": "never",
        }
        total, epochs = _run(step, options)
        # The last epoch's time may hold its scoring: the others tell what training takes.
        per_epoch = median(entry["epoch_seconds"] for entry in epochs[1:-1] or epochs)
        runs.append((count, total, per_epoch, epochs[0]["epoch_seconds"]))
    (few, few_total, few_epoch, few_first), (more, more_total, more_epoch, more_first) = runs
    per_epoch = (few_epoch + more_epoch) / 2
    warm_up = max((few_first + more_first) / 2 - per_epoch, 0.0)
    working_few = few_total - _EPOCHS * few_epoch - max(few_first - few_epoch, 0.0)
    working_more = more_total - _EPOCHS * more_epoch - max(more_first - more_epoch, 0.0)
    per_val = max(working_more - working_few, 0.0) / (more - few) if more > few else 0.0
    fixed = (working_few + working_more - (few + more) * per_val) / 2 + warm_up
    return EvaluationCost(fixed=fixed, per_train_image=per_epoch / train, per_val_image=per_val)


def _evaluation_seconds(settings: Settings, cost: EvaluationCost) -> float:
    data = SegmentationData.open(settings.data.eval_dataset)
    epochs = int(str(_recipe_value(settings, "epochs")))
    every = int(str(_recipe_value(settings, "eval_every")))
    evaluations = -(-epochs // every)
    train, val = len(list(data.pairs("train"))), len(list(data.pairs("val")))
    return cost.seconds(train, epochs, val, evaluations)


def _recipe_value(settings: Settings, name: str) -> object:
    """A finetuning option: as given, else from the recipe's file."""
    if name in settings.finetune:
        return settings.finetune[name]
    recipe = str(settings.finetune.get("recipe", settings.experiment.recipe))
    is_file = recipe.endswith((".yml", ".yaml"))
    path = Path(recipe) if is_file else REPO_ROOT / "segmenter" / "recipes" / f"{recipe}.yml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {key.replace("-", "_"): value for key, value in values.items()}[name]


def _run(step: Step, options: Mapping[str, object]) -> tuple[float, list[dict[str, Any]]]:
    """Runs the step with other options; wall seconds and its log. ValueError if it fails."""
    changed = replace(step, options={**step.options, **options})
    begin = time.monotonic()
    done = subprocess.run(
        changed.command,
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment(changed)},
    )
    total = time.monotonic() - begin
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise ValueError(f"timing {step.name} failed with exit code {done.returncode}:\n{tail}")
    return total, read_log(layout.epoch_log(Path(str(options["output_dir"]))))


def _text(settings: Settings, left: list[Step], seconds: Mapping[str, float]) -> str:
    """A line for each kind of step and run, and the sums."""
    groups: dict[str, list[Step]] = {}
    for step in left:
        groups.setdefault(f"{step.kind} {step.run}", []).append(step)
    width = max([len(name) for name in groups] + [len("all")])
    lines = [f"{'part'.ljust(width)}  steps       time  device-hours"]
    for name, group in groups.items():
        lines.append(_line(name, group, seconds, width))
    lines.append(_line("all", left, seconds, width))
    total = wall_seconds(settings, left, seconds)
    lines.append(f"wall time: {duration(total)} ({total / 3600:.2f} h)")
    return "\n".join(lines)


def _disk_text(settings: Settings, kept: int) -> str:
    free = disk.free_bytes(settings.output_dir)
    return f"disk: about {kept / 2**30:.1f} GiB will be kept, {free / 2**30:.0f} GiB are free"


def _line(name: str, group: Sequence[Step], seconds: Mapping[str, float], width: int) -> str:
    total = sum(seconds.get(step.name, 0.0) for step in group)
    devices = sum(seconds.get(step.name, 0.0) * step.devices for step in group) / 3600
    return f"{name.ljust(width)}  {len(group):5d}  {duration(total):>9}  {devices:12.2f}"


def wall_seconds(settings: Settings, left: Sequence[Step], seconds: Mapping[str, float]) -> float:
    """From start to end: a sum in sequence; with overlap, each kind of step has its own lane."""
    if not settings.compute.overlaps:
        return sum(seconds.values())
    lane_free: dict[str, float] = {}
    ends: dict[str, float] = {}
    for step in left:
        ready = max((ends.get(need, 0.0) for need in step.needs), default=0.0)
        begin = max(ready, lane_free.get(step.kind, 0.0))
        ends[step.name] = lane_free[step.kind] = begin + seconds.get(step.name, 0.0)
    return max(ends.values(), default=0.0)
