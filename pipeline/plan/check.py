"""Before any work: make the plan and judge all of it, so that nothing stops it later.

Read `checked_plan`. The parts' own checks run in this process, which never loads torch: a dataset
is listed once, however many steps look at it. Only what takes torch to look into, a checkpoint that
exists, is asked of the part, in a process of its own.
"""

import functools
import math
import os
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mae.check
import segmenter.check
from common.console import say
from common.files import NOTHING_WRITTEN, check_output_file, check_output_folder
from common.progress import Counter
from common.step_files import find_resumable, round_checkpoints
from mae.config import PretrainConfig
from mae.masking import METHODS
from pipeline.plan.layout import Layout, dataset_of, is_report, is_results_csv, is_run_yml
from pipeline.plan.machine import REPO_ROOT, visible_gpus
from pipeline.plan.preregistration import deviations, of_steps, read_frozen
from pipeline.plan.records import differences, is_done, read_progress
from pipeline.plan.segments import MAKING, reads_segments, with_segments
from pipeline.plan.settings import Settings
from pipeline.plan.step import Facts, Step
from pipeline.plan.steps import in_words_of_the_plan, make_plan
from segmenter.config import RANDOM, ProbeConfig

# A command, and what its environment has beside this process's own.
Question = tuple[Sequence[str], Mapping[str, str]]


def checked_plan(settings: Settings) -> list[Step]:
    """The plan, with what its check found; ValueError for whatever would stop it later.

    Tells what a user may not expect. Writes nothing but sample data, where they are missing.
    """
    paths, steps = Layout(settings.data.output_dir), make_plan(settings)
    check_output_folder(paths.root)
    _check_own_files(paths)
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
    done |= {step.name for step in steps if step.kind in MAKING and is_done(step, paths)}
    waiting = [step for step in steps if step.name not in done]
    wanted, there = settings.compute.num_gpus or 0, len(visible_gpus())
    if waiting and settings.cluster.launcher == "local" and wanted > there:
        by = "by CUDA_VISIBLE_DEVICES, or else the driver"
        raise ValueError(f"--num-gpus {wanted}: there are {there} here, {by}")
    # By the end of the plan; what is done already may be gone again.
    made = {output for step in waiting for output in step.outputs}
    for step in waiting:
        _check_possible(step, made)
    facts = _check_by_parts(waiting, settings)
    steps = [replace(step, facts=facts.get(step.name)) for step in steps]
    notes = [*settings.notes(), *_from_the_frozen_plan(steps, paths)]
    for note in notes:  # last: an error stays alone
        say(f"Note: {note}", err=True)
    return steps


def _from_the_frozen_plan(steps: Sequence[Step], paths: Layout) -> list[str]:
    """Where the plan is not the one that was frozen. Raises ValueError for a file that was changed."""
    frozen = read_frozen(paths)
    if frozen is None:
        return []
    if frozen.is_changed:
        raise ValueError(f"{paths.preregistration} was changed after it was written: put it back as it was")
    return [f"not as in {paths.preregistration.name}: {text}" for text in deviations(frozen, of_steps(steps))]


def _check_own_files(paths: Layout) -> None:
    """Raise ValueError if a file that the run will write is there, and of something else."""
    # The current folder, by default, may be somebody's project, with a report.html of its own.
    check = functools.partial(check_output_file, flag="--output-dir", makes_folder=True)
    check(paths.run_yml, is_own=is_run_yml)
    check(paths.results_csv, is_own=is_results_csv)
    check(paths.report_html, is_own=is_report)
    if paths.bookkeeping.exists() and not paths.bookkeeping.is_dir():
        raise ValueError(f"--output-dir: {paths.bookkeeping} is no folder; {NOTHING_WRITTEN}")


def _check_same_settings(steps: list[Step], paths: Layout) -> None:
    """Everything in an output directory is made alike."""
    changed, remedy = differences(steps, paths), "Use these or another --output-dir"
    # Where only scores differ, the pretrainings, which took days, can stay.
    if not differences([step for step in steps if step.lane != "evaluate"], paths):
        remedy += f", or remove {paths.eval_output} and {paths.probe_output} to score anew"
    if changed:
        runs: dict[str, list[str]] = {}  # one difference of several runs is said once
        for run, text in (one.split(": ", 1) for one in changed):
            runs.setdefault(text, []).append(run)
        said = [f"{', '.join(runs[text][:3])}{' ...' * (len(runs[text]) > 3)}: {text}" for text in runs]
        shown = "; ".join(said[:5]) + (" ..." if len(said) > 5 else "")
        raise ValueError(f"{paths.root} holds a run with other settings: {shown}. {remedy}")


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
    reached = math.ceil(read_progress(step.folder).get("epoch", 0))  # it may be in a longer round
    for later in sorted(n for n in (*round_checkpoints(step.folder), reached) if n > step.epochs):
        raise ValueError(
            f"{step.outputs[0]} is not there and pretraining is past it (epoch {later}): "
            f"evaluate after epoch {later} or later, or use another --output-dir"
        )


def init_of(step: Step) -> Path | None:
    """The checkpoint that it starts from; what a library brings is judged by the part."""
    config = step.config
    if config is None:
        return None
    init = config.run.init if isinstance(config, PretrainConfig) else config.init
    return init if isinstance(init, Path) else None


def startable(step: Step) -> Step:
    """The step as it can be tried now: without the checkpoint that an earlier one will make."""
    init = init_of(step)
    if init is None or init.exists():
        return step
    if isinstance(step.config, ProbeConfig):
        return replace(step, config=replace(step.config, init=RANDOM))
    # To pretrain from nothing, --init is left out; to score nothing, it is "random".
    return step.with_options(run={"init": None if step.kind == "pretrain" else RANDOM})


def without_segments(step: Step) -> Step:
    """The pretraining as it can be tried before its segments are there: what costs the same.

    Random patches are removed, as many as the method removes, or none.
    """
    assert isinstance(step.config, PretrainConfig)
    method = step.config.method
    ratio = method.mask_ratio if METHODS[method.mask_method].removes_tokens else 0.0
    told = {"mask_method": "patches", "mask_ratio": ratio}
    return step.with_options(method=told, data={"use_unmasked_images": True})


def _check_by_parts(waiting: Sequence[Step], settings: Settings) -> dict[str, Facts]:
    """What each part says of its steps, by name: those of a run differ in the epoch only."""
    found, questions = dict[Any, Facts](), dict[Any, Question]()
    # Each dataset is listed once: ImageNet takes minutes on a disk that is far away.
    known, read_dataset = dict[Any, Any](), functools.cache(segmenter.check.read_checked)
    makes_segments = any(step.kind in MAKING for step in waiting)

    def check(step: Step) -> Facts:
        processes, now = step.processes * step.nodes, startable(step)
        facts: Facts
        if isinstance(step.config, PretrainConfig):
            packed = not (makes_segments and reads_segments(step))
            if not packed:  # what is there now is looked at, not the store that will be made
                now = now.with_options(data={"masks_dir": settings.data.masks_dir})
            config: Any = now.config
            facts = mae.check.check_pretraining(config, processes, packed=packed, known=known)
            # Its own checkpoint belongs to a list of images that is not known before segments are.
            asks = mae.check.needs_torch(config) and (packed or not find_resumable(step.folder))
            now = now if packed else without_segments(now)
        else:
            config = now.config
            dataset, asks = read_dataset(config.run.dataset), segmenter.check.needs_torch(config)
            facts = segmenter.check.check_run(config, dataset, processes=processes)
            if not asks:  # else the part says it, too
                segmenter.check.earlier_output(config, dataset)
        if asks:
            # Steps that start from one file ask once. WORLD_SIZE is what torchrun would say.
            about = find_resumable(now.folder) or init_of(now) or now.folder
            alone = replace(now, processes=1).command
            question: Question = [*alone, "--dry-run", "check"], {"WORLD_SIZE": str(processes)}
            questions.setdefault((now.program, about), question)
        return facts

    complaints: dict[str, str] = {}  # by kind of step: those of one are alike
    with Counter("checking", total=len(waiting), unit="steps") as counter:
        for step in waiting:
            counter.what = f"checking {step.name}"
            counter.advance()
            about = step.kind, step.run, dataset_of(step.name)
            if step.config is None or about in found or step.kind in complaints:
                continue
            # All are heard, so that one of many that are wrong does not hide the others.
            try:
                found[about] = check(step)
            except ValueError as error:
                complaints[step.kind] = in_words_of_the_plan(str(error), step.kind)
        counter.what = "checking what weights hold"
        counter.reach(counter.done)
        if complaints:
            raise ValueError("\n".join(dict.fromkeys(complaints.values())))
        ask(questions.values())
    known_of = {s.name: found.get((s.kind, s.run, dataset_of(s.name))) for s in waiting}
    return {name: facts for name, facts in known_of.items() if facts}


def ask(questions: Iterable[Question]) -> list[str]:
    """What each command prints; as many beside each other as there are cores.

    Raises ValueError with the reasons of those that fail, each once.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process of its own
        ended = list(pool.map(_answer, questions))
    complaints = []
    for done in (done for done in ended if done.returncode != 0):
        lines = (done.stderr or done.stdout).strip().splitlines()
        # torchrun and logging may put something before what the part says in one line.
        said = [line.partition("Error: ")[2] for line in lines if "Error: " in line]
        complaints.append(said[0] if said else "\n".join(lines[-3:]) or "it gave no reason")
    if complaints:
        raise ValueError("\n".join(dict.fromkeys(complaints)))
    return [done.stdout for done in ended]


def _answer(question: Question) -> subprocess.CompletedProcess[str]:
    command, more = question
    env = {**os.environ, **more}
    return subprocess.run(command, cwd=REPO_ROOT, env=env, capture_output=True, text=True)
