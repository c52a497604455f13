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

from common.console import aligned
from common.environment import PROGRESS_FILE
from common.progress import duration
from mae.check import PretrainFacts
from mae.config import END_DIGITS, PretrainConfig, make_method, training_flops
from mae.masking import METHODS
from pipeline.launch.local import environment
from pipeline.launch.view import devices_text, disk_text, step_table
from pipeline.plan.budget import in_words
from pipeline.plan.check import ask, checked_plan, startable, without_segments
from pipeline.plan.layout import Layout
from pipeline.plan.preregistration import read_frozen
from pipeline.plan.records import is_done, read_all_records, read_progress, read_spends
from pipeline.plan.segments import MAKING, reads_segments, with_segments
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan

Timed = tuple[str, Any]  # a kind of step, and the method of a pretraining
_DISAGREE = 0.1  # of hours with FLOPs, that is told


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
        settings = with_hours(settings)
        paths, steps = Layout(settings.data.output_dir), checked_plan(settings)
        left = [step for step in steps if not is_done(step, paths)]
        making = [step for step in left if step.kind == "generate"]
        price = _price_of_segments(making[0]) if making else {}
        timed = timings(left)
        seconds = step_seconds(left, timed)
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
    costs = _costs_of_methods([step for step in left if step.facts], timed)
    costs = f"\n\na pretraining of each, to the end of its schedule:\n{costs}" if costs else ""
    return f"{table}\n{wall}\ndevice-hours: {sum(hours):.2f}\n{disk}{costs}"


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


def timings(steps: Sequence[Step]) -> dict[Timed, Mapping[str, float]]:
    """Kind of step, and method of a pretraining -> what timing one of them says."""
    timed: dict[Timed, Mapping[str, float]] = {}
    kinds = {step.kind for step in steps}
    makes_segments = bool(kinds & set(MAKING))
    # What a probe does, an evaluation does: one of them is timed.
    asked = ("pretrain", "evaluate" if "evaluate" in kinds else "probe")
    for step in steps:
        if step.kind in asked and (key := _timed_as(step)) not in timed:
            now = startable(step)
            now = without_segments(now) if makes_segments and reads_segments(step) else now
            timed[key] = _asked([*now.command, "--dry-run", "time"], step)
    return timed


def _timed_as(step: Step) -> Timed:
    return step.kind, step.settings.get("mask_method")


def _epoch_seconds(cost: Mapping[str, float]) -> float:
    """Both parts evaluate so often per epoch: with held-out images, or with all of a split."""
    return cost["epoch_seconds"] + cost["evaluations"] / cost["epochs"] * cost["evaluation_seconds"]


def step_seconds(steps: Sequence[Step], timed: Mapping[Timed, Mapping[str, float]]) -> dict[str, float]:
    """Step name -> expected seconds, by what timing each kind of step, and each method, said."""
    found = {step.name: 0.0 for step in steps}
    reached: dict[str, float] = {}  # run -> epochs completed before the step
    for step in steps:
        if step.kind not in ("pretrain", "evaluate"):
            continue
        cost = timed[_timed_as(step)]
        epochs = cost["epochs"]
        if isinstance(step.config, PretrainConfig):
            begun = reached.get(step.run, read_progress(step.folder).get("epoch", 0))
            reached[step.run] = min(step.epochs, step.config.optimisation.end)
            epochs = max(reached[step.run] - begun, 0)
        found[step.name] = cost["setup_seconds"] + epochs * _epoch_seconds(cost)
    probing = timed.get(("evaluate", None)) or timed.get(("probe", None))
    for step in steps:
        if step.kind == "probe" and probing and step.facts:
            # It sees every training image once, and the others as an evaluation does.
            cost, passes = probing, 1 + step.facts.train / step.facts.val
            found[step.name] = cost["setup_seconds"] + passes * cost["evaluation_seconds"]
    return found


def _costs_of_methods(steps: Sequence[Step], timed: Mapping[Timed, Mapping[str, float]]) -> str:
    """A pretraining of each method in FLOPs by the formula and hours by timed steps; empty for one."""
    rows, first = (
        [("method", "epochs", "train FLOPs", "device-hours", "an epoch, by FLOPs", "by hours", "")],
        None,
    )
    for step in {_timed_as(s): s for s in steps if s.kind == "pretrain"}.values():
        config = step.config
        assert isinstance(config, PretrainConfig) and isinstance(step.facts, PretrainFacts)
        of_image = training_flops(config.model, make_method(config.method, config.model))
        seconds, end = _epoch_seconds(timed[_timed_as(step)]) * step.devices, config.optimisation.end
        images = step.facts.plan.images_per_epoch
        first = first or (of_image * images, seconds)
        by_flops, by_hours = of_image * images / first[0], seconds / first[1]
        apart = abs(by_hours / by_flops - 1) > _DISAGREE
        rows.append((
            config.method.mask_method, f"{end:.4g}", f"{of_image * images * end:.2e}",
            f"{seconds * end / 3600:.3g}", f"x {by_flops:.2f}", f"x {by_hours:.2f}", "they disagree" * apart,
        ))  # fmt: skip
    return aligned(rows, right=range(1, 6)) if len(rows) > 2 else ""


def with_hours(settings: Settings) -> Settings:
    """With each method's epochs where --budget is in hours: by timed steps, once for a directory.

    Hours are those of training and held-out loss; starting, saving and scoring are in no budget.
    Raises ValueError.
    """
    budget, paths = settings.experiment.shared_budget, Layout(settings.data.output_dir)
    if budget is None or budget.kind != "gpu-hours" or settings.experiment.eval is not None:
        return settings
    counts, told = settings.experiment.count_segments, settings.experiment.budget_text
    source = settings.experiment.pretrained_from
    spends = read_spends(Layout(source) if source else paths)
    frozen = read_frozen(paths)
    known = frozen.ends if frozen and not frozen.is_changed else {}
    if spends is not None:  # told with its budget: another's epochs are none of this one's
        words = in_words(spends["asked"], counts_segments=spends["count_segments"])
        known |= {(words, name): of["end"] for name, of in spends["methods"].items()}
    ends = {m: known[told, m] for m in settings.experiment.mask_method if (told, m) in known}
    if len(ends) < len(settings.experiment.mask_method) and settings.data.missing_sample:
        raise ValueError(
            "--budget gpu-hours times steps on images: make the sample first, by `sample FOLDER`"
        )
    steps = with_segments(make_plan(settings), settings)
    trained = [s for s in steps if s.kind == "pretrain" and s.settings["mask_method"] not in ends]
    making = [step for step in steps if step.kind in MAKING]
    segments = _hours_of_segments(making, paths) if counts and trained else 0.0
    for (_, name), cost in timings([*making, *trained]).items():
        spent = segments if METHODS[str(name)].uses_segments else 0.0
        hours = _epoch_seconds(cost) * trained[0].devices / 3600
        ends[str(name)] = round((budget.amount - spent) / hours, END_DIGITS)
        budget.check_end(str(name), ends[str(name)])
    return replace(settings, ends=ends)


def _hours_of_segments(making: Sequence[Step], paths: Layout) -> float:
    """Device-hours of making them: as recorded, or as an estimate. Raises ValueError."""
    made = [r for r in read_all_records(paths) if r.kind in ("generate", "merge") and r.state == "done"]
    if made:
        return sum(record.seconds * record.devices for record in made) / 3600
    generate = [step for step in making if step.kind == "generate"]
    if not generate:
        raise ValueError(
            "--count-segments: nobody knows what the segments cost that are there; leave it out, or "
            "have them made here by --make-segments"
        )
    return _price_of_segments(generate[0])["seconds"] * generate[0].devices / 3600


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
