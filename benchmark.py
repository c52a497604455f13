"""The whole experiment as one command: pretrain a round, finetune and score it, pretrain on.

Read `run` first: it is the order of events. The two parts (`mae`, `segmenter`) are subprocesses;
they and this file meet in the files of the output directory (pipeline/plan/layout.py). Which step
comes when is decided in pipeline/plan/steps.py. No torch is imported here.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from common.command import CONTEXT, PATH, command
from common.console import EXIT_STOPPED, run_program, say
from common.files import check_output_file, check_output_folder, hold
from common.interruption import Interruption
from common.options import MOST_SEED, fields_of
from pipeline.launch import beforehand, slurm
from pipeline.launch import doctor as examination
from pipeline.launch.estimate import estimate_run, with_hours
from pipeline.launch.local import LocalLauncher
from pipeline.launch.status import status_text
from pipeline.launch.view import show
from pipeline.plan.check import checked_plan
from pipeline.plan.keep import expiring, remove_expired
from pipeline.plan.layout import Layout
from pipeline.plan.machine import visible_gpus
from pipeline.plan.records import Record, is_done, write_run_files
from pipeline.plan.settings import GROUPS, Keep, Settings
from pipeline.plan.step import PARTS, Step

_POLL_SECONDS = 0.1
_STOPPING = "\nStopping: waiting for the running step to save (again: end it now)\n"


# The order of events --------------------------------------------------------------------------


def run(settings: Settings) -> int:
    """Plans, checks, alternates, reports. Returns the exit code; 0 means that all of it is done."""
    from pipeline.report.page import write_all  # matplotlib takes a second to load

    paths, steps = Layout(settings.data.output_dir), checked_plan(settings)
    if settings.cluster.launcher == "slurm":  # each step is a job; Slurm alternates
        return slurm.run(settings, steps, paths)
    with hold(paths.lock, paths.root):
        write_run_files(settings, steps, paths)
        launcher = LocalLauncher(paths, overlaps=settings.compute.overlaps)
        exit_code = alternate(steps, launcher, keep_going=settings.parts.keep_going, keep=settings.parts.keep)
        say(write_all(paths))  # also after a failure: over what is there
    return exit_code


def alternate(steps: list[Step], launcher: LocalLauncher, *, keep_going: bool, keep: Keep = "all") -> int:
    """Runs every step that is not done yet, each after those it needs; returns the exit code.

    In sequence that is the order of the plan. Steps that have devices of their own run beside each
    other. After a failure what does not need that step goes on, or nothing without `keep_going`.
    """
    # Each step is done, waiting, running, failed, stopped, or left: not to be started in this call.
    states = {s.name: "done" if is_done(s, launcher.paths) else "waiting" for s in steps}
    files = expiring(steps, keep)
    remove_expired(files, lambda name: states[name] == "done", launcher.paths)
    with Interruption(notice=_STOPPING, ends_process=False) as stop:
        while not {"waiting", "running"}.isdisjoint(states.values()):
            for record in [*start_ready(steps, states, launcher), *launcher.poll()]:
                states[record.name] = record.state
                if record.message:
                    say(f"Error: {record.message}", err=True)
                if record.state == "done":
                    remove_expired(files, lambda name: states[name] == "done", launcher.paths)
            stopping = stop.requested or "stopped" in states.values()
            over = stopping or ("failed" in states.values() and not keep_going)
            if over:  # until it has ended: what does not save in time is ended
                launcher.stop(at_once=stop.repeated)
            for step in steps:  # in the order of the plan, so that this reaches what needs it
                needed = {states[need] for need in step.needs}
                if states[step.name] == "waiting" and (over or needed & {"failed", "left"}):
                    states[step.name] = "left"
            time.sleep(_POLL_SECONDS if launcher.running else 0)
    left = sum(state != "done" for state in states.values())
    if left:
        what = "Stopped" if stopping else "Error: the plan could not be finished"
        say(f"{what}; {left} of {len(steps)} steps left, the same command goes on", err=True)
    return 0 if not left else EXIT_STOPPED if stopping else 1


def start_ready(steps: list[Step], states: dict[str, str], launcher: LocalLauncher) -> list[Record]:
    """Starts the steps that have all they need, while there is room; returns their records."""
    started, kept = [], set[int]()  # kept: the GPUs for which a step waits, free or not
    for step in [step for step in steps if states[step.name] == "waiting"]:
        is_ready = all(states[need] == "done" for need in step.needs)
        # Pretraining needs its GPUs at once: scores that take each as it comes free starve it.
        if is_ready and kept.isdisjoint(step.gpus or ()) and launcher.has_room_for(step):
            done = sum(state == "done" for state in states.values())
            left = f", {left}" if (left := launcher.time_left()) else ""
            say(f"\n== {step.name} ({done} of {len(steps)} steps done{left})")
            started.append(launcher.start(step))
        else:
            kept.update(step.gpus or ())
    return started


# The command line -----------------------------------------------------------------------------


class _RunByDefault(click.Group):
    """Flags without a command are a run; --help shows its flags and the other commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click's hook."""
        if not args:
            args = ["--help"]
        elif args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Click's hook."""
        self.commands["run"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(
    cls=_RunByDefault, context_settings=CONTEXT, options_metavar="FLAGS", subcommand_metavar="| COMMAND ..."
)
def main() -> None:
    """Does hiding objects make masked-autoencoder pretraining better for dense prediction?

    Pretrains a ViT, finetunes and scores it on semantic segmentation every --eval-freq epochs, and
    compares the masking methods. The same command continues a run that was stopped.
    """


@command(main, "run", passed_on=PARTS, **GROUPS)
@click.option("--dry-run", is_flag=True, help="Check and show the plan; nothing is run.")
@click.option("--verbose", is_flag=True, help="With --dry-run: the commands, too.")
@click.option("--estimate", is_flag=True, help="Time some real steps; nothing is written.")
def run_or_show(dry_run: bool, verbose: bool, estimate: bool, **groups: Any) -> int:
    """Run the plan, or show it."""
    settings = _settings(groups)
    if estimate:
        say(estimate_run(settings))
    elif dry_run:
        show(with_hours(settings), verbose=verbose)
    else:
        return run(with_hours(settings))
    return 0


run_or_show.hidden = True  # the group's own help shows its flags


def _settings(groups: dict[str, Any]) -> Settings:
    """What the command line gave, with the number of GPUs filled in."""
    compute = groups["compute"].resolved(groups["cluster"], len(visible_gpus()))
    return Settings(**{**groups, "compute": compute})


@command(main, "score", own={"eval_seeds": 0}, **GROUPS)
@click.argument("encoders", metavar="[NAME=]ENCODER,...")
@click.option("--dry-run", is_flag=True, help="Check and show the plan; nothing is run.")
def score(encoders: str, dry_run: bool, **groups: Any) -> int:
    """Probe any ENCODERS on --eval-dataset, and report; with --eval-seeds N finetune them, too.

    An ENCODER is random, a file, timm:NAME|FOLDER, hf:NAME|FOLDER or FILE.py:FUNCTION.
    """
    # An argument, since there is nothing to score without encoders; else it is --eval.
    judged = fields_of(GROUPS["experiment"])["eval"].judge(encoders)
    groups["experiment"] = replace(groups["experiment"], eval=judged)
    settings = _settings(groups)
    if dry_run:
        show(settings, verbose=False)
        return 0
    return run(settings)


beforehand.add_to(main, _settings)


@main.command()
@click.argument("folder", type=PATH)
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)
def sample(folder: Path, seed: int) -> None:
    """Write a small dataset in the real layouts into FOLDER."""
    from pipeline.plan.sample import write_sample  # numpy, pycocotools

    folder = folder.resolve()
    check_output_folder(folder, "FOLDER")
    write_sample(folder, seed=seed)
    say(f"{folder}/in1k and {folder}/segmentation/dataset.yml are there. To run on them:")
    say(
        f"  python benchmark.py --config configs/sample.yml --in1k-dir {folder}/in1k "
        f"--eval-dataset {folder}/segmentation/dataset.yml --output-dir DIR"
    )


@main.command()
@click.argument("folder", type=PATH, default=".")
def status(folder: Path) -> None:
    """Show what is done, running, waiting and failed in FOLDER."""
    say(status_text(Layout(folder.resolve())))


@main.command()
@click.argument("folders", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, help="The page.  [default: report.html in the folder; of several, here]")
@click.option("--paper", type=PATH, help="A folder for LaTeX tables, figures, methods and BibTeX.")
def report(folders: tuple[Path, ...], out: Path | None, paper: Path | None) -> None:
    """Write results.csv in each of FOLDERS, and one page over all of them; a bundle is one, too."""
    from pipeline.report.page import page_of, write_report

    folders = tuple(folder.resolve() for folder in folders)
    page = out or page_of(folders)
    write_report(folders, page, paper=paper)
    say(f"{page}\n{paper / 'paper.tex'}" if paper else str(page))


@main.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="The file.  [default: FOLDER.bundle, here]")
def bundle(folder: Path, out: Path | None) -> None:
    """Write what a report needs of FOLDER into one file, without weights and images.

    `report A.bundle B.bundle` compares runs of two places image by image.
    """
    from pipeline.report.bundle import is_bundle, write_bundle

    folder = folder.resolve()
    out = out or Path(f"{folder.name}.bundle")
    check_output_file(out, is_own=is_bundle)
    write_bundle(Layout(folder), out)
    say(f"{out}, {out.stat().st_size / 2**20:.1f} MiB")


@command(main, "doctor", passed_on=PARTS, **GROUPS)
def doctor(**groups: Any) -> int:
    """Look at this machine and, given the flags of a run, at its data; say what to fix."""
    findings = list(examination.examine(lambda: _settings(groups), groups))
    say(examination.findings_text(findings))
    return 1 if any(finding.fix for finding in findings) else 0


command_line = partial(run_program, main, "segmae")  # of `pip install -e .`

if __name__ == "__main__":
    run_program(main, "benchmark.py")
