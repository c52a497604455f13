"""From settings to steps. Pure: nothing is read, written or started here.

A step is one child process: fetch the official checkpoint, make segments (pipeline/segments.py),
pretrain up to the end of a round, probe a checkpoint's frozen encoder, or finetune and score it.
Steps meet in files only; `needs` names the steps that make them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from common import step_files as layout
from common.yamlfile import check_names
from pipeline.plan.layout import BASELINES, DEFAULT_RATIO, OWN, Layout, Run, eval_name
from pipeline.plan.parts import Facts, as_arguments
from pipeline.plan.settings import Settings

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
    kind: Literal["fetch", "pack", "generate", "merge", "pretrain", "probe", "evaluate"]
    run: str
    """The run's name; its folder is called so."""
    epochs: int
    """Epochs of pretraining completed when the step is done."""
    program: tuple[str, ...]
    """Python module, command and arguments, such as ("mae", "pretrain")."""
    options: Mapping[str, Any]
    """Its options: underscore spelling -> value."""
    operands: tuple[str, ...] = ()
    """Those of them that are given without their names."""
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
    """GPUs of this machine, of which it gets one for each process; None = all that are visible."""
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
    def lane(self) -> str:
        """Without GPUs, steps of different lanes may run beside each other."""
        return "evaluate" if self.kind == "probe" else self.kind

    @property
    def command(self) -> list[str]:
        """The command line; torchrun's module form when there are several processes."""
        if self.processes == 1 and self.rendezvous == ("--standalone",):
            return self.alone
        launch = ["-m", "torch.distributed.run", *self.rendezvous]
        return [sys.executable, *launch, f"--nproc-per-node={self.processes}", *self.alone[1:]]

    @property
    def alone(self) -> list[str]:
        """The command line of one process by itself."""
        operands = [str(self.options[name]) for name in self.operands]
        named = {name: v for name, v in self.options.items() if name not in self.operands}
        return [sys.executable, "-m", *self.program, *operands, *as_arguments(named)]


def make_plan(
    settings: Settings, facts: Facts, made: Mapping[Run, str] | None = None
) -> list[Step]:
    """The steps in the order in which one machine takes them.

    Scores that take less than the GPUs of a pretraining come after all of it, side by side, unless
    GPUs are kept for them.

    facts: what the parts know. made: names of runs that are in the output directory already, where
    an earlier version gave them another name than theirs.
    """
    experiment, plan = settings.experiment, _Planner(settings, facts)
    for method in experiment.mask_method:
        if method not in facts.methods:
            known = ", ".join(facts.methods)
            raise ValueError(f"--mask-method is {method!r}; choose one of {known}")
    only, names, baselines = experiment.eval, made or {}, _baselines(settings, facts)
    steps = plan.fetch() if "mae" in baselines or (experiment.stack and only is None) else []
    fetched = tuple(step.name for step in steps)
    for baseline, seed in product(baselines, experiment.seed):
        run = Run(method=baseline, seed=seed)
        steps += plan.score(run, _name(run, names), 0, fetched if baseline == "mae" else ())
    if only in BASELINES:
        return steps
    for run in _runs(settings, facts):
        name, previous = _name(run, names), fetched if experiment.stack else ()
        if only is not None:
            steps += plan.score(run, name, int(only), needs=())
            continue
        scored = {*experiment.eval_points, *experiment.probe_points}
        for epochs in sorted({*scored, experiment.pretrain_epochs} - {0}):
            steps.append(plan.pretrain(run, name, epochs, previous))
            previous = (steps[-1].name,)
            steps += plan.score(run, name, epochs, needs=previous)
    if settings.cluster.launcher == "local" and settings.compute.scores_last:
        steps.sort(key=lambda step: {"probe": 1, "evaluate": 2}.get(step.kind, 0))
    return steps


def _baselines(settings: Settings, facts: Facts) -> tuple[str, ...]:
    """What is scored without a pretraining of ours."""
    experiment = settings.experiment
    if experiment.eval is not None:
        return (experiment.eval,) if experiment.eval in BASELINES else ()
    before = "mae" if experiment.stack else "scratch"  # what pretraining starts from
    chosen = experiment.baselines
    if chosen is None:
        chosen = BASELINES if experiment.stack or facts.has_official else ("scratch",)
    wanted = {*chosen, *([before] if 0 in experiment.eval_points else [])}
    return tuple(name for name in BASELINES if name in wanted)


def _name(run: Run, made: Mapping[Run, str]) -> str:
    """The name that it has, or gets; an earlier version may have given it to another run."""
    return made.get(run) or (run.full_name if run.name in made.values() else run.name)


def _runs(settings: Settings, facts: Facts) -> Iterator[Run]:
    """Every pretraining; what does not matter to a method does not multiply its runs."""
    experiment = settings.experiment
    for method, seed in product(experiment.mask_method, experiment.seed):
        ratios = experiment.coverage_ratio
        ratios = ratios if facts.uses("coverage_ratio", method) else (DEFAULT_RATIO,)
        sources = experiment.segments_from if facts.uses("segments_from", method) else (OWN,)
        for ratio, source in product(ratios, sources):
            yield Run(method=method, coverage_ratio=ratio, segments_from=source, seed=seed)


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
                "--stack, --eval or --baselines mae: there is no official checkpoint of "
                f"{experiment.model}, but of {known}; name a file of your own by --mae-checkpoint"
            )
        return [
            Step(
                name=f"fetch_{experiment.model}", kind="fetch", run="mae", epochs=0,
                program=("mae", "fetch"), options={"model": experiment.model, "out": out},
                processes=1, needs=(), folder=self.paths.bookkeeping / "fetch", outputs=(out,),
            )
        ]  # fmt: skip

    def pretrain(self, run: Run, name: str, epochs: int, needs: tuple[str, ...]) -> Step:
        """Pretraining from where the run is up to `epochs` completed."""
        settings, folder = self.settings, self.paths.pretrain_dir(name)
        given, is_free = settings.parts.pretrain, self.facts.uses("use_unmasked_images", run.method)
        if settings.data.make_segments and is_free:  # it need not wait for segments
            given = {"use_unmasked_images": True, **given}
        options = self._options(
            "pretrain",
            {
                **self.shared,
                "in1k_dir": settings.data.in1k_dir,
                "masks_dir": settings.data.masks_dir,
                "mask_method": run.method,
                **self._of_segments(run),
                "model": settings.experiment.model,
                "epochs": settings.experiment.pretrain_epochs,
                "stop_after": epochs,
                "init": self.official_checkpoint if settings.experiment.stack else None,
                "seed": run.seed,
                "output_dir": folder,
            },
            given,
        )
        outputs = (layout.checkpoint_path, layout.reconstructions_path)
        return Step(
            name=f"pretrain_{name}_{epochs}", kind="pretrain", run=name, epochs=epochs,
            program=("mae", "pretrain"), options=options, needs=needs, folder=folder,
            processes=settings.compute.processes,
            gpus=self._gpus(settings.compute.pretrain_gpus),
            outputs=tuple(path(folder, epochs) for path in outputs),
            **self._decided("pretrain", options),
        )  # fmt: skip

    def _of_segments(self, run: Run) -> dict[str, Any]:
        """The options that tell which segments are hidden, as far as the method has them."""
        given = {"coverage_ratio": run.coverage_ratio, "segments_from": run.segments_from}
        return {name: v for name, v in given.items() if self.facts.uses(name, run.method)}

    def score(self, run: Run, name: str, epochs: int, needs: tuple[str, ...]) -> list[Step]:
        """Probes and finetunes the checkpoint after `epochs`, where that is wanted.

        A baseline's is a random ViT (scratch) or the official checkpoint (mae).
        """
        experiment, steps = self.settings.experiment, []
        always = run.method in BASELINES or experiment.eval is not None
        if experiment.probe_freq != 0 and (always or epochs in experiment.probe_points):
            steps.append(self.probe(run, name, epochs, needs))
        if always or epochs in experiment.eval_points:
            steps += self.evaluate(run, name, epochs, needs)
        return steps

    def probe(self, run: Run, name: str, epochs: int, needs: tuple[str, ...]) -> Step:
        """Scores the frozen encoder, by the finetuning's protocol unless told otherwise."""
        folder, known = self.paths.probe_dir(name, epochs), self.facts.options["probe"]
        planned, given = self._scored(run, name, epochs)
        given = {n: v for n, v in given.items() if n in known} | dict(self.settings.parts.probe)
        planned |= {"seed": run.seed, "output_dir": folder}
        planned["image_folder"] = given.pop("image_folder", self.facts.image_classes)
        planned = {n: v for n, v in planned.items() if n in known or n == "init"}
        options = self._options("probe", planned, given)
        decided = self._decided("probe", options)
        decided["settings"]["init"] = self._within(options["init"])  # no fact is about operands
        return Step(
            name=f"probe_{eval_name(name, epochs)}", kind="probe", run=name, epochs=epochs,
            program=("segmenter", "probe"), options=options, operands=("init",), needs=needs,
            folder=folder, outputs=(folder / layout.RESULT,), **self._scoring_devices, **decided,
        )  # fmt: skip

    def evaluate(self, run: Run, name: str, epochs: int, needs: tuple[str, ...]) -> list[Step]:
        """Finetunes and scores the checkpoint, once for each finetuning seed."""
        planned, given = self._scored(run, name, epochs)
        steps = []
        for eval_seed in range(self.settings.experiment.eval_seeds):
            folder = self.paths.eval_dir(name, epochs, eval_seed)
            own = {"seed": run.seed + eval_seed, "output_dir": folder}
            options = self._options("finetune", {**planned, **own}, given)
            left = (layout.RESULT, layout.LOG, layout.PREDICTIONS)
            steps.append(Step(
                name=f"evaluate_{eval_name(name, epochs, eval_seed)}", kind="evaluate", run=name,
                epochs=epochs, program=("segmenter", "train"), options=options, needs=needs,
                folder=folder, outputs=tuple(folder / file for file in left),
                **self._scoring_devices, **self._decided("evaluate", options),
            ))  # fmt: skip
        return steps

    @property
    def _scoring_devices(self) -> dict[str, Any]:
        compute = self.settings.compute
        processes = compute.gpus_per_eval if compute.num_gpus else compute.processes
        return {"processes": processes, "gpus": self._gpus(compute.scoring_gpus)}

    def _gpus(self, those: tuple[int, ...]) -> tuple[int, ...] | None:
        """None on the CPU, and in a Slurm job, which sees its own only."""
        return those if those and self.settings.cluster.launcher == "local" else None

    def _scored(self, run: Run, name: str, epochs: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of whatever scores a checkpoint: those of the plan, and those that were given."""
        init: Path | str = self.paths.checkpoint(name, epochs)
        if run.method in BASELINES:
            init = "random" if run.method == "scratch" else self.official_checkpoint
        settings = self.settings
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
        return planned, given

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
        idle = self.facts.idle(options.get("mask_method"))
        resolved, older = self.facts.resolve(kind, options)
        decided = {n: self._within(value) for n, value in resolved.items() if n not in idle}
        return {"settings": decided, "older": older}

    def _within(self, value: Any) -> Any:
        """A path inside the output directory relative to it, so that it may be moved."""
        text = str(value) if isinstance(value, Path) else value
        return text.removeprefix(f"{self.paths.root}/") if isinstance(text, str) else text


def nodes_of(step: Step, settings: Settings) -> int:
    """Machines of a step. Only pretraining is spread: a finetuning batch is small."""
    cluster = settings.cluster
    spread = cluster.launcher == "slurm" and (step.processes > 1 or step.devices_are_gpus)
    return cluster.nodes if spread and step.kind == "pretrain" else 1
