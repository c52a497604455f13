"""The whole experiment as one command: pretrain a round, finetune and score it, pretrain on.

Read `run` first: it is the order of events. The two parts (`mae`, `segmenter`) are subprocesses;
they and this file meet in the files of the output directory (pipeline/layout.py). Which step comes
when is decided in pipeline/plan.py. No torch is imported here.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from pipeline import options, preview, records
from pipeline.layout import Layout
from pipeline.local import EXIT_STOPPED, LocalLauncher
from pipeline.lock import LockedError, hold
from pipeline.plan import Step, make_plan
from pipeline.settings import Settings

_POLL_SECONDS = 0.1


def run(settings: Settings) -> int:
    """Plans, checks, alternates, reports. Returns the exit code; 0 means that all of it is done."""
    paths = Layout(settings.output_dir)
    steps = make_plan(settings, records.made_runs(paths))
    preview.check(settings, steps, paths)
    if settings.launcher == "slurm":
        from pipeline.slurm import run as run_on_cluster

        return run_on_cluster(settings, steps, paths)
    from pipeline.report import write_all

    with hold(paths.lock):
        preview.write_run_files(settings, steps, paths)
        launcher = LocalLauncher(paths, overlaps=settings.compute.overlaps)
        exit_code = alternate(steps, launcher, keep_going=settings.keep_going)
        click.echo(write_all(paths))
    return exit_code


def alternate(steps: list[Step], launcher: LocalLauncher, *, keep_going: bool) -> int:
    """Runs every step that is not done yet, each after those it needs.

    In sequence that is the order of the plan: a round of pretraining, its evaluation, the next
    round. With lanes that overlap, an evaluation runs beside the next round.
    """
    done = {step.name for step in steps if records.is_done(step, launcher.paths)}
    waiting = [step for step in steps if step.name not in done]
    failed = stopping = False
    with stop_signals() as signals:
        while waiting or launcher.running:
            refused = []
            for step in [s for s in waiting if done.issuperset(s.needs)]:
                if launcher.has_room_for(step):
                    click.echo(f"\n== {step.name} ({len(done)} of {len(steps)} steps done)")
                    waiting.remove(step)
                    refused += launcher.start(step)
            for end in [*refused, *launcher.poll()]:
                done |= {end.step.name} if end.state == "done" else set()
                failed = failed or end.state == "failed"
                stopping = stopping or end.state == "stopped"
                if end.message:
                    click.echo(f"Error: {end.message}", err=True)
            stopping = stopping or bool(signals)
            if stopping or (failed and not keep_going):
                launcher.stop(at_once=len(signals) > 1)
                waiting = []
            waiting = [step for step in waiting if _may_run(step, waiting, done, launcher)]
            time.sleep(_POLL_SECONDS if launcher.running else 0)
    left = len(steps) - len(done)
    if left:
        what = "Stopped" if stopping else "Error: the plan could not be finished"
        click.echo(f"{what}; {left} of {len(steps)} steps left, the same command goes on", err=True)
    return 0 if not left else EXIT_STOPPED if stopping else 1


def _may_run(step: Step, waiting: list[Step], done: set[str], launcher: LocalLauncher) -> bool:
    """Whether everything the step needs is done, running, or still to come."""
    to_come = {s.name for s in waiting} | {r.step.name for r in launcher.running}
    return all(need in done or need in to_come for need in step.needs)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGUSR1: one asks the steps to save, a second ends them."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            click.echo("\nStopping: waiting for the running step to save (again: end it now)")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    earlier = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@click.group(
    cls=options.Commands,
    invoke_without_command=True,
    context_settings={
        "token_normalize_func": options.normalize,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@options.run_options
@click.option("--dry-run", is_flag=True, help="Show the plan and change nothing.")
@click.option("--estimate", is_flag=True, help="Time a few real steps; hours and disk of the run.")
@click.pass_context
def main(ctx: click.Context, dry_run: bool, estimate: bool, **given: Any) -> None:
    """Does hiding objects make masked-autoencoder pretraining better for dense prediction?

    Pretrains a ViT, finetunes and scores it on semantic segmentation every --eval-freq epochs, and
    compares the masking methods. The same command continues a run that was stopped.
    """
    if ctx.invoked_subcommand is not None:
        return
    if len(sys.argv) == 1:
        click.echo(ctx.get_help())
        return
    with user_errors():
        settings = options.settings_from(given)
        if dry_run:
            preview.show(settings)
        elif estimate:
            from pipeline.estimate import estimate_run

            click.echo(estimate_run(settings))
        else:
            ctx.exit(run(settings))


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can fix ends with its one line: exit code 2, or 1 where the system failed."""
    try:
        yield
    except (ValueError, LockedError) as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(
            f"{error.filename or 'a file'}: {error.strerror or error}; what is done is kept, and "
            "the same command goes on"
        ) from error


@main.command()
@click.argument("folder", type=options.AbsolutePath())
@click.option("--seed", type=int, default=0, show_default=True)
def sample(folder: Path, seed: int) -> None:
    """Write a small dataset in the real layouts into FOLDER."""
    from pipeline.sample import write_sample

    write_sample(folder, seed=seed)
    click.echo(f"{folder}/in1k and {folder}/segmentation/dataset.yml are there. To run on them:")
    click.echo(
        f"  python benchmark.py --config configs/sample.yml --in1k-dir {folder}/in1k "
        f"--eval-dataset {folder}/segmentation/dataset.yml --output-dir DIR"
    )


@main.command()
@click.argument("folder", type=options.AbsolutePath(), default=".")
def status(folder: Path) -> None:
    """Show what is done, running, waiting and failed in FOLDER."""
    from pipeline.status import status_text

    with user_errors():
        click.echo(status_text(Layout(folder)))


@main.command()
@click.argument("folders", type=options.AbsolutePath(), nargs=-1, required=True)
@click.option(
    "--out", type=options.AbsolutePath(), help="The page.  [default: in the first folder]"
)
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Write results.csv in each of FOLDERS, and one report.html over all of them."""
    from pipeline.report import write_report
    from pipeline.results import write_results_csv

    page = out or Layout(folders[0]).report_html
    with user_errors():
        write_report(folders, page)
    for folder in folders:
        write_results_csv(Layout(folder))
    click.echo(page)


@main.command()
@options.run_options
@click.pass_context
def doctor(ctx: click.Context, **given: Any) -> None:
    """Look at this machine and, given the flags of a run, at its data; say what to fix."""
    from pipeline.doctor import examine, findings_text

    findings = examine(given)
    click.echo(findings_text(findings))
    ctx.exit(1 if any(finding.fix for finding in findings) else 0)


if __name__ == "__main__":
    main()
