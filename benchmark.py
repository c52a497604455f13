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
from pipeline.local import EXIT_STOPPED, Finished, LocalLauncher
from pipeline.lock import LockedError, hold
from pipeline.plan import Step, make_plan
from pipeline.settings import Settings

_POLL_SECONDS = 0.1


def run(settings: Settings) -> int:
    """Plans, checks, alternates, reports. Returns the exit code; 0 means that all of it is done."""
    paths = Layout(settings.output_dir)
    steps = make_plan(settings)
    preview.check(settings, steps, paths)
    if settings.launcher == "slurm":
        from pipeline import slurm

        return slurm.run(settings, steps, paths)
    with hold(paths.lock):
        preview.write_run_files(settings, steps, paths)
        launcher = LocalLauncher(paths, overlaps=settings.compute.overlaps)
        exit_code = alternate(steps, launcher, keep_going=settings.keep_going)
        finish(paths)
    return exit_code


def alternate(steps: list[Step], launcher: LocalLauncher, *, keep_going: bool) -> int:
    """Runs every step that is not done yet, each after those it needs.

    In sequence that is the order of the plan: a round of pretraining, its evaluation, the next
    round. With lanes that overlap, an evaluation runs beside the next round.
    """
    done = {step.name for step in steps if records.is_done(step, launcher.paths)}
    waiting = [step for step in steps if step.name not in done]
    failed: list[Finished] = []
    stopping = False
    with stop_signals() as signals:
        while waiting or launcher.running:
            for step in [s for s in waiting if done.issuperset(s.needs)]:
                if launcher.has_room_for(step) and not stopping:
                    click.echo(f"\n== {step.name} ({len(done)} of {len(steps)} steps done)")
                    launcher.start(step)
                    waiting.remove(step)
            for finished in launcher.poll():
                if finished.state == "done":
                    done.add(finished.step.name)
                elif finished.state == "stopped":
                    stopping = True
                else:
                    failed.append(finished)
                    click.echo(f"Error: {finished.message}", err=True)
            stopping = stopping or bool(signals)
            if stopping or (failed and not keep_going):
                launcher.stop(at_once=len(signals) > 1)
                waiting = []
            reachable = {step.name for step in waiting if _may_run(step, waiting, done, launcher)}
            waiting = [step for step in waiting if step.name in reachable]
            time.sleep(_POLL_SECONDS if launcher.running else 0)
    if stopping:
        click.echo("Stopped; the same command continues.", err=True)
        return EXIT_STOPPED
    left = len(steps) - len(done)
    if failed:
        click.echo(f"Error: {len(failed)} failed, {left} of {len(steps)} steps left", err=True)
    return 1 if left else 0


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


def finish(paths: Layout) -> None:
    """Writes results.csv and report.html from what there is, and shows the table."""
    from pipeline import report, results

    evaluations = results.write_results_csv(paths)
    report.write_report([paths.root], paths.report_html)
    if evaluations:
        click.echo("\n" + results.table(evaluations))
        click.echo(f"\n{paths.results_csv}\n{paths.report_html}")


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
    settings = options.settings_from(given)
    try:
        if dry_run:
            preview.show(settings)
        elif estimate:
            from pipeline.estimate import estimate_run

            click.echo(estimate_run(settings))
        else:
            ctx.exit(run(settings))
    except (ValueError, LockedError) as error:
        raise click.UsageError(str(error)) from None


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


if __name__ == "__main__":
    main()
