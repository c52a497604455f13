"""From settings to steps (`step.py`). Nothing is written or started here.

A step is one child process: fetch the official checkpoint, make segments (`segments.py` here),
pretrain up to the end of a round, probe a checkpoint's frozen encoder, or finetune and score it.
Steps meet in files only; `needs` names the steps that make them. Read `make_plan` first.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

from common import step_files as files
from common.formats import check_names, read_json
from common.images import has_classes
from common.options import Layer, OptionGroup, decisive_values, fields_of, make_all
from mae.config import END_DIGITS, OFFICIAL_FILES, PretrainConfig, idle_settings, make_method, training_flops
from mae.config import GROUPS as PRETRAIN_GROUPS
from mae.masking import METHODS
from pipeline.plan.budget import Budget
from pipeline.plan.layout import (
    BASELINES,
    DEFAULT_RATIO,
    OWN,
    UNTRAINED,
    Layout,
    RunId,
    eval_name,
    seed_of_eval,
)
from pipeline.plan.settings import GROUPS, Settings
from pipeline.plan.step import PARTS, Kind, PartConfig, Step, step_of_words
from segmenter.check import dataset_name
from segmenter.config import AUTO, PROBE_GROUPS, RANDOM, ProbeConfig, TrainConfig
from segmenter.config import GROUPS as FINETUNE_GROUPS

# Options of the parts that the plan sets, by a flag of another name.
_FLAGS = {
    "epochs": "--pretrain-epochs", "stop_after": "--eval-epochs", "last_epoch": "--budget",
    "device": "--num-gpus", "dataset": "--ade20k-dir or --eval-dataset", "init": "--stack or --eval",
}  # fmt: skip

SECTIONS = {"pretrain": "pretrain", "evaluate": "finetune", "probe": "probe"}  # by kind of step

_PROGRAMS = {
    "pretrain": ("mae", "pretrain"), "probe": ("segmenter", "probe"),
    "evaluate": ("segmenter", "train"),
}  # fmt: skip


def make_plan(settings: Settings) -> list[Step]:
    """The steps in the order in which one machine takes them.

    Scores that take less than the GPUs of a pretraining come after all of it, side by side, unless
    GPUs are kept for them. Raises ValueError for an option of a part that cannot be.
    """
    experiment, plan = settings.experiment, _Planner(settings)
    only, baselines = experiment.only_epochs, plan.baselines
    stacks = experiment.stack and experiment.eval is None and not experiment.pretrained_from
    steps = plan.fetch() if "mae" in baselines or stacks else []
    fetched = tuple(step.name for step in steps)
    for baseline, seed in product(baselines, experiment.seed):
        needs = fetched if baseline == "mae" else ()
        steps += plan.score(RunId(method=baseline, seed=seed), 0, needs)
    if experiment.eval is not None and only is None:
        return steps  # there is nothing to pretrain
    started = set[tuple[str, int]]()  # ratios and controls begin with the same model
    for run in _runs(settings):
        if only is not None:
            steps += plan.score(run, only, needs=())
            continue
        previous = fetched if experiment.stack else ()  # what a round starts from
        asked = plan.own_points(run, experiment.eval_points, experiment.probe_points)
        scored = asked | plan.untrained_points()
        if (run.method, run.seed) in started:
            scored.discard(0)
        started.add((run.method, run.seed))
        if experiment.pretrained_from:
            # A start that nobody kept is not missed, unless it is asked for.
            starts = files.checkpoint_path(plan.pretrained.pretrain_dir(run.name), 0)
            for epochs in sorted(scored if starts.exists() else asked):
                steps += plan.score(run, epochs, needs=())
            continue
        for epochs in sorted(scored | plan.own_points(run, [experiment.pretrain_epochs])):
            steps.append(plan.pretrain(run, epochs, previous))
            previous = (steps[-1].name,)
            steps += plan.score(run, epochs, needs=previous)
    if settings.cluster.launcher == "local" and settings.compute.scores_last:
        steps.sort(key=lambda step: {"probe": 1, "evaluate": 2}.get(step.kind, 0))
        if settings.parts.keep == "finetuned":
            steps = list(_probed_early(steps))
    return steps


def _probed_early(steps: Sequence[Step]) -> Iterator[Step]:
    """Probes as soon as there are enough to fill the GPUs: until then their checkpoints take room."""
    probes, made = [step for step in steps if step.kind == "probe"], set[str]()
    for step in [step for step in steps if step.kind != "probe"]:
        ready = [probe for probe in probes if made.issuperset(probe.needs)]
        if ready and (step.kind == "evaluate" or len(ready) >= ready[0].places):
            yield from ready
            probes = [probe for probe in probes if probe not in ready]
        yield step
        made.add(step.name)
    yield from probes


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
        self.settings, experiment = settings, settings.experiment
        self.paths = Layout(settings.data.output_dir)
        # Where checkpoints lie, or will.
        self.pretrained = Layout(experiment.pretrained_from) if experiment.pretrained_from else self.paths
        # Where the official MAE checkpoint is, or will be.
        download = self.paths.pretrain_output / f"mae_pretrain_{experiment.model}.pth"
        self.official = experiment.mae_checkpoint or download
        # What every part is told.
        self.shared = {
            "model": experiment.model,
            "device": "cuda" if settings.compute.num_gpus else "cpu",
            "log_with": settings.parts.log_with,
            "plugin": settings.parts.plugin,
        }
        self.budget, self.ends = experiment.shared_budget, dict(settings.ends)
        if self.budget is not None and self.budget.kind == "flops":
            self.ends = self._ends_by_flops(self.budget)

    def _ends_by_flops(self, budget: Budget) -> dict[str, float]:
        """Method -> the epochs that cost what the budget does: all see the same images."""
        flops = {}
        for method in {budget.method: 0, **dict.fromkeys(self.settings.experiment.mask_method)}:
            config = self._pretraining(RunId(method=method), 1, 1.0)
            flops[method] = training_flops(config.model, make_method(config.method, config.model))
        # Rounded, so that no digit too many makes an epoch of its own.
        ends = {n: round(budget.amount * flops[budget.method] / of, END_DIGITS) for n, of in flops.items()}
        for name, end in ends.items():
            budget.check_end(name, end)
        return ends

    def own_points(self, run: RunId, *points: Iterable[int]) -> set[int]:
        """Epochs completed by the run at these points of the plan: the same, unless it has a budget."""
        end = self.ends.get(run.method)
        if end is None or self.budget is None:
            return set(chain(*points))
        return {self.budget.epochs_at(end, point) for point in chain(*points)}

    @cached_property
    def baselines(self) -> dict[str, Path | str]:
        """What is scored without a pretraining of ours, by name."""
        experiment = self.settings.experiment
        chosen = experiment.eval or experiment.baselines
        if chosen is None:  # a download of gigabytes is not begun without being asked for
            at_hand = experiment.stack or self.official.is_file()
            chosen = BASELINES if at_hand else ("scratch",)
        known: dict[str, Path | str] = {"scratch": RANDOM, "mae": self.official}
        return {n: known[n] for n in BASELINES if n in chosen} | experiment.references

    def untrained_points(self) -> set[int]:
        """Epoch 0 where each method's own start is probed; finetuned where 0 is to be evaluated."""
        experiment = self.settings.experiment
        is_asked = experiment.baselines is None or UNTRAINED in experiment.baselines
        return {0} if is_asked and experiment.probe_freq != 0 else set()

    def fetch(self) -> list[Step]:
        """Nothing to fetch when a local file was named."""
        experiment, model = self.settings.experiment, self.settings.experiment.model
        if experiment.mae_checkpoint is not None:
            return []
        if model not in OFFICIAL_FILES:
            raise ValueError(
                f"--stack, --eval or --baselines mae: {model} has no official checkpoint, but "
                f"{', '.join(OFFICIAL_FILES)}; name a file of your own by --mae-checkpoint"
            )
        words, what = ["--model", model, "--out", str(self.official)], f"download MAE's {model}"
        folder = self.paths.bookkeeping / "fetch"
        return [step_of_words("mae", "fetch", model, words, what, folder, self.official)]

    def _pretraining(self, run: RunId, epochs: int, end: float) -> PretrainConfig:
        """Its options up to so many epochs; end: at which the whole ends."""
        settings, folder = self.settings, self.paths.pretrain_dir(run.name)
        known, given = METHODS[run.method].settings, settings.parts.pretrain
        of_segments = {"coverage_ratio": run.coverage_ratio, "segments_from": run.segments_from}
        # What can do without segments need not wait for them; equal budgets are of equal images.
        is_free = settings.data.make_segments and "use_unmasked_images" in known and not self.is_bound
        if self.is_bound and given.get("use_unmasked_images") and self._use_segments():
            raise ValueError(
                f"--budget {self.budget} is for methods on the same images; leave out --pretrain "
                "use_unmasked_images"
            )
        planned = {
            **self.shared,
            "in1k_dir": settings.data.in1k_dir,
            "index_dir": self.paths.bookkeeping,
            "masks_dir": settings.data.masks_dir,
            "mask_method": run.method,
            **{name: value for name, value in of_segments.items() if name in known},
            "epochs": math.ceil(end),
            "last_epoch": round(end - math.ceil(end) + 1, END_DIGITS),
            "stop_after": epochs,
            "init": self.official if settings.experiment.stack else None,
            "seed": run.seed,
            "output_dir": folder,
        }
        below = {"use_unmasked_images": True} if is_free else {}
        return PretrainConfig(**_groups(PRETRAIN_GROUPS, "--pretrain", planned, given, below))

    @property
    def is_bound(self) -> bool:
        """Whether methods have different numbers of epochs."""
        return self.budget is not None and self.budget.kind != "epochs"

    def _use_segments(self) -> bool:
        return any(METHODS[name].uses_segments for name in self.settings.experiment.mask_method)

    def pretrain(self, run: RunId, epochs: int, needs: tuple[str, ...]) -> Step:
        """Pretraining from where the run is up to `epochs` completed."""
        end = self.ends.get(run.method, self.settings.experiment.pretrain_epochs)
        config, folder = self._pretraining(run, epochs, end), self.paths.pretrain_dir(run.name)
        left = (files.checkpoint_path(folder, epochs), files.reconstructions_path(folder, epochs))
        what = f"pretrain up to epoch {round(min(epochs, end), 2):g} of {round(end, 2):g}"
        what += ", without segments too" if config.data.use_unmasked_images else ""
        step = self._step("pretrain", what, run, epochs, needs, config, *left)
        if not self.is_bound:
            return step
        # What allows methods to differ in their epochs (`records.differences`).
        return replace(step, settings={**step.settings, "budget": self.settings.experiment.budget_text})

    @cached_property
    def datasets(self) -> dict[str, Path]:
        """By the names that their scores bear; the first one's bear none. ValueError if two are alike."""
        paths = self.settings.data.datasets
        names = [dataset_name(path) for path in paths] if len(paths) > 1 else [""]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"--eval-dataset: two are called {name}; give one another `name:` in its YAML"
                )
        return dict(zip(("", *names[1:]), paths, strict=True))

    def score(self, run: RunId, epochs: int, needs: tuple[str, ...]) -> Iterator[Step]:
        """`score_on` each of the datasets."""
        for dataset in self.datasets:
            yield from self.score_on(dataset, run, epochs, needs)

    def score_on(self, dataset: str, run: RunId, epochs: int, needs: tuple[str, ...]) -> Iterator[Step]:
        """Probes and finetunes the checkpoint after `epochs`, where that is wanted.

        A baseline's is an encoder that is there, or will be fetched.
        """
        experiment, parts, data = self.settings.experiment, self.settings.parts, self.settings.data
        init: Any = files.checkpoint_path(self.pretrained.pretrain_dir(run.name), epochs)
        is_reference = run.method in self.baselines
        init = self.baselines.get(run.method, init)
        given = {"recipe": experiment.recipe, **parts.finetune}
        if init == RANDOM:  # no checkpoint tells the patches: give it the others' size
            given.setdefault("patch_size", parts.pretrain.get("patch_size"))
        if str(given["recipe"]).endswith((".yml", ".yaml")):  # the parts run elsewhere
            given["recipe"] = os.path.abspath(Path(given["recipe"]).expanduser())  # noqa: PTH100
        planned = {**self.shared, "dataset": self.datasets[dataset]}
        if run.method in experiment.references and init != RANDOM:
            planned["model"] = AUTO  # it says itself what it is
        always = is_reference or experiment.eval is not None

        # The frozen encoder, by the finetuning's protocol unless told otherwise.
        probed = self.own_points(run, experiment.probe_points) | self.untrained_points()
        is_probed = always or epochs in probed
        if experiment.probe_freq != 0 and is_probed:
            folder = self.paths.probe_dir(run.name, epochs, dataset)
            told, below = {**planned, "seed": run.seed, "output_dir": folder}, {**given}
            # Of whole images, too, where val/ has a folder for each class.
            val = (data.in1k_dir or Path()) / "val"
            if data.in1k_dir and has_classes(val, self.paths.bookkeeping):
                below |= {"image_folder": val, "index_dir": self.paths.bookkeeping}
            groups = _groups(PROBE_GROUPS, "--probe", told, parts.probe, below)
            on = f", on {dataset}" if dataset else ""
            what = f"probe the frozen encoder, seed {run.seed}{on}"
            probe = ProbeConfig(init=init, **groups)
            yield self._step("probe", what, run, epochs, needs, probe, files.RESULT)

        # Finetuned once for each seed.
        is_asked = bool(experiment.eval_points) or experiment.eval is not None
        is_evaluated = (always and is_asked) or epochs in self.own_points(run, experiment.eval_points)
        for eval_seed in range(experiment.eval_seeds if is_evaluated else 0):
            folder = self.paths.eval_dir(run.name, epochs, eval_seed, dataset)
            seed = self._seed_of(run, folder.name, eval_seed)
            told = {**planned, "init": init, "seed": seed, "output_dir": folder}
            config = TrainConfig(**_groups(FINETUNE_GROUPS, "--finetune", told, given))
            left = (files.RESULT, files.LOG, files.PREDICTIONS)
            what = f"finetune and score, seed {config.optimisation.seed}"
            what += f", on {dataset}" if dataset else ""
            yield self._step("evaluate", what, run, epochs, needs, config, *left)

    def _seed_of(self, run: RunId, name: str, number: int) -> int:
        """A finetuning that an earlier version began goes on with the seed that it was given."""
        record, earlier = self.paths.record(f"evaluate_{name}"), run.seed + number
        made: Any = read_json(record, dict[str, Any]) if record.exists() else {}
        is_earlier = str(dict(made.get("fingerprint", {})).get("seed")) == str(earlier)
        return earlier if is_earlier else seed_of_eval(run.seed, number)

    def _step(
        self, kind: Kind, what: str, run: RunId, epochs: int, needs: tuple[str, ...],
        config: PartConfig, *left: str | Path,
    ) -> Step:  # fmt: skip
        """left: what it leaves in its folder."""
        compute, cluster = self.settings.compute, self.settings.cluster
        folder = config.run.output_dir
        name, gpus, processes = folder.name, compute.eval_gpus, compute.gpus_per_eval
        if kind == "pretrain":  # all rounds of a run have one folder
            name = eval_name(run.name, epochs)
        if kind == "pretrain" or not compute.num_gpus:  # on the CPU, scores are shared, too
            processes = compute.num_processes or 1
        if kind == "pretrain" or not gpus:
            gpus = compute.pretrain_gpus
        is_slurm = cluster.launcher == "slurm"
        # Only pretraining is spread: a finetuning batch is small.
        spread = is_slurm and kind == "pretrain" and (processes > 1 or compute.num_gpus)
        return Step(
            name=f"{kind}_{name}", kind=kind, what=what, run=run.name, epochs=epochs,
            program=_PROGRAMS[kind], config=config, folder=folder, device=config.run.device,
            needs=needs, outputs=tuple(folder / path for path in left),
            # A Slurm job sees its own GPUs only.
            gpus=gpus if gpus and not is_slurm else None,
            nodes=cluster.nodes if spread else 1, processes=processes,
            settings=self._decisive(config),
        )  # fmt: skip

    def _decisive(self, config: PartConfig) -> dict[str, Any]:
        """All that decides what comes out, with recipe and defaults filled in."""
        groups = [group for group in vars(config).values() if isinstance(group, OptionGroup)]
        values = decisive_values(*groups)
        if isinstance(config, ProbeConfig):
            values["init"] = str(config.init)
        for idle in idle_settings(values.get("mask_method")):
            values.pop(idle, None)
        within = f"{self.paths.root}/"  # relative, so that the output directory may be moved
        return {n: v.removeprefix(within) if isinstance(v, str) else v for n, v in values.items()}


def in_words_of_the_plan(said: str, kind: str) -> str:
    """What a part says of its options, as they are given to benchmark.py."""
    section, own = SECTIONS[kind], fields_of(*GROUPS.values())
    fields = fields_of(*PARTS[section].values())

    def here(found: re.Match[str]) -> str:
        name, value = found[1].replace("-", "_"), found[2] or ""
        if name in _FLAGS:
            return _FLAGS[name] + (f" {value}" if value else "")
        if name in own or name not in fields:
            return found[0]
        value = value or ("true" if fields[name].kind is bool else "")
        return f"--{section} {name}" + (f"={value}" if value else "")

    command = said.find("python -m ")  # what follows is to be given to the part itself
    text, rest = (said, "") if command < 0 else (said[:command], said[command:])
    return re.sub(r"--([a-z][a-z0-9-]*[a-z0-9])(?: (\d[\d.]*\d|\d))?", here, text) + rest


def _groups(
    groups: Mapping[str, type[OptionGroup]], section: str, planned: Mapping[str, Any],
    given: Mapping[str, Any], below: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A part's options: what the plan sets, and what was given by --pretrain and the like.

    below: what counts unless something is given. Raises ValueError if they contradict, or a name or
    value is none.
    """
    check_names(given, fields_of(*groups.values()), section)
    # An empty line of YAML says nothing: a command line has no word for None.
    given = {**(below or {}), **{n: v for n, v in given.items() if v is not None}}
    for name in given.keys() & planned.keys():  # one place for each setting of a run
        flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
        raise ValueError(f"{section} {name}=... would contradict the plan; use {flag}")
    return make_all(groups, [Layer(given, section), Layer(planned)])
