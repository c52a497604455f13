"""From settings to steps. Pure: nothing is read, written or started here.

A step is one child process: fetch the official checkpoint, pretrain up to the end of a round, or
finetune and score a checkpoint. Steps meet in files only; `needs` names the steps that make them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from pipeline import layout
from pipeline.layout import Layout, RunName
from pipeline.settings import METHODS_WITH_SEGMENTS, Settings

# Options that change speed or place but not what comes out (up to rounding).
NEUTRAL = frozenset({"output_dir", "device", "compile", "workers", "save_every_minutes", "resume"})
# Accumulation makes up for the batch; where a round ends changes nothing about its epochs.
NEUTRAL_PRETRAIN = NEUTRAL | {"batch_size", "stop_after"}
NEUTRAL_EVALUATE = NEUTRAL | {"device_batch_size", "eval_batch_size"}


# Method, coverage ratio (0: it has none) and seed: what tells runs apart.
Variant = tuple[str, float, int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One child process and what it has to leave behind."""

    name: str
    """Unique, usable as a file name: pretrain_four_channels_5, evaluate_four_channels_5."""
    kind: Literal["fetch", "pretrain", "evaluate"]
    run: RunName
    epochs: int
    """Epochs of pretraining completed when the step is done."""
    module: str
    """Python module and command, such as "mae pretrain"."""
    options: Mapping[str, object]
    """Its options: underscore spelling -> value."""
    processes: int
    needs: tuple[str, ...]
    folder: Path
    """Where it writes, console.log included."""
    outputs: tuple[Path, ...]
    """Files that have to be there, and not empty, afterwards."""
    gpus: tuple[int, ...] | None = None
    """GPUs to pin the step to; None = all that are visible."""
    rendezvous: tuple[str, ...] = ("--standalone",)
    """How torchrun's processes find each other; one machine picks a free port by itself."""

    @property
    def console_log(self) -> Path:
        """What the step printed."""
        return layout.console_log(self.folder)

    @property
    def devices(self) -> int:
        """What it occupies: GPUs, or 1 for the CPU."""
        return self.processes if self.devices_are_gpus else 1

    @property
    def devices_are_gpus(self) -> bool:
        """Whether it runs on GPUs."""
        return self.options.get("device") == "cuda"

    @property
    def command(self) -> list[str]:
        """The command line; torchrun's module form when there are several processes."""
        launch = ["-m"]
        if self.processes > 1 or self.rendezvous != ("--standalone",):
            launch = ["-m", "torch.distributed.run", *self.rendezvous]
            launch += [f"--nproc-per-node={self.processes}", "-m"]
        return [sys.executable, *launch, *self.module.split(), *as_arguments(self.options)]

    @property
    def check_command(self) -> list[str]:
        """The same with --check: judges the options, writes nothing."""
        arguments = as_arguments(self.options)
        return [sys.executable, "-m", *self.module.split(), *arguments, "--check"]

    def fingerprint(self, root: Path) -> dict[str, str]:
        """What the results depend on, as text; paths inside `root` are relative to it."""
        neutral = NEUTRAL_PRETRAIN if self.kind == "pretrain" else NEUTRAL_EVALUATE
        return {
            key: str(value).replace(f"{root}/", "")
            for key, value in sorted(self.options.items())
            if key not in neutral and value is not None
        }


def as_arguments(options: Mapping[str, object]) -> list[str]:
    """Options as command-line words: True and False become --x and --no-x, None is left out."""
    words = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", ",".join(str(part) for part in value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def make_plan(settings: Settings, made: Mapping[Variant, RunName] | None = None) -> list[Step]:
    """The steps in the order in which one machine would take them.

    made: runs that are in the output directory already, which keep their names.
    """
    made = made or {}
    experiment = settings.experiment
    only = experiment.eval_only
    steps: list[Step] = []
    if only == "mae" or (only is None and experiment.stack):
        steps += _fetch(settings)
    if only in ("scratch", "mae") or (only is None and 0 in experiment.eval_epochs):
        baseline = only or ("mae" if experiment.stack else "scratch")
        for seed in experiment.seeds:
            run = made.get((baseline, 0.0, seed)) or _run_name(settings, baseline, 0.0, seed)
            steps.append(_evaluate_baseline(settings, run, seed))
    if only in ("scratch", "mae"):
        return steps
    for method, coverage_ratio, seed in _variants(settings):
        variant = (method, coverage_ratio, seed)
        run = made.get(variant) or _run_name(settings, *variant)
        if only is not None:
            steps.append(_evaluate(settings, run, seed, int(only), needs=()))
            continue
        previous: tuple[str, ...] = tuple(s.name for s in steps if s.kind == "fetch")
        for epochs in _rounds(settings):
            pretrain = _pretrain(settings, run, method, coverage_ratio, seed, epochs, previous)
            previous = (pretrain.name,)
            steps.append(pretrain)
            if epochs in experiment.eval_epochs:
                steps.append(_evaluate(settings, run, seed, epochs, needs=previous))
    return steps


def _rounds(settings: Settings) -> list[int]:
    """Epochs completed at the end of each round; the last round ends the schedule."""
    points = {epochs for epochs in settings.experiment.eval_epochs if epochs > 0}
    return sorted(points | {settings.experiment.pretrain_epochs})


def _variants(settings: Settings) -> Iterator[Variant]:
    """What every pretraining run is about, `patches` once per seed."""
    experiment = settings.experiment
    for method, seed in product(experiment.mask_methods, experiment.seeds):
        uses_coverage = method in METHODS_WITH_SEGMENTS
        for ratio in experiment.coverage_ratios if uses_coverage else (0.0,):
            yield method, ratio, seed


def _run_name(settings: Settings, method: str, coverage_ratio: float, seed: int) -> RunName:
    """Names the parts that vary within this call."""
    experiment = settings.experiment
    ratio_varies = len(experiment.coverage_ratios) > 1 and method in METHODS_WITH_SEGMENTS
    return RunName(
        method=method,
        coverage_ratio=coverage_ratio if ratio_varies else None,
        seed=seed if len(experiment.seeds) > 1 else None,
    )


def _official_checkpoint(settings: Settings) -> Path:
    local = settings.experiment.mae_checkpoint
    return local or Layout(settings.output_dir).official_checkpoint(settings.experiment.model)


def _fetch(settings: Settings) -> list[Step]:
    """Nothing to fetch when a local file was named."""
    if settings.experiment.mae_checkpoint is not None:
        return []
    out, model = _official_checkpoint(settings), settings.experiment.model
    return [
        Step(
            name=f"fetch_{model}",
            kind="fetch",
            run=RunName(method="mae"),
            epochs=0,
            module="mae fetch",
            options={"model": model, "out": out},
            processes=1,
            needs=(),
            folder=Layout(settings.output_dir).bookkeeping / "fetch",
            outputs=(out,),
        )
    ]


def _pretrain(
    settings: Settings,
    run: RunName,
    method: str,
    coverage_ratio: float,
    seed: int,
    epochs: int,
    needs: tuple[str, ...],
) -> Step:
    """Pretraining from where the run is up to `epochs` completed."""
    paths = Layout(settings.output_dir)
    experiment, schedule, compute = settings.experiment, settings.schedule, settings.compute
    options: dict[str, object] = {
        "in1k_dir": settings.data.in1k_dir,
        "masks_dir": settings.data.masks_dir,
        "mask_method": method,
        "coverage_ratio": f"{coverage_ratio:g}" if method in METHODS_WITH_SEGMENTS else None,
        "model": experiment.model,
        "epochs": experiment.pretrain_epochs,
        "stop_after": epochs,
        "seed": seed,
        "batch_size": schedule.batch_size,
        "effective_batch_size": schedule.effective_batch_size,
        "base_lr": schedule.base_lr,
        "min_lr": schedule.min_lr,
        "warmup_fraction": schedule.warmup_fraction,
        "init": _official_checkpoint(settings) if experiment.stack else None,
        "device": "cuda" if compute.num_gpus else "cpu",
        **settings.pretrain,
        "output_dir": paths.pretrain_dir(run),
    }
    return Step(
        name=f"pretrain_{run}_{epochs}",
        kind="pretrain",
        run=run,
        epochs=epochs,
        module="mae pretrain",
        options=options,
        processes=compute.num_processes,
        needs=needs,
        folder=paths.pretrain_dir(run),
        outputs=(paths.checkpoint(run, epochs), paths.reconstructions(run, epochs)),
        gpus=_pretrain_gpus(settings),
    )


def nodes_of(step: Step, settings: Settings) -> int:
    """Machines of a step. Only pretraining is spread: a finetuning batch is small."""
    spread = settings.launcher == "slurm" and (step.processes > 1 or step.devices_are_gpus)
    return settings.cluster.nodes if spread and step.kind == "pretrain" else 1


def _pretrain_gpus(settings: Settings) -> tuple[int, ...] | None:
    """All but the GPUs kept for evaluation."""
    compute = settings.compute
    if not compute.eval_gpus:
        return None
    total = compute.num_gpus + len(compute.eval_gpus)
    return tuple(gpu for gpu in range(total) if gpu not in compute.eval_gpus)


def _evaluate(
    settings: Settings, run: RunName, seed: int, epochs: int, needs: tuple[str, ...]
) -> Step:
    """Finetunes and scores the checkpoint after `epochs`."""
    checkpoint = Layout(settings.output_dir).checkpoint(run, epochs)
    return _evaluation(settings, run, seed, epochs, str(checkpoint), needs)


def _evaluate_baseline(settings: Settings, run: RunName, seed: int) -> Step:
    """Finetunes and scores a random ViT (scratch) or the official checkpoint (mae)."""
    if run.method == "scratch":
        return _evaluation(settings, run, seed, 0, "random", needs=())
    needs = tuple(step.name for step in _fetch(settings))
    return _evaluation(settings, run, seed, 0, str(_official_checkpoint(settings)), needs)


def _evaluation(
    settings: Settings, run: RunName, seed: int, epochs: int, init: str, needs: tuple[str, ...]
) -> Step:
    experiment, compute = settings.experiment, settings.compute
    folder = Layout(settings.output_dir).eval_dir(run, epochs)
    from_scratch = init == "random"
    options: dict[str, object] = {
        "init": init,
        "model": experiment.model,
        # A random ViT has no checkpoint to read its patches from: give it the others' size.
        "patch_size": settings.pretrain.get("patch_size") if from_scratch else None,
        "dataset": settings.data.eval_dataset,
        "recipe": experiment.recipe,
        "seed": seed,
        "device": "cuda" if compute.num_gpus else "cpu",
        **settings.finetune,
        "output_dir": folder,
    }
    return Step(
        name=f"evaluate_{run}_{epochs}",
        kind="evaluate",
        run=run,
        epochs=epochs,
        module="segmenter train",
        options=options,
        processes=len(compute.eval_gpus) or compute.num_processes,
        needs=needs,
        folder=folder,
        outputs=(layout.result(folder), layout.epoch_log(folder), layout.predictions(folder)),
        gpus=compute.eval_gpus or None,
    )
