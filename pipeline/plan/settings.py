"""The settings of a benchmark, one frozen group per concern: a field is the flag and YAML's key.

What belongs to a part is an option of that part, judged when the plan makes its configs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.formats import plain
from common.options import MOST_PROCESSES, OptionGroup, groups_of, option, option_of
from engine.config import PluginConfig, TrainingConfig
from mae.config import MethodConfig, ModelConfig, OptimisationConfig, SegmentsFrom
from pipeline.plan.layout import BASELINES, DEFAULT_RATIO, DEFAULT_SEED, OWN
from segmenter.config import DEFAULT_RECIPE


@dataclass(frozen=True, kw_only=True)
class Data(OptionGroup):
    """Where the images and labels are, and where everything goes."""

    title: ClassVar[str] = "Data"
    in1k_dir: Path | None = option("Images: train/, perhaps val/ and masks/.", None)
    masks_dir: Path | None = option("Segments. Default: IN1K-DIR/masks.", None)
    make_segments: str | None = option(
        "Where there are no segments, make them first: by felzenszwalb, a model by name (python -m "
        "segments generate --help), in a folder or on the Hugging Face hub.", None,
    )  # fmt: skip
    segment_shards: int = option(
        "Steps, or jobs, that share making them.", 1, at_least=1, at_most=MOST_PROCESSES
    )
    ade20k_dir: Path | None = option("ADEChallengeData2016, to evaluate on.", None)
    eval_dataset: Path | None = option("YAML file of another dataset.", None)
    output_dir: Path = option("Where everything goes.", Path())
    make_sample: Path | None = option(
        "Generate the sample data into this folder if they are missing and used.", None
    )

    def __post_init__(self) -> None:
        # By its own name: records and processes of one directory are told by the path.
        object.__setattr__(self, "output_dir", self.output_dir.resolve())
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"--output-dir {self.output_dir} is a file")
        if self.ade20k_dir and self.eval_dataset:
            raise ValueError("give --ade20k-dir or --eval-dataset, not both")

    @property
    def dataset(self) -> Path | None:
        """What to evaluate on."""
        return self.ade20k_dir or self.eval_dataset

    @property
    def missing_sample(self) -> Path | None:
        """The folder of sample data that are to be used and are not there."""
        folder = self.make_sample
        used = [path for path in (self.in1k_dir, self.dataset) if path is not None]
        if folder is None or not any(p.is_relative_to(folder) and not p.exists() for p in used):
            return None
        return folder


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
    eval_freq: int = option("Evaluate every so many epochs, and at the end.", 5, at_least=1)
    eval_epochs: tuple[int, ...] | None = option(
        "Evaluate at these instead; 0 = before pretraining.", None, at_least=0
    )
    probe_freq: int | None = option(
        "Probe the frozen encoder every so many epochs, too; 0 = no probes at all. "
        "Default: where it is evaluated.", None, at_least=0,
    )  # fmt: skip
    eval_seeds: int = option(
        "Finetunings of each checkpoint, by SEED, SEED+1, ...", 1, at_least=1, at_most=1000
    )
    recipe: str = option("Finetuning recipe: a name or a YAML file.", DEFAULT_RECIPE)
    stack: bool = option("Start from the official MAE checkpoint.", False)
    mae_checkpoint: Path | None = option("A local copy of it, else downloaded.", None)
    baselines: tuple[str, ...] | None = option(
        "Reference lines: scratch (a random ViT), mae (the official checkpoint), or none. "
        "Default: scratch, and mae if that file is at hand.", None,
        choices=lambda: (*BASELINES, "none"),
    )  # fmt: skip
    eval: str | None = option(
        "Evaluate only this: N epochs completed, scratch (a random ViT) or mae.", None
    )

    def __post_init__(self) -> None:
        for name in (
            "mask_method", "coverage_ratio", "segments_from", "seed", "eval_epochs", "baselines"
        ):  # fmt: skip
            values = getattr(self, name) or ()  # of which each makes a step, with that name
            if len(set(values)) != len(values):
                raise ValueError(f"--{name.replace('_', '-')} names one twice")
        if any(epochs > self.pretrain_epochs for epochs in self.eval_epochs or ()):
            raise ValueError(f"--eval-epochs end with the {self.pretrain_epochs} of pretraining")
        if self.baselines and "none" in self.baselines and len(self.baselines) > 1:
            raise ValueError("--baselines names none and others; give one or the other")
        if self.mae_checkpoint is not None and not self.mae_checkpoint.is_file():
            raise ValueError(f"--mae-checkpoint {self.mae_checkpoint} is not a file")
        if self.eval is not None and self.eval not in BASELINES and not self.eval.isdecimal():
            raise ValueError(f"--eval is {self.eval}; give epochs completed, scratch or mae")

    @property
    def eval_points(self) -> tuple[int, ...]:
        """Epochs completed at which to evaluate, ascending; 0 = before any pretraining."""
        if self.eval_epochs is not None:
            return tuple(sorted(self.eval_epochs))
        every = range(self.eval_freq, self.pretrain_epochs, self.eval_freq)
        return (*every, self.pretrain_epochs)  # the last round may be shorter

    @property
    def probe_points(self) -> tuple[int, ...]:
        """Epochs completed at which to probe, ascending."""
        if self.probe_freq == 0:
            return ()
        freq = self.probe_freq or self.pretrain_epochs + 1  # beyond the end: none of its own
        return tuple(sorted({*range(freq, self.pretrain_epochs + 1, freq), *self.eval_points}))


@dataclass(frozen=True, kw_only=True)
class Compute(OptionGroup):
    """Devices on each machine, and what may run beside each other."""

    title: ClassVar[str] = "Devices"
    num_gpus: int | None = option(
        "GPUs per machine, 0 = CPU. Default: all.", None, at_least=0, at_most=MOST_PROCESSES
    )
    num_processes: int | None = option(
        "With --num-gpus 0. Default: 1.", None, at_least=1, at_most=MOST_PROCESSES
    )
    eval_gpus: tuple[int, ...] = option(
        "Evaluate on these, such as 6,7, beside pretraining on the others.", (), at_least=0
    )
    gpus_per_eval: int = option(
        "GPUs of one finetuning or probe; several run side by side.", 1,
        at_least=1, at_most=MOST_PROCESSES,
    )  # fmt: skip
    overlap: bool = option("Evaluate beside pretraining on the CPU too.", False)

    def resolved(self, cluster: Cluster, gpus_here: int) -> Compute:
        """With every number filled in; the GPUs of a machine that submits jobs do not count."""
        total = self.num_gpus  # from here on a number
        if cluster.launcher == "slurm":
            total = total if cluster.gpus_per_node is None else cluster.gpus_per_node
            if total is None:
                raise ValueError("--launcher slurm needs --gpus-per-node N (0 = CPU)")
            if self.eval_gpus:
                raise ValueError(
                    "--eval-gpus is for one machine: with --launcher slurm evaluations are jobs "
                    "with GPUs of their own, beside pretraining; leave it out"
                )
        elif total is None:
            total = gpus_here
        if any(gpu >= total for gpu in self.eval_gpus):
            there = f"there are GPUs 0 to {total - 1}" if total else "there is no GPU here"
            raise ValueError(f"--eval-gpus {','.join(map(str, self.eval_gpus))}: {there}")
        gpus = total - len(self.eval_gpus)
        if self.eval_gpus and not gpus:
            raise ValueError("--eval-gpus leaves no GPU for pretraining")
        to_score_on = len(self.eval_gpus) or total  # as `scoring_gpus`, which needs the total
        if self.gpus_per_eval > max(to_score_on, 1):
            raise ValueError(
                f"--gpus-per-eval {self.gpus_per_eval}: the GPUs to evaluate on are {to_score_on}"
            )
        if gpus and self.num_processes not in (None, gpus):
            raise ValueError(
                f"--num-processes {self.num_processes} with {gpus} GPUs for pretraining: every GPU "
                "has one process; leave --num-processes out, or use --num-gpus 0 for the CPU"
            )
        return replace(self, num_gpus=total, num_processes=self.num_processes or max(gpus, 1))

    @property
    def pretrain_gpus(self) -> tuple[int, ...]:
        """All but those kept for evaluation."""
        return tuple(gpu for gpu in range(self.num_gpus or 0) if gpu not in self.eval_gpus)

    @property
    def processes(self) -> int:
        """Of pretraining on each machine."""
        return self.num_processes or 1

    @property
    def scoring_gpus(self) -> tuple[int, ...]:
        """Those kept for evaluation, or else all."""
        return self.eval_gpus or self.pretrain_gpus

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
    nodes: int = option("Machines of a pretraining.", 1, at_least=1, at_most=MOST_PROCESSES)
    gpus_per_node: int | None = option(
        "0 = CPU. Default: --num-gpus.", None, at_least=0, at_most=MOST_PROCESSES
    )
    partition: str | None = option("Where jobs are queued.", None)
    time: str | None = option(
        "Limit of a job, which then continues in a new one: minutes or D-HH:MM:SS. Default: a day.",
        None
    )  # fmt: skip
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
        days, dash, rest = text.rpartition("-")  # without a dash all of it is the rest
        try:
            parts = [int(part) for part in rest.split(":")]
            seconds_per_part = [3600, 60, 1] if dash or len(parts) == 3 else [60, 1]
            if len(parts) > len(seconds_per_part) or min(parts) < 0:
                raise ValueError
            # D-H and D-H:M leave the last parts out.
            seconds = sum(p * s for p, s in zip(parts, seconds_per_part, strict=False))
            seconds += int(days) * 86400 if dash else 0
        except ValueError:
            raise ValueError(f"--time {text}: give minutes or Slurm's D-HH:MM:SS") from None
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
    log_with: tuple[str, ...] | None = option_of(TrainingConfig, "log_with", None)
    plugin: Path | None = option_of(PluginConfig, "plugin", None)
    keep_going: bool = option("After a failed step, go on with those that do not need it.", True)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that one call of benchmark.py was told."""

    data: Data
    experiment: Experiment
    compute: Compute  # resolved: its numbers are known
    cluster: Cluster
    parts: Parts

    def __post_init__(self) -> None:
        if self.data.in1k_dir is None and self.experiment.eval is None:
            raise ValueError("--in1k-dir is missing: the folder with train/ and masks/")
        if self.data.dataset is None:
            raise ValueError("--ade20k-dir (or --eval-dataset FILE.yml) is missing")

    def flat(self) -> dict[str, Any]:
        """All options by name, plain: what run.yml keeps, in the form that --config reads."""
        groups = (self.data, self.experiment, self.compute, self.cluster, self.parts)
        return {name: plain(value) for group in groups for name, value in vars(group).items()}

    def notes(self) -> Iterator[str]:
        """What a user may not expect; nothing of it is wrong."""
        experiment, cluster = self.experiment, self.cluster
        rest = experiment.pretrain_epochs % experiment.eval_freq
        if experiment.eval_epochs is None and experiment.eval is None and rest:
            yield (
                f"{experiment.pretrain_epochs} epochs are not a multiple of --eval-freq "
                f"{experiment.eval_freq}: a shorter last round ends at {experiment.pretrain_epochs}"
            )
        # Only what was changed can have been meant.
        unused = [name for name, value in vars(cluster).items() if value != vars(Cluster())[name]]
        if cluster.launcher == "local" and unused:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            yield f"{flags}: only used with --launcher slurm"
        if cluster.launcher == "local" and experiment.eval is None and self.compute.scores_last:
            yield (
                "scores take fewer GPUs than pretraining, so they come after pretraining, side by "
                "side; --eval-gpus keeps some for them meanwhile"
            )
        for ratio in experiment.coverage_ratio:
            if 0 < ratio < 1:
                yield f"--coverage-ratio is in percent: {ratio} % of the image"


GROUPS = groups_of(Settings)
