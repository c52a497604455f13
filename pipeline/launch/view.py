"""Steps as people see them: one table, of which each question chooses the columns."""

import os
import shlex
from collections.abc import Mapping, Sequence

from common.console import aligned, say
from mae.check import PretrainFacts
from mae.config import PretrainConfig
from pipeline.plan.check import checked_plan
from pipeline.plan.layout import Layout
from pipeline.plan.records import is_done
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Arguments, Step


def step_table(
    names: Sequence[str], columns: Mapping[str, Sequence[str]], numbers: Sequence[str] = ()
) -> str:
    """A line for each step: its number, its name, and what the columns say of it, by their titles.

    numbers: titles of the columns that end alike.
    """
    rows = [("", "step", *columns)]  # a number needs no title
    cells = zip(*columns.values(), strict=True)
    rows += [(str(n), name, *said) for n, (name, said) in
             enumerate(zip(names, cells, strict=True), start=1)]  # fmt: skip
    return aligned(rows, right=(0, *(rows[0].index(title) for title in numbers)))


def show(settings: Settings, *, verbose: bool) -> None:
    """--dry-run: the checked plan, and what pretraining's schedule will be; verbose: commands."""
    steps, paths = checked_plan(settings), Layout(settings.data.output_dir)
    done = {step.name for step in steps if is_done(step, paths)}
    say(f"{len(steps)} steps, {len(done)} done, in {paths.root}\n")
    numbers = {step.name: str(number) for number, step in enumerate(steps, start=1)}
    columns = {
        "what it does": [what_it_does(step) for step in steps],
        "on": [devices_text(step) for step in steps],
        "after": [", ".join(numbers[need] for need in step.needs) or "-" for step in steps],
        "": ["done" if step.name in done else "to do" for step in steps],
    }
    say(step_table([step.name for step in steps], columns))
    for step in steps if verbose else ():  # to be copied into a shell
        say(f"\n{numbers[step.name]}  {shlex.join(step.command)}")
        say(f"   leaves {', '.join(os.path.relpath(p, paths.root) for p in step.outputs)}")
        say(f"   log    {os.path.relpath(step.console_log, paths.root)}")
    # All pretrainings of a plan have one schedule: the first one left stands for them.
    facts = [step.facts for step in steps if isinstance(step.facts, PretrainFacts)]
    configs = [step.config for step in steps if isinstance(step.facts, PretrainFacts)]
    if facts and isinstance(configs[0], PretrainConfig):
        say(f"\n{_schedule_text(facts[0], configs[0])}")
    if not verbose:
        say("\n--verbose shows the commands")


def what_it_does(step: Step) -> str:
    """In a few words."""
    config = step.config
    if isinstance(config, Arguments):
        return config.what
    if isinstance(config, PretrainConfig):
        more = ", without segments too" if config.data.use_unmasked_images else ""
        return f"pretrain up to epoch {step.epochs} of {config.optimisation.epochs}{more}"
    what = "probe the frozen encoder" if step.kind == "probe" else "finetune and score"
    return f"{what}, seed {step.settings['seed']}"


def devices_text(step: Step) -> str:
    """What it runs on, in words."""
    if not step.devices_are_gpus:
        return "CPU"
    there = len(step.gpus or ())  # of which a score takes some
    several = f"{step.devices} of {there}" if there > step.devices else str(step.devices)
    return f"{several} GPU{'' if several == '1' else 's'}"


def _schedule_text(facts: PretrainFacts, config: PretrainConfig) -> str:
    """Images, batch, accumulation and the learning rate at the points that matter."""
    plan = facts.plan
    at_once, parts = str(plan.micro_batch_size), str(plan.accumulation_steps)
    if config.run.batch_size == "auto":
        at_once = parts = "auto"  # until a GPU is measured
    lines = [
        f"pretraining: {facts.train} images ({facts.left_out} left out), "
        f"{facts.val} held out ({facts.val_left_out} left out), "
        f"{plan.steps_per_epoch} steps per epoch",
        f"effective batch {plan.effective_batch_size} = {at_once} per device x "
        f"{plan.processes} devices x {parts} accumulated",
        f"learning rate {config.optimisation.learning_rate:g} at its peak",
    ]
    rates = [f"  epoch {at:g}: {rate:.3g}  {name}" for at, rate, name in facts.learning_rates]
    return "\n".join([*lines, *rates])
