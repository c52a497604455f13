"""From settings to steps. Pure: nothing is read, written or started here.

A step is one child process: fetch the official checkpoint, pack segments, pretrain up to the end of
a round, or finetune and score a checkpoint. Steps meet in files only; `needs` names the steps that
make them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from common import layout
from common.yamlfile import check_names
from pipeline.layout import BASELINES, DEFAULT_RATIO, Layout, Run, eval_name
from pipeline.parts import Facts, as_arguments, part_command
from pipeline.settings import Settings

PACK = "pack_segments"
# Options of the parts that have a flag of another name here.
_OTHER_FLAGS = {
    "epochs": "--pretrain-epochs", "stop_after": "--eval-epochs", "device": "--num-gpus",
    "dataset": "--ade20k-dir or --eval-dataset", "init": "--stack or --eval",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """One child process and what it has to leave behind."""

    name: str
    """Unique, usable as a file name: pretrain_four_channels_5, evaluate_four_channels_5."""
    kind: Literal["fetch", "pack", "pretrain", "evaluate"]
    run: str
    """The run's name; its folder is called so."""
    epochs: int
    """Epochs of pretraining completed when the step is done."""
    program: tuple[str, ...]
    """Python module, command and arguments, such as ("mae", "pretrain")."""
    options: Mapping[str, Any]
    """Its options: underscore spelling -> value."""
    processes: int
    needs: tuple[str, ...]
    folder: Path
    """Where it writes, console.log included."""
    outputs: tuple[Path, ...]
    """Files that have to be there, and not empty, afterwards."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that decides what it makes; paths inside the output directory are relative to it."""
    older: Mapping[str, Any] = field(default_factory=dict)
    """What these settings count as where an earlier version's record does not have them."""
    gpus: tuple[int, ...] | None = None
    """GPUs to pin the step to; None = all that are visible."""
    rendezvous: tuple[str, ...] = ("--standalone",)
    """How torchrun's processes find each other; one machine picks a free port by itself."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    """What its --check said: images, batch, learning_rate, checkpoint_bytes (preview.check)."""

    @property
    def console_log(self) -> Path:
        """What the step printed."""
        return self.folder / layout.CONSOLE_LOG

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
        if self.processes == 1 and self.rendezvous == ("--standalone",):
            return part_command(self.program, self.options)
        launch = ["-m", "torch.distributed.run", *self.rendezvous]
        launch += [f"--nproc-per-node={self.processes}", "-m"]
        return [sys.executable, *launch, *self.program, *as_arguments(self.options)]


def make_plan(
    settings: Settings, facts: Facts, made: Mapping[Run, str] | None = None
) -> list[Step]:
    """The steps in the order in which one machine would take them.

    facts: what the parts know. made: names of runs that are in the output directory already, where
    an earlier version gave them another name than theirs.
    """
    experiment, plan = settings.experiment, _Planner(settings, facts)
    for method in experiment.mask_method:
        if method not in facts.methods:
            known = ", ".join(facts.methods)
            raise ValueError(f"--mask-method is {method!r}; choose one of {known}")
    steps: list[Step] = []
    only, names = experiment.eval, made or {}
    if only == "mae" or (only is None and experiment.stack):
        steps += plan.fetch()
    if only in BASELINES or (only is None and 0 in experiment.eval_points):
        baseline = only or ("mae" if experiment.stack else "scratch")
        for seed in experiment.seed:
            run = Run(method=baseline, seed=seed)
            needs = tuple(step.name for step in steps if step.kind == "fetch")
            steps += plan.evaluate(run, _name(run, names), 0, needs)
    if only in BASELINES:
        return steps
    steps += plan.pack() if only is None else []
    prepared = tuple(step.name for step in steps if step.kind in ("fetch", "pack"))
    for run in _runs(settings, facts):
        name, previous = _name(run, names), prepared
        if only is not None:
            steps += plan.evaluate(run, name, int(only), needs=())
            continue
        for epochs in sorted({*experiment.eval_points, experiment.pretrain_epochs} - {0}):
            steps.append(plan.pretrain(run, name, epochs, previous))
            previous = (steps[-1].name,)
            if epochs in experiment.eval_points:
                steps += plan.evaluate(run, name, epochs, needs=previous)
    return steps


def _name(run: Run, made: Mapping[Run, str]) -> str:
    """The name that it has, or gets; an earlier version may have given it to another run."""
    return made.get(run) or (run.full_name if run.name in made.values() else run.name)


def _runs(settings: Settings, facts: Facts) -> Iterator[Run]:
    """Every pretraining; one per seed for a method that has no coverage ratio."""
    experiment = settings.experiment
    for method, seed in product(experiment.mask_method, experiment.seed):
        ratios = experiment.coverage_ratio if facts.uses_ratio(method) else (DEFAULT_RATIO,)
        for ratio in ratios:
            yield Run(method=method, coverage_ratio=ratio, seed=seed)


class _Planner:
    """Makes single steps from one call's settings."""

    def __init__(self, settings: Settings, facts: Facts) -> None:
        self.settings = settings
        self.facts = facts
        self.paths = Layout(settings.data.output_dir)
        parts = settings.parts
        self.shared = {
            "device": "cuda" if settings.compute.num_gpus else "cpu",
            "log_with": parts.log_with,
            "plugin": parts.plugin,
        }

    @property
    def official_checkpoint(self) -> Path:
        experiment = self.settings.experiment
        return experiment.mae_checkpoint or self.paths.official_checkpoint(experiment.model)

    def fetch(self) -> list[Step]:
        """Nothing to fetch when a local file was named."""
        experiment, out = self.settings.experiment, self.official_checkpoint
        if experiment.mae_checkpoint is not None:
            return []
        if experiment.model not in self.facts.official_checkpoints:
            known = ", ".join(self.facts.official_checkpoints)
            raise ValueError(
                f"--stack, --eval mae: there is no official checkpoint of {experiment.model}, but "
                f"of {known}; name a file of your own by --mae-checkpoint"
            )
        return [
            Step(
                name=f"fetch_{experiment.model}", kind="fetch", run="mae", epochs=0,
                program=("mae", "fetch"), options={"model": experiment.model, "out": out},
                processes=1, needs=(), folder=self.paths.bookkeeping / "fetch", outputs=(out,),
            )
        ]  # fmt: skip

    def pack(self) -> list[Step]:
        """Nothing to pack when there are no segments, packed ones, or none are looked at."""
        if self.facts.packing is None or self.settings.parts.pretrain.get("use_unmasked_images"):
            return []
        source, store = self.facts.packing
        return [
            Step(
                name=PACK, kind="pack", run="segments", epochs=0,
                program=("mae", "masks", "pack", str(source)), options={"out": store},
                processes=1, needs=(), folder=self.paths.bookkeeping / "pack", outputs=(store,),
            )
        ]  # fmt: skip

    def pretrain(self, run: Run, name: str, epochs: int, needs: tuple[str, ...]) -> Step:
        """Pretraining from where the run is up to `epochs` completed."""
        settings, folder = self.settings, self.paths.pretrain_dir(name)
        options = self._options(
            "pretrain",
            {
                **self.shared,
                "in1k_dir": settings.data.in1k_dir,
                "masks_dir": settings.data.masks_dir,
                "mask_method": run.method,
                "coverage_ratio": run.coverage_ratio if self.facts.uses_ratio(run.method) else None,
                "model": settings.experiment.model,
                "epochs": settings.experiment.pretrain_epochs,
                "stop_after": epochs,
                "init": self.official_checkpoint if settings.experiment.stack else None,
                "seed": run.seed,
                "output_dir": folder,
            },
            settings.parts.pretrain,
        )
        placed = dict(options)
        if self.facts.packing and self.facts.packing[1] == self.paths.segments:
            placed["masks_dir"] = self.paths.segments  # the same segments in another place
        outputs = (layout.checkpoint_path, layout.reconstructions_path)
        return Step(
            name=f"pretrain_{name}_{epochs}", kind="pretrain", run=name, epochs=epochs,
            program=("mae", "pretrain"), options=placed, needs=needs, folder=folder,
            processes=settings.compute.processes,
            gpus=settings.compute.pretrain_gpus if settings.compute.eval_gpus else None,
            outputs=tuple(path(folder, epochs) for path in outputs),
            **self._decided("pretrain", options),
        )  # fmt: skip

    def evaluate(self, run: Run, name: str, epochs: int, needs: tuple[str, ...]) -> list[Step]:
        """Finetunes and scores the checkpoint after `epochs`, once for each finetuning seed.

        A baseline's is a random ViT (scratch) or the official checkpoint (mae).
        """
        init: Path | str = self.paths.checkpoint(name, epochs)
        if run.method in BASELINES:
            init = "random" if run.method == "scratch" else self.official_checkpoint
        settings, compute = self.settings, self.settings.compute
        given = dict(settings.parts.finetune)
        if init == "random":  # no checkpoint tells the patches: give it the others' size
            given.setdefault("patch_size", settings.parts.pretrain.get("patch_size"))
        given.setdefault("recipe", settings.experiment.recipe)
        if str(given["recipe"]).endswith((".yml", ".yaml")):  # the parts run elsewhere
            given["recipe"] = Path(given["recipe"]).expanduser().absolute()
        planned = {
            **self.shared,
            "init": init,
            "model": settings.experiment.model,
            "dataset": settings.data.dataset,
        }
        steps = []
        for eval_seed in range(settings.experiment.eval_seeds):
            folder = self.paths.eval_dir(name, epochs, eval_seed)
            own = {"seed": run.seed + eval_seed, "output_dir": folder}
            options = self._options("finetune", {**planned, **own}, given)
            left = (layout.RESULT, layout.LOG, layout.PREDICTIONS)
            steps.append(Step(
                name=f"evaluate_{eval_name(name, epochs, eval_seed)}", kind="evaluate", run=name,
                epochs=epochs, program=("segmenter", "train"), options=options, needs=needs,
                folder=folder, processes=len(compute.eval_gpus) or compute.processes,
                gpus=compute.eval_gpus or None, outputs=tuple(folder / file for file in left),
                **self._decided("evaluate", options),
            ))  # fmt: skip
        return steps

    def _options(
        self, section: str, planned: Mapping[str, Any], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the plan sets and what was given on top.

        Raises ValueError if they contradict, or there is no such option.
        """
        kind = {"finetune": "evaluate"}.get(section, section)
        facts = self.facts.options[kind]
        check_names(given, facts, f"--{section}")
        for name, value in given.items():
            if isinstance(value, list | dict) and not facts[name].get("several", True):
                raise ValueError(f"--{section} {name.replace('_', '-')} is {value}; give one value")
        for name in given.keys() & planned.keys():
            flag = _OTHER_FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(f"--{section} {name}=... would contradict the plan; use {flag}")
        return {**planned, **given}

    def _decided(self, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The step's `settings` and `older`."""
        within, idle = f"{self.paths.root}/", self.facts.idle(options.get("mask_method"))
        resolved, older = self.facts.resolve(kind, options)
        decided = {
            name: value.removeprefix(within) if isinstance(value, str) else value
            for name, value in resolved.items()
            if name not in idle
        }
        return {"settings": decided, "older": older}


def nodes_of(step: Step, settings: Settings) -> int:
    """Machines of a step. Only pretraining is spread: a finetuning batch is small."""
    cluster = settings.cluster
    spread = cluster.launcher == "slurm" and (step.processes > 1 or step.devices_are_gpus)
    return cluster.nodes if spread and step.kind == "pretrain" else 1
