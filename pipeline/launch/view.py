"""Steps as people see them: one table, of which each question chooses the columns."""

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from common.console import aligned, say
from pipeline.plan import machine
from pipeline.plan.check import checked_plan
from pipeline.plan.keep import disk_bytes
from pipeline.plan.layout import Layout
from pipeline.plan.machine import GIB
from pipeline.plan.records import is_done
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step


def step_table(
    names: Sequence[str], columns: Mapping[str, Sequence[str]], numbers: Sequence[str] = ()
) -> str:
    """A line for each step: its number, its name, and what the columns say of it, by their titles.

    numbers: titles of the columns that end alike.
    """
    count = [str(number) for number, _ in enumerate(names, start=1)]
    rows = [("", "step", *columns), *zip(count, names, *columns.values(), strict=True)]
    return aligned(rows, right=(0, *(rows[0].index(title) for title in numbers)))


def show(settings: Settings, *, verbose: bool) -> None:
    """--dry-run: the checked plan, and what pretraining's schedule will be; verbose: commands."""
    steps, paths = checked_plan(settings), Layout(settings.data.output_dir)
    done = {step.name for step in steps if is_done(step, paths)}
    say(f"{len(steps)} steps, {len(done)} done, in {paths.root}\n")
    numbers = {step.name: str(number) for number, step in enumerate(steps, start=1)}
    columns = {
        "what it does": [step.what for step in steps],
        "on": [devices_text(step) for step in steps],
        "after": [", ".join(numbers[need] for need in step.needs) or "-" for step in steps],
        "": ["done" if step.name in done else "to do" for step in steps],
    }
    say(step_table([step.name for step in steps], columns))
    for step in steps if verbose else ():  # to be copied into a shell
        log, *left = (os.path.relpath(p, paths.root) for p in (step.console_log, *step.outputs))
        say(f"\n{numbers[step.name]}  {shlex.join(step.command)}")
        say(f"   leaves {', '.join(left)}\n   log    {log}")
    # The first one left stands for all: their schedules differ in the end at most (--budget).
    for step in [step for step in steps if step.kind == "pretrain" and step.facts][:1]:
        say(f"\n{_schedule_text(step.facts, step.config)}")
    say(f"\n{disk_text([step for step in steps if step.name not in done], settings)}")
    if not verbose:
        say("\n--verbose shows the commands")


def disk_text(steps: Sequence[Step], settings: Settings, besides: float = 0) -> str:
    """What the weights of steps that are left take, at the most and in the end, and what is free.

    besides: bytes of what else they leave.
    """
    keep, free = settings.parts.keep, machine.free_bytes(settings.data.output_dir) / GIB
    peak, end = ((one + besides) / GIB for one in disk_bytes(steps, keep))
    taken = f"about {peak:.1f} GiB at the peak, {end:.1f} GiB in the end (--keep {keep})"
    return f"disk: {taken}, {free:.0f} GiB are free"


def devices_text(step: Step) -> str:
    """What it runs on, in words."""
    if step.device != "cuda":
        return "CPU"
    there = len(step.gpus or ())  # of which a score takes some
    several = f"{step.devices} of {there}" if there > step.devices else str(step.devices)
    return f"{several} GPU{'' if several == '1' else 's'}"


def _schedule_text(facts: Any, config: Any) -> str:
    """Images, batch, accumulation and the learning rate at the points that matter."""
    plan, is_auto = facts.plan, config.run.batch_size == "auto"  # until a GPU is measured
    at_once, parts = ("auto",) * 2 if is_auto else (plan.micro_batch_size, plan.accumulation_steps)
    lines = [
        f"pretraining: {facts.train} images ({facts.left_out} left out), {facts.val} held out "
        f"({facts.val_left_out} left out), {plan.steps_per_epoch} steps per epoch",
        f"effective batch {plan.effective_batch_size} = {at_once} per device x {plan.processes} "
        f"devices x {parts} accumulated",
        f"learning rate {config.optimisation.learning_rate:g} at its peak",
    ]
    rates = [f"  epoch {at:g}: {rate:.3g}  {name}" for at, rate, name in facts.learning_rates]
    return "\n".join([*lines, *rates])
