"""Before any work: make the plan and judge all of it, so that nothing stops it later.

Read `checked_plan`. The parts' own checks run in this process, which never loads torch: a dataset
is listed once, however many steps look at it. Only what takes torch to look into, a checkpoint that
exists, is asked of the part, in a process of its own.
"""

import functools
import math
import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mae.check
import segmenter.check
from common.console import say
from common.files import NOTHING_WRITTEN, check_output_file, check_output_folder
from common.step_files import find_resumable, round_checkpoints
from mae.config import MethodConfig, PretrainConfig
from pipeline.plan.layout import Layout, is_report, is_results_csv
from pipeline.plan.machine import REPO_ROOT, visible_gpus
from pipeline.plan.records import differences, epochs_reached, is_done
from pipeline.plan.segments import MAKING, reads_segments, with_segments, with_store
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Arguments, Facts, Step, make_plan, nodes_of
from segmenter.config import RANDOM, TrainConfig


def checked_plan(settings: Settings) -> list[Step]:
    """The plan, with what its check found; ValueError for whatever would stop it later.

    Tells what a user may not expect. Writes nothing but sample data, where they are missing.
    """
    paths, steps = Layout(settings.data.output_dir), make_plan(settings)
    check_output_folder(paths.root)
    check_own_files(paths)
    # Options are judged by now, so that a slip does not leave sample data behind.
    if settings.data.missing_sample:
        from pipeline.plan.sample import write_sample  # numpy, pycocotools

        say(f"Generating the sample data in {settings.data.missing_sample}")
        write_sample(settings.data.missing_sample)
        steps = make_plan(settings)  # by what lies there now
    _check_same_settings(steps, paths)
    # Segments are made for what is left; a finished run packs nothing.
    done = {step.name for step in steps if is_done(step, paths)}
    steps = with_segments(steps, settings, done)
    waiting = [step for step in steps if step.name not in done and not is_done(step, paths)]
    wanted, there = settings.compute.num_gpus or 0, visible_gpus()
    if waiting and settings.cluster.launcher == "local" and wanted > len(there):
        raise ValueError(
            f"--num-gpus {wanted}: there are {len(there)} here, by CUDA_VISIBLE_DEVICES or else "
            "the driver; set the former if that is wrong"
        )
    made = {output for step in steps for output in step.outputs}  # by the end of the plan
    for step in waiting:
        _check_possible(step, made)
    facts = _check_by_parts(waiting, settings)
    for note in settings.notes():  # last: an error stays alone
        say(f"Note: {note}", err=True)
    return [replace(step, facts=facts.get(step.name)) for step in steps]


def check_own_files(paths: Layout) -> None:
    """Raise ValueError if a file that the run will write is there already, and of something else.

    The output directory is the current one by default.
    """
    for path, is_own in (  # it may be somebody's project, with a report.html of its own
        (paths.run_yml, lambda head: head.startswith((b"settings:", b"command:"))),
        (paths.results_csv, is_results_csv),
        (paths.report_html, is_report),
    ):
        check_output_file(path, "--output-dir", is_own=is_own, makes_folder=True)
    if paths.bookkeeping.exists() and not paths.bookkeeping.is_dir():
        raise ValueError(f"--output-dir: {paths.bookkeeping} is no folder; {NOTHING_WRITTEN}")


def _check_same_settings(steps: list[Step], paths: Layout) -> None:
    """Everything in an output directory is made alike."""
    changed, remedy = differences(steps, paths), "Use these or another --output-dir"
    if not changed:
        return
    # Where only scores differ, the pretrainings, which took days, can stay.
    if not differences([step for step in steps if step.lane != "evaluate"], paths):
        remedy += f", or remove {paths.eval_output} and {paths.probe_output} to score anew"
    raise ValueError(
        f"{paths.root} holds a run with other settings: {'; '.join(changed[:5])}"
        f"{' ...' if len(changed) > 5 else ''}. {remedy}"
    )


def _check_possible(step: Step, made: Collection[Path]) -> None:
    """The checkpoint that it starts from is there or will be `made`.

    One that was passed and is gone cannot be made again in the same directory.
    """
    init = init_of(step)
    if init is not None and init not in made and not init.is_file():
        there = ", ".join(map(str, round_checkpoints(init.parent)))
        hint = f"; there are those after epochs {there}" if there else ""
        raise ValueError(f"{step.name} needs the checkpoint {init}, which does not exist{hint}")
    if step.kind != "pretrain" or step.outputs[0].exists():
        return
    reached = math.ceil(epochs_reached(step))  # it may be in a longer round
    later = sorted(n for n in (*round_checkpoints(step.folder), reached) if n > step.epochs)
    if later:
        raise ValueError(
            f"{step.outputs[0]} is not there and pretraining is past it (epoch {later[0]}): "
            f"evaluate after epoch {later[0]} or later, or use another --output-dir"
        )


def init_of(step: Step) -> Path | None:
    """The checkpoint that it starts from."""
    if isinstance(step.config, Arguments):
        return None
    config = step.config
    init = config.run.init if isinstance(config, PretrainConfig) else config.init
    return None if init == RANDOM else init


def startable(step: Step) -> Step:
    """The step as it can be tried now: without the checkpoint that an earlier one will make."""
    init = init_of(step)
    if init is None or init.exists():
        return step
    now: Any = step.config
    # To pretrain from nothing, --init is left out; to score nothing, it is "random".
    if isinstance(now, PretrainConfig):
        now = replace(now, run=replace(now.run, init=None))
    elif isinstance(now, TrainConfig):
        now = replace(now, run=replace(now.run, init=RANDOM))
    else:
        now = replace(now, init=RANDOM)
    return replace(step, config=now)


def _check_by_parts(waiting: Sequence[Step], settings: Settings) -> dict[str, Facts]:
    """What each part says of its steps, by name: those of a run differ in the epoch only."""
    found, questions = dict[Any, Facts](), dict[Any, tuple[list[str], dict[str, str]]]()
    # Each dataset is listed once: ImageNet takes minutes on a disk that is far away.
    known, read_task = dict[Any, Any](), functools.cache(segmenter.check.read_task)
    makes_segments = any(step.kind in MAKING for step in waiting)
    parts = [step for step in waiting if not isinstance(step.config, Arguments)]
    for step in parts:
        if (step.kind, step.run) in found:
            continue
        processes, now = step.processes * nodes_of(step, settings), startable(step)
        config: Any = now.config
        if isinstance(config, PretrainConfig):
            waits = makes_segments and reads_segments(step)
            # What is there now is looked at, not the store that will be made.
            now = with_store(now, settings.data.masks_dir) if waits else now
            facts, asks = _check_pretraining(now, processes, known, packed=not waits)
            now = _without_segments(now) if waits else now
        else:
            facts, asks = _check_scoring(config, read_task(config.run.dataset), processes)
        found[step.kind, step.run] = facts
        if asks:
            # Steps that start from one file ask once. WORLD_SIZE is what torchrun would say.
            about = find_resumable(now.folder) or init_of(now) or now.folder
            question = [*now.alone, "--dry-run", "check"], {"WORLD_SIZE": str(processes)}
            questions.setdefault((now.program, about), question)
    ask([words for words, _ in questions.values()], [more for _, more in questions.values()])
    return {step.name: found[step.kind, step.run] for step in parts}


def _check_pretraining(
    step: Step, processes: int, known: dict[Any, Any], *, packed: bool
) -> tuple[Facts, bool]:
    """What the run will be, and whether its part has to look into files."""
    config: Any = step.config
    facts = mae.check.check_pretraining(config, processes=processes, packed=packed, known=known)
    # A checkpoint of its own belongs to a list of images that is not known before segments are.
    is_open = packed or find_resumable(step.folder) is None
    return facts, is_open and mae.check.needs_torch(config)


def _check_scoring(config: Any, task: segmenter.check.Task, processes: int) -> tuple[Facts, bool]:
    """The same of a probe or a finetuning."""
    if isinstance(config, TrainConfig):
        facts = segmenter.check.check_training(config, task, processes=processes)
    else:
        facts = segmenter.check.check_probe(config, task)
    asks = segmenter.check.needs_torch(config)
    if not asks:  # else the part says it, too
        segmenter.check.earlier_output(config, task)
    return facts, asks


def _without_segments(step: Step) -> Step:
    """By a method that needs none: enough to look into the checkpoint of --init."""
    config: Any = step.config
    data = replace(config.data, use_unmasked_images=True)
    return replace(step, config=replace(config, data=data, method=MethodConfig()))


def ask(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]] | None = None
) -> list[str]:
    """What each command prints; as many beside each other as there are cores.

    environments: what each gets beside this process's own. Raises ValueError with the reasons of
    those that fail, each once.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process of its own
        ended = list(pool.map(_run, commands, environments or [{}] * len(commands)))
    complaints = [_complaint(done) for done in ended if done.returncode != 0]
    if complaints:
        raise ValueError("\n".join(dict.fromkeys(complaints)))
    return [done.stdout for done in ended]


def _run(
    command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPO_ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that the part said, else the end of what it said."""
    lines = (done.stderr or done.stdout).strip().splitlines()
    # torchrun and logging may put something before it.
    said = [line.partition("Error: ")[2] for line in lines if "Error: " in line]
    return said[0] if said else "\n".join(lines[-3:]) or "it gave no reason"
