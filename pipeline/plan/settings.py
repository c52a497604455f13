"""The settings of a benchmark, one frozen group per concern: a field is the flag and YAML's key.

What belongs to a part is an option of that part, judged when the plan makes its configs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mode
from typing import Any, ClassVar, Literal

from common.formats import plain
from common.options import MOST_PROCESSES, OptionGroup, groups_of, option, option_of
from mae.config import MethodConfig, ModelConfig, OptimisationConfig, RunConfig, SegmentsFrom
from mae.masking import METHODS
from pipeline.plan.budget import Budget, in_words
from pipeline.plan.layout import BASELINES, DEFAULT_RATIO, DEFAULT_SEED, OWN, UNTRAINED
from segmenter.config import DEFAULT_RECIPE, ENCODER_FORMS, RANDOM, encoder_label, parse_encoder

# More than so many of anything that has a process of its own is a slip of the hand.
FROM_ONE: dict[str, Any] = {"at_least": 1, "at_most": MOST_PROCESSES}
FROM_ZERO = {**FROM_ONE, "at_least": 0}
Keep = Literal["all", "scored", "finetuned"]


@dataclass(frozen=True, kw_only=True)
class Data(OptionGroup):
    """Where the images and labels are, and where everything goes."""

    title: ClassVar[str] = "Data"
    in1k_dir: Path | None = option("Images: train/, perhaps val/ and masks/.", None)
    masks_dir: Path | None = option("Segments. Default: IN1K-DIR/masks, or masks.sqlite there.", None)
    make_segments: str | None = option(
        "Where there are no segments, make them first: by felzenszwalb, a model by name (python -m "
        "segments generate --help), in a folder or on the Hugging Face hub.", None,
    )  # fmt: skip
    segment_shards: int = option("Steps, or jobs, that share making them.", 1, **FROM_ONE)
    ade20k_dir: Path | None = option("ADEChallengeData2016, to evaluate on.", None)
    eval_dataset: tuple[Path, ...] | None = option("Other datasets: their folders or YAML files.", None)
    output_dir: Path = option("Where everything goes.", Path())
    make_sample: Path | None = option("Where sample data are made, if used and missing.", None)

    def __post_init__(self) -> None:
        # By its own name: records and processes of one directory are told by the path.
        object.__setattr__(self, "output_dir", self.output_dir.resolve())
        if self.ade20k_dir and self.eval_dataset:
            raise ValueError("give --ade20k-dir or --eval-dataset, not both")

    @property
    def datasets(self) -> tuple[Path, ...]:
        """What to evaluate on."""
        return (self.ade20k_dir,) if self.ade20k_dir else self.eval_dataset or ()

    @property
    def missing_sample(self) -> Path | None:
        """The folder of sample data that are to be used and are not there."""
        folder, used = self.make_sample, filter(None, (self.in1k_dir, *self.datasets))
        is_missing = any(folder and p.is_relative_to(folder) and not p.exists() for p in used)
        return folder if is_missing else None


def _reference(value: Any, words: tuple[str, ...]) -> str:
    """One of the words, or NAME=ENCODER with what is a path in it made absolute. ValueError."""
    text = str(value).strip()
    name, equals, encoder = text.partition("=")
    if text in words:
        return text
    if not equals:
        raise ValueError(f"give {', '.join(words)}, or NAME=ENCODER; an encoder is {ENCODER_FORMS}")
    if not re.fullmatch(r"[A-Za-z]\w*", name) or name in (*METHODS, *BASELINES, UNTRAINED, "none"):
        raise ValueError("a name has letters, digits and _, begins with a letter, and is no method's")
    return f"{name}={parse_encoder(encoder)}"


def _scored(value: Any) -> str:
    """Epochs completed, or an encoder under the name that it has itself. Raises ValueError."""
    text = str(value).strip()
    if text == RANDOM:  # timm's random ViT has a name here
        return BASELINES[0]
    if text.isdecimal() or text in BASELINES or re.match(r"\w+=", text):
        return text if text.isdecimal() else _reference(text, BASELINES)
    last = re.split(r"[:/]", encoder_label(parse_encoder(text)))[-1]
    name = re.sub(r"\W", "_", re.sub(r"\.(pth?|bin|safetensors)$", "", last))
    return _reference(f"{name if name[:1].isalpha() else f'e{name}'}={text}", BASELINES)


@dataclass(frozen=True, kw_only=True)
class Experiment(OptionGroup):
    """What is compared."""

    title: ClassVar[str] = "Experiment"
    # The parts' own options, of which several values make several runs.
    mask_method: tuple[str, ...] = option_of(MethodConfig, "mask_method", ("four_channels",))
    coverage_ratio: tuple[float, ...] = option_of(MethodConfig, "coverage_ratio", (DEFAULT_RATIO,))
    segments_from: tuple[SegmentsFrom, ...] = option_of(MethodConfig, "segments_from", (OWN,))
    seed: tuple[int, ...] = option_of(OptimisationConfig, "seed", (DEFAULT_SEED,))
    model: str = option_of(ModelConfig, "model", ModelConfig.model)
    pretrain_epochs: int = option_of(OptimisationConfig, "epochs", OptimisationConfig.epochs)
    budget: str | None = option(
        "What every method spends, each in epochs of its own with a schedule of its own: flops=METHOD@EPOCHS "
        "(what so many epochs of METHOD cost), gpu-hours=N (by timed steps), or epochs=N. Epochs of other "
        "flags are then parts of the budget: of EPOCHS, of N, or percent of the hours.", None,
    )  # fmt: skip
    count_segments: bool = option("With --budget gpu-hours: making segments is a part of it.", False)
    eval_freq: int = option("Evaluate every so many epochs, and at the end; 0 = probes only.", 5, at_least=0)
    eval_epochs: tuple[int, ...] | None = option(
        "Evaluate at these instead; 0 = before pretraining.", None, at_least=0
    )
    probe_freq: int | None = option(
        "Probe the frozen encoder every so many epochs, too; 0 = no probes at all. "
        "Default: where it is evaluated.", None, at_least=0,
    )  # fmt: skip
    eval_seeds: int = option(
        "Finetunings of each checkpoint, by seeds of their own; 0 = probes only.", 1, **FROM_ZERO
    )
    recipe: str = option("Finetuning recipe: a name or a YAML file.", DEFAULT_RECIPE)
    stack: bool = option("Start from the official MAE checkpoint.", False)
    mae_checkpoint: Path | None = option("A local copy of it, else downloaded.", None)
    baselines: tuple[str, ...] | None = option(
        "Reference lines: untrained (each method's model before its first epoch), scratch (timm's "
        "random ViT: labels alone), mae (the official checkpoint), NAME=ENCODER (any, under a name of "
        "your own), or none. Default: untrained, scratch, and mae if that file is at hand.", None,
        parse=lambda value: _reference(value, (UNTRAINED, *BASELINES, "none")),
    )  # fmt: skip
    eval: tuple[str, ...] | None = option(
        "Evaluate only this: N (epochs completed), or scratch, mae, [NAME=]ENCODER without pretraining.",
        None, parse=lambda value: _scored(value),
    )  # fmt: skip
    pretrained_from: Path | None = option(
        "Another output directory: its checkpoints are scored, and nothing is pretrained.", None
    )

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            # Each makes a step that is called so.
            if isinstance(values, tuple) and len(set(values)) != len(values):
                raise ValueError(f"--{name.replace('_', '-')} names one twice")
        if (budget := self.shared_budget) is not None:
            if self.pretrain_epochs not in (OptimisationConfig.epochs, budget.parts):
                raise ValueError(
                    f"--pretrain-epochs {self.pretrain_epochs} contradicts --budget {budget}; leave it out"
                )
            object.__setattr__(self, "pretrain_epochs", budget.parts)
        if self.count_segments and (budget is None or budget.kind != "gpu-hours"):
            raise ValueError("--count-segments: their FLOPs are not known; give --budget gpu-hours=N")
        if any(epochs > self.pretrain_epochs for epochs in self.eval_epochs or ()):
            raise ValueError(f"--eval-epochs end with the {self.pretrain_epochs} of pretraining")
        if self.baselines and "none" in self.baselines and len(self.baselines) > 1:
            raise ValueError("--baselines names none and others; give one or the other")
        if self.mae_checkpoint is not None and not self.mae_checkpoint.is_file():
            raise ValueError(f"--mae-checkpoint {self.mae_checkpoint} is not a file")
        source = self.pretrained_from
        if source is not None and not (source / "pretrain_output").is_dir():
            raise ValueError(f"--pretrained-from {source} is not the output directory of a run")
        if self.eval is not None and len(self.eval) > 1 and any(map(str.isdecimal, self.eval)):
            raise ValueError(f"--eval is {','.join(self.eval)}; give epochs completed, or encoders")
        for names in (self.baselines or (), self.eval or ()):
            called = [name.partition("=")[0] for name in names]
            if len(set(called)) != len(called):
                raise ValueError(
                    f"two encoders are called {mode(called)}; give NAME=ENCODER with other names"
                )

    @property
    def only_epochs(self) -> int | None:
        """The epochs completed of the one checkpoint that is evaluated, if --eval says so."""
        return int(self.eval[0]) if self.eval and self.eval[0].isdecimal() else None

    @property
    def references(self) -> dict[str, Path | str]:
        """The encoders of --eval or --baselines that have a name of the user's, as the parts take them."""
        named = (one.partition("=") for one in self.eval or self.baselines or ())
        return {name: parse_encoder(encoder) for name, equals, encoder in named if equals}

    @property
    def shared_budget(self) -> Budget | None:
        """What every method spends, where it is told."""
        return None if self.budget is None else Budget.parse(self.budget)

    @property
    def budget_text(self) -> str:
        """The same in words."""
        return in_words(str(self.shared_budget), counts_segments=self.count_segments)

    @property
    def eval_points(self) -> tuple[int, ...]:
        """Epochs (or parts of the budget) at which to evaluate, ascending; 0 = before any pretraining."""
        if self.eval_epochs is not None:
            return tuple(sorted(self.eval_epochs))
        if self.eval_freq == 0:
            return ()
        every = range(self.eval_freq, self.pretrain_epochs, self.eval_freq)
        return (*every, self.pretrain_epochs)  # the last round may be shorter

    @property
    def probe_points(self) -> tuple[int, ...]:
        """The same of probes."""
        if self.probe_freq == 0:
            return ()
        freq = self.probe_freq or self.pretrain_epochs + 1  # beyond the end: none of its own
        last = self.eval_points or (self.pretrain_epochs,)
        return tuple(sorted({*range(freq, self.pretrain_epochs + 1, freq), *last}))


@dataclass(frozen=True, kw_only=True)
class Compute(OptionGroup):
    """Devices on each machine, and what may run beside each other."""

    title: ClassVar[str] = "Devices"
    num_gpus: int | None = option("GPUs per machine, 0 = CPU. Default: all.", None, **FROM_ZERO)
    num_processes: int | None = option("With --num-gpus 0. Default: 1.", None, **FROM_ONE)
    eval_gpus: tuple[int, ...] = option(
        "Evaluate on these, such as 6,7, beside pretraining on the others.", (), at_least=0
    )
    gpus_per_eval: int = option("Of a finetuning or probe; several run at once.", 1, **FROM_ONE)
    overlap: bool = option("Evaluate beside pretraining on the CPU too.", False)

    def resolved(self, cluster: Cluster, gpus_here: int) -> Compute:
        """With every number filled in; the GPUs of a machine that submits jobs do not count."""
        is_slurm, total = cluster.launcher == "slurm", self.num_gpus
        if is_slurm and cluster.gpus_per_node is not None:
            total = cluster.gpus_per_node
        elif not is_slurm and total is None:
            total = gpus_here
        if total is None:
            raise ValueError("--launcher slurm needs --gpus-per-node N (0 = CPU)")
        if is_slurm and self.eval_gpus:
            raise ValueError("--eval-gpus is for one machine: Slurm's jobs have GPUs of their own")
        if any(gpu >= total for gpu in self.eval_gpus):
            there = f"there are GPUs 0 to {total - 1}" if total else "there is no GPU here"
            raise ValueError(f"--eval-gpus {','.join(map(str, self.eval_gpus))}: {there}")
        gpus = total - len(self.eval_gpus)
        most = len(self.eval_gpus) or gpus  # those kept for evaluation, or else all
        if self.eval_gpus and not gpus:
            raise ValueError("--eval-gpus leaves no GPU for pretraining")
        if self.gpus_per_eval > max(most, 1):
            raise ValueError(f"--gpus-per-eval {self.gpus_per_eval}: to evaluate on are {most} GPUs")
        if gpus and self.num_processes not in (None, gpus):
            raise ValueError(
                f"--num-processes {self.num_processes}: each of the {gpus} GPUs that pretrain has "
                "one process; leave it out, or use --num-gpus 0"
            )
        return replace(self, num_gpus=total, num_processes=self.num_processes or max(gpus, 1))

    @property
    def pretrain_gpus(self) -> tuple[int, ...]:
        """All but those kept for evaluation."""
        return tuple(gpu for gpu in range(self.num_gpus or 0) if gpu not in self.eval_gpus)

    @property
    def scores_last(self) -> bool:
        """Whether a score in between would keep pretraining waiting and leave GPUs idle."""
        return not self.eval_gpus and self.gpus_per_eval < (self.num_gpus or 0)

    @property
    def overlaps(self) -> bool:
        """Whether steps run beside each other: GPUs are handed out, on the CPU it is asked for."""
        return self.overlap or bool(self.num_gpus)


@dataclass(frozen=True, kw_only=True)
class Cluster(OptionGroup):
    """How steps reach a Slurm cluster."""

    title: ClassVar[str] = "Slurm"
    launcher: Literal["local", "slurm"] = option("Where steps run.", "local")
    nodes: int = option("Machines of a pretraining.", 1, **FROM_ONE)
    gpus_per_node: int | None = option("0 = CPU. Default: --num-gpus.", None, **FROM_ZERO)
    partition: str | None = option("Where jobs are queued.", None)
    time: str | None = option(
        "Limit of a job, which then continues in a new one: minutes or D-HH:MM:SS. Default: a day.", None
    )
    qos: str | None = option("Quality of service.", None)
    sbatch: Mapping[str, Any] = option("A further sbatch parameter.", {})
    wait: bool = option("Follow the jobs to their end.", False)

    def __post_init__(self) -> None:
        _ = self.minutes  # judged now, and not when the first job is submitted

    @property
    def minutes(self) -> int:
        """The time limit in whole minutes; a day unless set. ValueError if it is not a time.

        Slurm's forms: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
        """
        text = self.time or "1-0"
        if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", text):
            raise ValueError(f"--time {text}: give minutes or Slurm's D-HH:MM:SS")
        days, _, rest = text.rpartition("-")  # without a dash all of it is the rest
        numbers = [int(number) for number in rest.split(":")]
        units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
        # D-H and D-H:M leave the last units out.
        seconds = int(days or 0) * 86400 + sum(map(operator.mul, numbers, units))
        if seconds < 60:
            raise ValueError(f"--time {text} is less than a minute")
        return -(-seconds // 60)  # rounded up: sbatch takes whole minutes


@dataclass(frozen=True, kw_only=True)
class Parts(OptionGroup):
    """What is passed on to the parts, and what happens when one fails."""

    title: ClassVar[str] = "Steps"
    pretrain: Mapping[str, Any] = option("An option of python -m mae pretrain.", {})
    finetune: Mapping[str, Any] = option("An option of python -m segmenter train.", {})
    probe: Mapping[str, Any] = option("An option of python -m segmenter probe.", {})
    log_with: tuple[str, ...] | None = option_of(RunConfig, "log_with", None)
    plugin: Path | None = option_of(RunConfig, "plugin", None)
    keep: Keep = option(
        "Weights that stay: all; the checkpoints of pretraining that are scored, not what only continuing "
        "needs, nor finetuned models; or of those the ones that are finetuned, and each run's last.", "all",
    )  # fmt: skip
    keep_going: bool = option("After a failed step, go on with those that do not need it.", True)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that one call of benchmark.py was told."""

    data: Data
    experiment: Experiment
    compute: Compute  # resolved: its numbers are known
    cluster: Cluster
    parts: Parts
    # Method -> its epochs, where --budget is in hours, which only timed steps tell.
    ends: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        told = (self.data.in1k_dir, self.experiment.eval, self.experiment.pretrained_from)
        if not any(told):
            raise ValueError("--in1k-dir is missing: the folder with train/ and masks/")
        if not self.data.datasets:
            raise ValueError("--ade20k-dir (or --eval-dataset FILE.yml) is missing")

    def flat(self) -> dict[str, Any]:
        """All options by name, plain: what run.yml keeps, in the form that --config reads."""
        groups = (getattr(self, name) for name in GROUPS)
        return {name: plain(value) for group in groups for name, value in vars(group).items()}

    def notes(self) -> Iterator[str]:
        """What a user may not expect; nothing of it is wrong."""
        experiment, is_local = self.experiment, self.cluster.launcher == "local"
        epochs, rounds = experiment.pretrain_epochs, experiment.eval_freq
        if experiment.eval_epochs is None and experiment.eval is None and rounds and epochs % rounds:
            yield (
                f"{epochs} epochs are not a multiple of --eval-freq {rounds}: a shorter last round "
                f"ends at {epochs}"
            )
        # Only what was changed can have been meant.
        default = vars(Cluster())
        unused = [name for name, value in vars(self.cluster).items() if value != default[name]]
        if is_local and unused:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            yield f"{flags}: only used with --launcher slurm"
        if is_local and experiment.eval is None and self.compute.scores_last:
            yield (
                "scores take fewer GPUs than pretraining, so they come after pretraining, side by "
                "side; --eval-gpus keeps some for them meanwhile"
            )
        for ratio in experiment.coverage_ratio:
            if 0 < ratio < 1:
                yield f"--coverage-ratio is in percent: {ratio} % of the image"


GROUPS = {name: group for name, group in groups_of(Settings).items() if name != "ends"}
