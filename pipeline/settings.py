"""The settings of a benchmark: one frozen group per concern, checked when they are made.

The command line and the YAML file build them (options.py) and disappear. Everything that can be
judged without torch is judged here; what belongs to a part is judged by that part's own `--check`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

METHODS = ("patches", "segments", "four_channels", "preencoder")
METHODS_WITH_SEGMENTS = METHODS[1:]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}

# A part's options as given: name in the underscore spelling -> value as YAML has it.
Options = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images and labels are (absolute paths)."""

    in1k_dir: Path
    """Holds train/, perhaps val/ and masks/."""
    masks_dir: Path | None
    """A folder or packed store of segments; None = in1k_dir/masks."""
    eval_dataset: Path
    """An ADEChallengeData2016 folder, or the YAML file that describes a dataset."""

    def __post_init__(self) -> None:
        if not self.eval_dataset.exists():
            raise ValueError(
                f"the evaluation dataset {self.eval_dataset} does not exist; give --ade20k-dir "
                "ADEChallengeData2016 (python -m segmenter prepare makes it) "
                "or --eval-dataset FILE.yml"
            )

    def check_images(self) -> None:
        """Raise ValueError unless in1k_dir/train holds an image somewhere."""
        train = self.in1k_dir / "train"
        if not self.in1k_dir.is_dir():
            raise ValueError(f"--in1k-dir {self.in1k_dir} is not a directory")
        if not train.is_dir():
            raise ValueError(f"--in1k-dir {self.in1k_dir} has no folder train/ with the images")
        if not any(path.suffix.lower() in IMAGE_SUFFIXES for path in train.rglob("*")):
            raise ValueError(f"{train} holds no image; put class folders of images there")

    def check_segments(self, method: str) -> None:
        """Raise ValueError if `method` needs segments and there are none."""
        folder = self.masks_dir or self.in1k_dir / "masks"
        if method not in METHODS_WITH_SEGMENTS:
            return
        if not folder.exists():
            raise ValueError(
                f"--mask-method {method} needs segments, but {folder} does not exist; "
                "give --masks-dir, make them with python -m mae masks, or use patches"
            )
        if folder.is_dir() and next(folder.iterdir(), None) is None:
            raise ValueError(f"--mask-method {method} needs segments, but {folder} is empty")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is compared."""

    mask_methods: tuple[str, ...]
    """One pretraining run for each, times ratios, times seeds."""
    coverage_ratios: tuple[float, ...]
    """Wanted share of the image that is hidden, in percent; `patches` does not use it."""
    seeds: tuple[int, ...]
    """Seeds of pretraining and finetuning alike."""
    model: str
    """Encoder, such as vit_large."""
    pretrain_epochs: int
    """Length of the whole pretraining and of its learning-rate schedule."""
    eval_epochs: tuple[int, ...]
    """Epochs completed at which to evaluate, ascending; 0 = before any pretraining."""
    recipe: str
    """Finetuning recipe: a name that segmenter knows, or a YAML file."""
    stack: bool
    """Start from the official MAE checkpoint."""
    mae_checkpoint: Path | None
    """A local file in the official format; None = fetch it when it is needed."""
    eval_only: str | None
    """Evaluate just this: epochs completed as digits, "scratch" or "mae"; None = the whole plan."""

    def __post_init__(self) -> None:
        for name in ("mask_methods", "coverage_ratios", "seeds", "eval_epochs"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name.replace('_', ' ')}: {_listed(values)} names one twice")
        for method in self.mask_methods:
            if method not in METHODS:
                raise ValueError(f"unknown mask method {method!r}; known are {_listed(METHODS)}")
        for ratio in self.coverage_ratios:
            if not 0 <= ratio <= 100:
                raise ValueError(f"coverage ratio {ratio:g} is not a percentage from 0 to 100")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds {_listed(self.seeds)}: they start at 0")
        if self.pretrain_epochs < 1:
            raise ValueError(f"--pretrain-epochs {self.pretrain_epochs} has to be at least 1")
        if any(epochs < 0 or epochs > self.pretrain_epochs for epochs in self.eval_epochs):
            raise ValueError(
                f"--eval-epochs {_listed(self.eval_epochs)} has to lie within "
                f"0 and the {self.pretrain_epochs} epochs of pretraining"
            )
        if self.mae_checkpoint is not None and not self.mae_checkpoint.is_file():
            raise ValueError(f"--mae-checkpoint {self.mae_checkpoint} is not a file")
        only = self.eval_only
        if only is not None and only not in ("scratch", "mae") and not only.isdecimal():
            raise ValueError(f"--eval {only}: give epochs completed (a number), scratch or mae")


@dataclass(frozen=True, kw_only=True)
class PretrainSchedule:
    """Batch and learning rate of pretraining; always passed on, so the plan shows what is used."""

    batch_size: int = 64
    """Images per device and step."""
    effective_batch_size: int = 4096
    """Images per optimizer update, over all devices and accumulation steps."""
    base_lr: float = 1.5e-4
    """Learning rate per 256 images of effective batch."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    warmup_fraction: float = 0.05
    """Share of the whole run in which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.effective_batch_size < 1:
            raise ValueError("batch_size and effective_batch_size have to be at least 1")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction {self.warmup_fraction:g} has to lie within 0 and 1")

    @property
    def peak_lr(self) -> float:
        """The highest learning rate: base rate x effective batch / 256."""
        return self.base_lr * self.effective_batch_size / 256

    def split(self, devices: int) -> tuple[int, int]:
        """Images per device at once, and forward passes per update: at most `batch_size` at once.

        Raises ValueError if the effective batch is not a multiple of the devices.
        """
        share, rest = divmod(self.effective_batch_size, devices)
        if rest or not share:
            raise ValueError(
                f"an effective batch of {self.effective_batch_size} images cannot be split over "
                f"{devices} devices; give a multiple of {devices} (--pretrain "
                f"effective_batch_size={max(1, share + bool(rest)) * devices}) or other devices"
            )
        passes = math.ceil(share / self.batch_size)
        while share % passes:
            passes += 1
        return share // passes, passes

    def lr_at(self, progress: float) -> float:
        """Learning rate after `progress` (0 to 1) of the run: warm-up, then half a cosine."""
        if progress < self.warmup_fraction:
            return self.peak_lr * progress / self.warmup_fraction
        falling = (progress - self.warmup_fraction) / (1 - self.warmup_fraction)
        cosine = (1 + math.cos(math.pi * falling)) / 2
        return self.min_lr + (self.peak_lr - self.min_lr) * cosine


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Devices on each machine, and what may run beside each other."""

    num_gpus: int
    """GPUs for pretraining; 0 = CPU."""
    num_processes: int
    """Processes of a step: one per GPU, or gloo processes on the CPU."""
    eval_gpus: tuple[int, ...] = ()
    """GPUs kept for evaluations, which then run beside pretraining."""
    overlap: bool = False
    """Evaluations run beside pretraining (implied by eval_gpus)."""

    def __post_init__(self) -> None:
        if self.num_gpus < 0 or self.num_processes < 1:
            raise ValueError("--num-gpus starts at 0 and --num-processes at 1")
        if self.num_gpus and self.num_processes != self.num_gpus:
            raise ValueError(
                f"--num-processes {self.num_processes} with --num-gpus {self.num_gpus}: every GPU "
                "has one process; leave --num-processes out, or use --num-gpus 0 for the CPU"
            )
        if self.eval_gpus and not self.num_gpus:
            raise ValueError("--eval-gpus needs GPUs; on the CPU use --overlap")

    @property
    def overlaps(self) -> bool:
        """Whether evaluations run beside pretraining."""
        return self.overlap or bool(self.eval_gpus)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How steps reach a Slurm cluster."""

    nodes: int = 1
    gpus_per_node: int | None = None
    """None = num_gpus."""
    partition: str | None = None
    time: str | None = None
    """Limit of one job: minutes, or Slurm's D-HH:MM:SS. A job that reaches it is continued."""
    qos: str | None = None
    sbatch: Options = field(default_factory=dict)
    """Further sbatch parameters, such as {"account": "vision"}."""
    wait: bool = False
    """Follow the jobs to their end."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError("--nodes has to be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that one call of benchmark.py was told."""

    output_dir: Path
    data: Data
    experiment: Experiment
    schedule: PretrainSchedule
    compute: Compute
    cluster: Cluster
    launcher: str
    """local or slurm."""
    keep_going: bool
    """After a failed step, go on with the steps that do not need it."""
    pretrain: Options
    """Further options of python -m mae pretrain."""
    finetune: Options
    """Further options of python -m segmenter train."""

    def __post_init__(self) -> None:
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"--output-dir {self.output_dir} is a file")
        if self.experiment.eval_only is None:
            self.data.check_images()
            for method in self.experiment.mask_methods:
                self.data.check_segments(method)


def eval_points(pretrain_epochs: int, eval_freq: int) -> tuple[int, ...]:
    """Epochs at which to evaluate: every `eval_freq`, and always at the end."""
    if eval_freq < 1:
        raise ValueError(f"--eval-freq {eval_freq} has to be at least 1")
    points = list(range(eval_freq, pretrain_epochs + 1, eval_freq))
    return tuple(points) if points and points[-1] == pretrain_epochs else (*points, pretrain_epochs)


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
