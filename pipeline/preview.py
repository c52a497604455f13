"""Before any work: check the plan, show it, and write down the settings."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from pipeline import layout
from pipeline.layout import Layout
from pipeline.local import read_progress
from pipeline.options import visible_gpus
from pipeline.plan import Step, make_plan, nodes_of
from pipeline.process import REPO_ROOT
from pipeline.records import differences, is_done, made_runs, write_json, write_text
from pipeline.settings import Settings

_VERSIONS_OF = ("torch", "torchvision", "timm", "accelerate", "onedl-mmsegmentation", "numpy")


def check(settings: Settings, steps: list[Step], paths: Layout) -> None:
    """Raises ValueError for whatever would stop the run later; writes nothing.

    Our own checks first, then each part's `--check`, so that its own parser judges its options.
    """
    _check_same_settings(steps, paths)
    waiting = [step for step in steps if not is_done(step, paths)]
    if waiting:
        _check_machine(settings)
    made = {output for step in steps for output in step.outputs}
    for step in waiting:
        _check_possible(step, paths)
        init = step.options.get("init")
        if init not in (None, "random") and init not in made and str(init) not in map(str, made):
            _check_init(step, Path(str(init)))
    _check_parts(waiting, settings)


def _check_same_settings(steps: list[Step], paths: Layout) -> None:
    """Everything in an output directory is made alike."""
    changed, remedy = differences(steps, paths), "Use these or another --output-dir"
    if not changed:
        return
    if not differences([step for step in steps if step.kind != "evaluate"], paths):
        remedy += f", or remove {paths.eval_output} to finetune every checkpoint anew"
    raise ValueError(
        f"{paths.root} holds a run with other settings: {'; '.join(changed[:5])}"
        f"{' ...' if len(changed) > 5 else ''}. {remedy}"
    )


def _check_machine(settings: Settings) -> None:
    """What the launcher needs."""
    if settings.launcher == "slurm":
        from pipeline.slurm import minutes_of

        minutes_of(settings.cluster)
        return
    wanted, there = settings.compute.num_gpus + len(settings.compute.eval_gpus), visible_gpus()
    if wanted > len(there):
        raise ValueError(
            f"--num-gpus {wanted}: there are {len(there)} here, by CUDA_VISIBLE_DEVICES or else "
            "nvidia-smi; set the former if that is wrong"
        )


def _check_possible(step: Step, paths: Layout) -> None:
    """A checkpoint that was passed and is gone cannot be made again in the same directory."""
    if step.kind != "pretrain" or step.outputs[0].exists():
        return
    kept = [layout.checkpoint_epochs(path) for path in step.folder.glob("checkpoint-*.pth")]
    reached = math.ceil(float(read_progress(step.folder).get("epoch", 0)))  # in a longer round
    later = sorted(n for n in (*kept, reached) if n is not None and n > step.epochs)
    if later:
        raise ValueError(
            f"{step.outputs[0]} is not there and pretraining is past it (epoch {later[0]}): "
            f"evaluate after epoch {later[0]} or later, or use another --output-dir"
        )


def _check_init(step: Step, init: Path) -> None:
    if not init.is_file():
        there = sorted(
            epochs
            for path in init.parent.glob("checkpoint-*.pth")
            if (epochs := layout.checkpoint_epochs(path)) is not None
        )
        hint = f"; there are those after epochs {', '.join(map(str, there))}" if there else ""
        raise ValueError(f"{step.name} needs the checkpoint {init}, which does not exist{hint}")


def _check_parts(waiting: list[Step], settings: Settings) -> None:
    """Runs --check once for each kind of command, all beside each other.

    WORLD_SIZE tells it, as torchrun will, how many processes share a batch.
    """
    commands = {}
    for step in waiting:
        if step.kind == "fetch":
            continue
        # Steps of one run differ in the epoch only: its first one stands for them.
        key = (step.kind, str(step.run))
        if key not in commands:
            world_size = step.processes * nodes_of(step, settings)
            commands[key] = (_with_existing_init(step), {"WORLD_SIZE": str(world_size)})
    started = [
        subprocess.Popen(
            command, cwd=REPO_ROOT, env={**os.environ, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for command, environment in commands.values()
    ]  # fmt: skip
    complaints = []
    for process in started:
        output, errors = process.communicate()
        if process.returncode != 0:
            lines = (errors or output).strip().splitlines()
            said = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
            complaints.append(said[0] if said else "\n".join(lines[-3:]) or "it gave no reason")
    if complaints:
        raise ValueError("\n".join(dict.fromkeys(complaints)))


def _with_existing_init(step: Step) -> list[str]:
    """The step's check; a checkpoint that an earlier step will make cannot be looked at yet."""
    init = step.options.get("init")
    if init in (None, "random") or Path(str(init)).exists():
        return step.check_command
    # To pretrain from nothing, --init is left out; to finetune, it is "random".
    instead = "random" if step.kind == "evaluate" else None
    return replace(step, options={**step.options, "init": instead}).check_command


def write_run_files(settings: Settings, steps: list[Step], paths: Layout) -> None:
    """run.yml for people, plan.json for `status`."""
    import yaml

    content = {
        "settings": as_plain(asdict(settings)),
        "command": shlex.join(sys.argv),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_text(paths.run_yml, yaml.safe_dump(content, sort_keys=False))
    write_json(
        paths.plan,
        [
            {
                "name": step.name,
                "kind": step.kind,
                "needs": list(step.needs),
                "folder": os.path.relpath(step.folder, paths.root),
            }
            for step in steps
        ],
    )


def as_plain(value: Any) -> Any:
    """Nested settings as YAML and JSON know them: paths as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def versions() -> dict[str, str]:
    """Python's, this repository's and the main packages' versions."""
    found = {"python": platform.python_version()}
    commit = subprocess.run(
        ["git", "-C", str(REPO_ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
    )
    if commit.returncode == 0:
        found["segmae"] = commit.stdout.strip()
    for package in _VERSIONS_OF:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """This machine: name, processor, memory, GPUs."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "host": platform.node(),
        "processor": _processor(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_gib, 1),
        "gpus": gpu_names(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """The GPUs' names as nvidia-smi gives them; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in listing.splitlines() if line.strip()]


def show(settings: Settings) -> None:
    """--dry-run: the checked plan with its commands, and what pretraining's schedule will be."""
    paths = Layout(settings.output_dir)
    steps = make_plan(settings, made_runs(paths))
    check(settings, steps, paths)
    done = {step.name for step in steps if is_done(step, paths)}
    click.echo(f"{len(steps)} steps, {len(done)} done, in {paths.root}")
    for step in steps:
        state = "done" if step.name in done else "to do"
        after = f"  (after {', '.join(step.needs)})" if step.needs else ""
        click.echo(f"\n{step.name}: {state}{after}")
        click.echo(f"  {shlex.join(step.command)}")
        click.echo(f"  leaves {', '.join(os.path.relpath(p, paths.root) for p in step.outputs)}")
        click.echo(f"  log    {os.path.relpath(step.console_log, paths.root)}")
    first = next((step for step in steps if step.kind == "pretrain"), None)
    if first is not None:
        devices = first.processes * nodes_of(first, settings)
        click.echo("\n" + schedule_text(settings, devices))


def schedule_text(settings: Settings, devices: int) -> str:
    """Batch, accumulation and the learning rate at the points that matter."""
    schedule, epochs = settings.schedule, settings.experiment.pretrain_epochs
    warm = schedule.warmup_fraction * epochs
    points = {0.0, warm, *map(float, settings.experiment.eval_epochs), epochs / 2, float(epochs)}
    at_once, passes = schedule.split(devices)
    lines = [
        f"pretraining: effective batch {schedule.effective_batch_size} = {at_once} "
        f"per device x {devices} devices x {passes} accumulated",
        f"learning rate: {schedule.base_lr:g} x {schedule.effective_batch_size} / 256 = "
        f"{schedule.peak_lr:g} at its peak",
    ]
    for point in sorted(points):
        name = {0.0: "start", warm: "end of warm-up", float(epochs): "end"}.get(point, "")
        lines.append(f"  epoch {point:g}: {schedule.lr_at(point / epochs):.3g}  {name}".rstrip())
    return "\n".join(lines)


def read_plan(paths: Layout) -> list[dict[str, Any]]:
    """The steps of the latest call; raises ValueError where no run has been."""
    try:
        return json.loads(paths.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{paths.root} is not the output directory of a run") from None
    except ValueError as error:
        raise ValueError(f"{paths.plan} is damaged ({error}); call benchmark.py again") from None
