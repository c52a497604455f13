"""From settings to steps. Nothing is written or started here.

A step is one child process: fetch the official checkpoint, make segments (`segments.py` here),
pretrain up to the end of a round, probe a checkpoint's frozen encoder, or finetune and score it.
Steps meet in files only; `needs` names the steps that make them. Read `make_plan` first.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from common import step_files as files
from common.formats import check_names
from common.options import Layer, OptionGroup, decisive_values, fields_of, make_all
from engine.config import DeviceConfig
from mae.check import PretrainFacts
from mae.config import GROUPS as PRETRAIN_GROUPS
from mae.config import OFFICIAL_FILES, PretrainConfig, idle_settings
from mae.masking import METHODS
from pipeline.plan.layout import BASELINES, DEFAULT_RATIO, OWN, Layout, RunId, eval_name
from pipeline.plan.settings import Settings
from segmenter.check import ScoringFacts
from segmenter.config import GROUPS as FINETUNE_GROUPS
from segmenter.config import PROBE_GROUPS, RANDOM, ProbeConfig, TrainConfig

_PROGRAMS: dict[str, tuple[str, str]] = {
    "pretrain": ("mae", "pretrain"), "probe": ("segmenter", "probe"),
    "evaluate": ("segmenter", "train"),
}  # fmt: skip
# Options of the parts that the plan sets, by a flag of another name.
_FLAGS = {
    "epochs": "--pretrain-epochs", "stop_after": "--eval-epochs", "device": "--num-gpus",
    "dataset": "--ade20k-dir or --eval-dataset", "init": "--stack or --eval",
}  # fmt: skip

Facts = PretrainFacts | ScoringFacts
Kind = Literal["fetch", "pack", "generate", "merge", "pretrain", "probe", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a step that trains and scores nothing is told."""

    words: tuple[str, ...]
    what: str  # it does, in a few words
    run: DeviceConfig = field(default_factory=DeviceConfig)

    def arguments(self) -> list[str]:
        """The words of its command line."""
        return list(self.words)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One child process and what it has to leave behind."""

    name: str  # unique, usable as a file name: pretrain_four_channels_5
    kind: Kind
    run: str  # the run's name; its folder is called so
    epochs: int = 0  # of pretraining, completed when the step is done
    program: tuple[str, ...]  # Python module and command, such as ("mae", "pretrain")
    config: PretrainConfig | TrainConfig | ProbeConfig | Arguments
    processes: int = 1
    needs: tuple[str, ...] = ()  # names of steps
    folder: Path  # where it writes, console.log included
    outputs: tuple[Path, ...]  # files that have to be there, and not empty, afterwards
    # All that decides what it makes, plain; paths in the output directory are relative to it.
    settings: Mapping[str, Any] = field(default_factory=dict)
    # GPUs of this machine, of which it gets one for each process; None = all that are visible.
    gpus: tuple[int, ...] | None = None
    # How torchrun's processes find each other; one machine picks a free port by itself.
    rendezvous: tuple[str, ...] = ("--standalone",)
    facts: Facts | None = None  # what its check found, where it was checked and is a part's

    @property
    def console_log(self) -> Path:
        """What the step printed."""
        return self.folder / files.CONSOLE_LOG

    @property
    def devices(self) -> int:
        """What it occupies: GPUs, or 1 for the CPU."""
        return self.processes if self.devices_are_gpus else 1

    @property
    def devices_are_gpus(self) -> bool:
        """Whether it runs on GPUs."""
        return self.config.run.device == "cuda"

    @property
    def lane(self) -> str:
        """Without GPUs, steps of different lanes may run beside each other."""
        return "evaluate" if self.kind == "probe" else self.kind  # both need a checkpoint

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
        return [sys.executable, "-m", *self.program, *self.config.arguments()]


def make_plan(settings: Settings) -> list[Step]:
    """The steps in the order in which one machine takes them.

    Scores that take less than the GPUs of a pretraining come after all of it, side by side, unless
    GPUs are kept for them. Raises ValueError for an option of a part that cannot be.
    """
    experiment, plan = settings.experiment, _Planner(settings)
    only, baselines = experiment.eval, _baselines(settings)
    steps = plan.fetch() if "mae" in baselines or (experiment.stack and only is None) else []
    fetched = tuple(step.name for step in steps)
    for baseline, seed in product(baselines, experiment.seed):
        needs = fetched if baseline == "mae" else ()
        steps += plan.score(RunId(method=baseline, seed=seed), 0, needs)
    if only in BASELINES:
        return steps  # there is nothing to pretrain
    for run in _runs(settings):
        if only is not None:
            steps += plan.score(run, int(only), needs=())
            continue
        previous = fetched if experiment.stack else ()  # what a round starts from
        scored = {*experiment.eval_points, *experiment.probe_points}
        for epochs in sorted({*scored, experiment.pretrain_epochs} - {0}):
            steps.append(plan.pretrain(run, epochs, previous))
            previous = (steps[-1].name,)
            steps += plan.score(run, epochs, needs=previous)
    if settings.cluster.launcher == "local" and settings.compute.scores_last:
        steps.sort(key=lambda step: {"probe": 1, "evaluate": 2}.get(step.kind, 0))
    return steps


def _baselines(settings: Settings) -> tuple[str, ...]:
    """What is scored without a pretraining of ours."""
    experiment = settings.experiment
    if experiment.eval is not None:
        return (experiment.eval,) if experiment.eval in BASELINES else ()
    before = "mae" if experiment.stack else "scratch"  # what pretraining starts from
    chosen = experiment.baselines
    if chosen is None:  # a download of gigabytes is not begun without being asked for
        at_hand = experiment.stack or official_checkpoint(settings).is_file()
        chosen = BASELINES if at_hand else ("scratch",)
    wanted = {*chosen, *([before] if 0 in experiment.eval_points else [])}
    return tuple(name for name in BASELINES if name in wanted)


def official_checkpoint(settings: Settings) -> Path:
    """Where the official MAE checkpoint is, or will be."""
    experiment = settings.experiment
    paths = Layout(settings.data.output_dir)
    return experiment.mae_checkpoint or paths.official_checkpoint(experiment.model)


def _runs(settings: Settings) -> Iterator[RunId]:
    """Every pretraining; what does not matter to a method does not multiply its runs."""
    experiment = settings.experiment
    for name, seed in product(experiment.mask_method, experiment.seed):
        known = METHODS[name].settings
        ratios = experiment.coverage_ratio if "coverage_ratio" in known else (DEFAULT_RATIO,)
        sources = experiment.segments_from if "segments_from" in known else (OWN,)
        for ratio, source in product(ratios, sources):
            yield RunId(method=name, coverage_ratio=ratio, segments_from=source, seed=seed)


class _Planner:
    """Makes single steps from one call's settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.paths = Layout(settings.data.output_dir)
        self.official = official_checkpoint(settings)
        # What every part is told.
        self.shared = {
            "model": settings.experiment.model,
            "device": "cuda" if settings.compute.num_gpus else "cpu",
            "log_with": settings.parts.log_with,
            "plugin": settings.parts.plugin,
        }

    def fetch(self) -> list[Step]:
        """Nothing to fetch when a local file was named."""
        experiment, out = self.settings.experiment, self.official
        if experiment.mae_checkpoint is not None:
            return []
        if experiment.model not in OFFICIAL_FILES:
            raise ValueError(
                "--stack, --eval or --baselines mae: there is no official checkpoint of "
                f"{experiment.model}, but of {', '.join(OFFICIAL_FILES)}; name a file of your own "
                "by --mae-checkpoint"
            )
        config = Arguments(
            words=("--model", experiment.model, "--out", str(out)),
            what=f"download the official {experiment.model}",
        )
        return [
            Step(
                name=f"fetch_{experiment.model}", kind="fetch", run="mae", config=config,
                program=("mae", "fetch"), folder=self.paths.bookkeeping / "fetch", outputs=(out,),
            )
        ]  # fmt: skip

    def pretrain(self, run: RunId, epochs: int, needs: tuple[str, ...]) -> Step:
        """Pretraining from where the run is up to `epochs` completed."""
        settings, folder = self.settings, self.paths.pretrain_dir(run.name)
        known, given = METHODS[run.method].settings, dict(settings.parts.pretrain)
        of_segments = {"coverage_ratio": run.coverage_ratio, "segments_from": run.segments_from}
        if settings.data.make_segments and "use_unmasked_images" in known:
            given.setdefault("use_unmasked_images", True)  # it need not wait for segments
        planned = {
            **self.shared,
            "in1k_dir": settings.data.in1k_dir,
            "masks_dir": settings.data.masks_dir,
            "mask_method": run.method,
            **{name: value for name, value in of_segments.items() if name in known},
            "epochs": settings.experiment.pretrain_epochs,
            "stop_after": epochs,
            "init": self.official if settings.experiment.stack else None,
            "seed": run.seed,
            "output_dir": folder,
        }
        config = PretrainConfig(**_groups(PRETRAIN_GROUPS, "--pretrain", planned, given))
        left = (files.checkpoint_path(folder, epochs), files.reconstructions_path(folder, epochs))
        return self._step("pretrain", run, epochs, needs, config, left)

    def score(self, run: RunId, epochs: int, needs: tuple[str, ...]) -> list[Step]:
        """Probes and finetunes the checkpoint after `epochs`, where that is wanted.

        A baseline's is a random ViT (scratch) or the official checkpoint (mae).
        """
        experiment, steps = self.settings.experiment, []
        always = run.method in BASELINES or experiment.eval is not None
        if experiment.probe_freq != 0 and (always or epochs in experiment.probe_points):
            steps.append(self.probe(run, epochs, needs))
        if always or epochs in experiment.eval_points:
            steps += self.evaluate(run, epochs, needs)
        return steps

    def probe(self, run: RunId, epochs: int, needs: tuple[str, ...]) -> Step:
        """Scores the frozen encoder, by the finetuning's protocol unless told otherwise."""
        folder, known = self.paths.probe_dir(run.name, epochs), fields_of(*PROBE_GROUPS.values())
        init, planned, given = self._scored(run, epochs)
        given = {name: value for name, value in given.items() if name in known}
        given = {"image_folder": self._image_classes(), **given, **self.settings.parts.probe}
        # It has no trackers; its seed is the pretraining's.
        planned = {name: value for name, value in planned.items() if name in known}
        planned |= {"seed": run.seed, "output_dir": folder}
        config = ProbeConfig(init=init, **_groups(PROBE_GROUPS, "--probe", planned, given))
        return self._step("probe", run, epochs, needs, config, (folder / files.RESULT,))

    def evaluate(self, run: RunId, epochs: int, needs: tuple[str, ...]) -> Iterator[Step]:
        """Finetunes and scores the checkpoint, once for each finetuning seed."""
        init, planned, given = self._scored(run, epochs)
        for eval_seed in range(self.settings.experiment.eval_seeds):
            folder = self.paths.eval_dir(run.name, epochs, eval_seed)
            planned |= {"init": init, "seed": run.seed + eval_seed, "output_dir": folder}
            config = TrainConfig(**_groups(FINETUNE_GROUPS, "--finetune", planned, given))
            left = tuple(folder / name for name in (files.RESULT, files.LOG, files.PREDICTIONS))
            yield self._step("evaluate", run, epochs, needs, config, left, eval_seed)

    def _scored(self, run: RunId, epochs: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Of whatever scores a checkpoint: which one, what the plan sets, and what was given."""
        settings, given = self.settings, dict(self.settings.parts.finetune)
        init: Path | str = self.paths.checkpoint(run.name, epochs)
        if run.method in BASELINES:
            init = RANDOM if run.method == "scratch" else self.official
        if init == RANDOM:  # no checkpoint tells the patches: give it the others' size
            given.setdefault("patch_size", settings.parts.pretrain.get("patch_size"))
        recipe = str(given.get("recipe", settings.experiment.recipe))
        if recipe.endswith((".yml", ".yaml")):  # the parts run elsewhere
            recipe = os.path.abspath(Path(recipe).expanduser())  # noqa: PTH100
        given["recipe"] = recipe
        return init, {**self.shared, "dataset": settings.data.dataset}, given

    def _image_classes(self) -> Path | None:
        """val/, where it has a folder for each class, for probes of whole images."""
        folder = self.settings.data.in1k_dir and self.settings.data.in1k_dir / "val"
        if folder is None or not folder.is_dir():
            return None
        return folder if sum(entry.is_dir() for entry in os.scandir(folder)) > 1 else None

    def _step(
        self,
        kind: Kind,
        run: RunId,
        epochs: int,
        needs: tuple[str, ...],
        config: PretrainConfig | TrainConfig | ProbeConfig,
        outputs: tuple[Path, ...],
        eval_seed: int = 0,
    ) -> Step:
        compute = self.settings.compute
        processes, gpus = compute.processes, compute.pretrain_gpus
        if kind != "pretrain":
            processes = compute.gpus_per_eval if compute.num_gpus else processes
            gpus = compute.scoring_gpus
        # A Slurm job sees its own GPUs only.
        chosen = gpus if gpus and self.settings.cluster.launcher == "local" else None
        return Step(
            name=f"{kind}_{eval_name(run.name, epochs, eval_seed)}", kind=kind, run=run.name,
            epochs=epochs, program=_PROGRAMS[kind], config=config, processes=processes,
            needs=needs, folder=config.run.output_dir, outputs=outputs, gpus=chosen,
            settings=self._decisive(config),
        )  # fmt: skip

    def _decisive(self, config: PretrainConfig | TrainConfig | ProbeConfig) -> dict[str, Any]:
        """All that decides what comes out, with recipe and defaults filled in."""
        groups = [group for group in vars(config).values() if isinstance(group, OptionGroup)]
        values = decisive_values(*groups)
        if isinstance(config, ProbeConfig):
            values["init"] = str(config.init)
        idle = idle_settings(values.get("mask_method"))
        within = f"{self.paths.root}/"  # relative, so that the output directory may be moved
        return {
            name: value.removeprefix(within) if isinstance(value, str) else value
            for name, value in values.items()
            if name not in idle
        }


def _groups(
    groups: Mapping[str, type[OptionGroup]],
    section: str,
    planned: Mapping[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """A part's options: what the plan sets, and what was given by --pretrain and the like.

    Raises ValueError if they contradict, or a name or value is none.
    """
    check_names(given, fields_of(*groups.values()), section)
    for name in given.keys() & planned.keys():  # one place for each setting of a run
        flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
        raise ValueError(f"{section} {name}=... would contradict the plan; use {flag}")
    # An empty line of YAML says nothing: a command line has no word for None.
    given = {name: value for name, value in given.items() if value is not None}
    return make_all(groups, [Layer(given, section), Layer(planned)])


def nodes_of(step: Step, settings: Settings) -> int:
    """Machines of a step. Only pretraining is spread: a finetuning batch is small."""
    cluster = settings.cluster
    spread = cluster.launcher == "slurm" and (step.processes > 1 or step.devices_are_gpus)
    return cluster.nodes if spread and step.kind == "pretrain" else 1
