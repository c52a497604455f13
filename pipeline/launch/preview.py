"""Before any work: make the plan, check it, show it, and write down the settings."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common import step_files as layout
from common.console import say
from common.files import NOTHING_WRITTEN, check_output_folder, check_replaceable, write_text
from common.terminal import aligned
from pipeline.launch.local import read_progress
from pipeline.plan.layout import Layout
from pipeline.plan.machine import hardware, versions, visible_gpus
from pipeline.plan.parts import Facts, ask, ask_facts
from pipeline.plan.records import differences, is_done, made_runs, write_plan
from pipeline.plan.segments import MAKING, before_segments, with_segments
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Step, make_plan, nodes_of
from pipeline.report.page import is_report
from pipeline.report.tables import is_results_csv


def checked_plan(settings: Settings) -> list[Step]:
    """The plan, with what the parts answered; ValueError for whatever would stop it later.

    Our own checks first, then each part's `--check`, so that its own parser judges its options.
    Tells what a user may not expect. Writes nothing but sample data, where it is missing.
    """
    paths, facts = Layout(settings.data.output_dir), ask_facts(settings)
    steps = make_plan(settings, facts, made_runs(paths))
    check_output_folder(paths.root)
    check_own_files(paths)
    if settings.data.missing_sample:
        from pipeline.plan.sample import write_sample  # numpy, pycocotools

        say(f"Generating the sample data in {settings.data.missing_sample}")
        write_sample(settings.data.missing_sample)
        facts = ask_facts(settings)
        steps = make_plan(settings, facts, made_runs(paths))
    _check_same_settings(steps, paths, facts)
    done = {step.name for step in steps if is_done(step, paths)}
    steps = with_segments(steps, settings, facts, done)
    waiting = [step for step in steps if step.name not in done and not is_done(step, paths)]
    wanted, there = settings.compute.num_gpus or 0, visible_gpus()
    if waiting and settings.cluster.launcher == "local" and wanted > len(there):
        raise ValueError(
            f"--num-gpus {wanted}: there are {len(there)} here, by CUDA_VISIBLE_DEVICES or else "
            "the driver; set the former if that is wrong"
        )
    made = {str(output) for step in steps for output in step.outputs}
    for step in waiting:
        _check_possible(step, made)
    answers = _ask_parts(waiting, settings)
    for note in settings.notes():
        say(f"Note: {note}", err=True)
    return [replace(step, answer=answers.get(step.name, {})) for step in steps]


def check_own_files(paths: Layout) -> None:
    """Raise ValueError if a file that the run will write is there already, and of something else.

    The output directory is the current one by default.
    """
    for path, is_own in (
        (paths.run_yml, lambda head: head.startswith((b"settings:", b"command:"))),
        (paths.results_csv, is_results_csv),
        (paths.report_html, is_report),
    ):
        check_replaceable(path, "--output-dir", is_own=is_own)
    if paths.bookkeeping.exists() and not paths.bookkeeping.is_dir():
        raise ValueError(f"--output-dir: {paths.bookkeeping} is no folder; {NOTHING_WRITTEN}")


def _check_same_settings(steps: list[Step], paths: Layout, facts: Facts) -> None:
    """Everything in an output directory is made alike."""
    changed, remedy = differences(steps, paths, facts), "Use these or another --output-dir"
    if not changed:
        return
    if not differences([step for step in steps if step.lane != "evaluate"], paths, facts):
        remedy += f", or remove {paths.eval_output} and {paths.probe_output} to score anew"
    raise ValueError(
        f"{paths.root} holds a run with other settings: {'; '.join(changed[:5])}"
        f"{' ...' if len(changed) > 5 else ''}. {remedy}"
    )


def _check_possible(step: Step, made: Collection[str]) -> None:
    """The checkpoint that it starts from is there or will be `made`.

    One that was passed and is gone cannot be made again in the same directory.
    """
    init = step.options.get("init")
    if init not in (None, "random") and str(init) not in made and not Path(init).is_file():
        there = ", ".join(map(str, layout.round_checkpoints(Path(init).parent)))
        hint = f"; there are those after epochs {there}" if there else ""
        raise ValueError(f"{step.name} needs the checkpoint {init}, which does not exist{hint}")
    if step.kind != "pretrain" or step.outputs[0].exists():
        return
    reached = math.ceil(read_progress(step.folder).get("epoch", 0))  # in a longer round
    later = sorted(n for n in (*layout.round_checkpoints(step.folder), reached) if n > step.epochs)
    if later:
        raise ValueError(
            f"{step.outputs[0]} is not there and pretraining is past it (epoch {later[0]}): "
            f"evaluate after epoch {later[0]} or later, or use another --output-dir"
        )


def _ask_parts(waiting: Sequence[Step], settings: Settings) -> dict[str, dict[str, Any]]:
    """Step -> what `--check --json` of its run answers; steps of a run differ in the epoch only.

    WORLD_SIZE tells a part, as torchrun will, how many processes share a batch.
    """
    kinds = {(step.kind, step.run): step for step in reversed(waiting)}
    asked = {key: step for key, step in kinds.items() if step.kind not in ("fetch", *MAKING)}
    commands = []
    for step in asked.values():
        # What an earlier step will make cannot be looked at yet.
        now = before_segments(with_existing_init(step), waiting, settings)
        commands.append([*now.alone, "--check", "--json"])
    found = ask(
        commands,
        [{"WORLD_SIZE": str(s.processes * nodes_of(s, settings))} for s in asked.values()],
    )
    answers = dict(zip(asked, found, strict=True))
    return {s.name: answers[s.kind, s.run] for s in waiting if (s.kind, s.run) in answers}


def with_existing_init(step: Step) -> Step:
    """The step as it can be tried now, if an earlier one will make the checkpoint that it needs."""
    init = step.options.get("init")
    if init in (None, "random") or Path(init).exists():
        return step
    # To pretrain from nothing, --init is left out; to score nothing, it is "random".
    instead = "random" if step.lane == "evaluate" else None
    return replace(step, options={**step.options, "init": instead})


def write_run_files(settings: Settings, steps: list[Step], paths: Layout) -> None:
    """run.yml for people, plan.json for `status`."""
    content = {
        "settings": settings.flat(),
        "command": shlex.join(sys.argv),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_text(paths.run_yml, yaml.safe_dump(content, sort_keys=False))
    write_plan(paths, steps)


def show(settings: Settings, *, verbose: bool) -> None:
    """--dry-run: the checked plan, and what pretraining's schedule will be; verbose: commands."""
    steps, paths = checked_plan(settings), Layout(settings.data.output_dir)
    done = {step.name for step in steps if is_done(step, paths)}
    say(f"{len(steps)} steps, {len(done)} done, in {paths.root}\n")
    numbers = {step.name: str(number) for number, step in enumerate(steps, start=1)}
    rows = [("", "step", "what it does", "on", "after", "")]
    for step in steps:
        after = ", ".join(numbers[need] for need in step.needs) or "-"
        state = "done" if step.name in done else "to do"
        rows.append(
            (numbers[step.name], step.name, what_it_does(step), _devices(step), after, state)
        )
    say(aligned(rows, right=(0,)))
    for step in steps if verbose else ():
        say(f"\n{numbers[step.name]}  {shlex.join(step.command)}")
        say(f"   leaves {', '.join(os.path.relpath(p, paths.root) for p in step.outputs)}")
        say(f"   log    {os.path.relpath(step.console_log, paths.root)}")
    first = next((step for step in steps if step.kind == "pretrain" and step.answer), None)
    if first is not None:
        say(f"\n{_schedule_text(first.answer)}")
    if not verbose:
        say("\n--verbose shows the commands")


def what_it_does(step: Step) -> str:
    """In a few words."""
    options = step.options
    more = ", without segments too" if options.get("use_unmasked_images") else ""
    return {
        "fetch": f"download the official {options.get('model')}",
        "pack": "pack the segments into one file",
        "generate": f"make segments by {options.get('model') or step.program[-1]}",
        "merge": f"join the {len(step.needs)} parts of the segments",
        "pretrain": f"pretrain up to epoch {step.epochs} of {options.get('epochs')}{more}",
        "probe": f"probe the frozen encoder, seed {options.get('seed')}",
        "evaluate": f"finetune and score, seed {options.get('seed')}",
    }[step.kind]


def _devices(step: Step) -> str:
    """What it runs on, in words."""
    if not step.devices_are_gpus:
        return "CPU"
    there = len(step.gpus or ())
    several = f"{step.devices} of {there}" if there > step.devices else str(step.devices)
    return f"{several} GPU{'' if several == '1' else 's'}"


def _schedule_text(answer: Mapping[str, Any]) -> str:
    """Images, batch, accumulation and the learning rate at the points that matter."""
    images, batch, rate = answer["images"], answer["batch"], answer["learning_rate"]
    lines = [
        f"pretraining: {images['train']} images ({images['left_out']} left out), "
        f"{images['val']} held out ({images['val_left_out']} left out), "
        f"{batch['steps_per_epoch']} steps per epoch",
        f"effective batch {batch['effective']} = {batch['per_process']} per device x "
        f"{batch['processes']} devices x {batch['accumulation_steps']} accumulated",
        f"learning rate {rate['peak']:g} at its peak",
    ]
    lines += [f"  epoch {epoch:g}: {lr:.3g}  {name}".rstrip() for epoch, lr, name in rate["points"]]
    return "\n".join(lines)
