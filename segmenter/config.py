"""What a finetuning run is made of, one frozen group per concern. No torch here."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Resume = Literal["auto", "never", "required"]

DECODERS = ("mask_transformer", "linear")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("poly", "cosine")
NORMALIZATIONS = ("imagenet", "half")  # half: mean and deviation 0.5, as in the first ViTs
RANDOM = "random"  # --init of a ViT that starts from nothing
LONG_SIDE_RATIO = 4  # the scale is (2048, 512) for an image size of 512
MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True, kw_only=True)
class VitSize:
    """A ViT encoder: width, depth, heads, and the patch size that belongs to it."""

    width: int
    depth: int
    heads: int
    patch_size: int = 16


VIT_SIZES: dict[str, VitSize] = {
    "vit_tiny": VitSize(width=192, depth=12, heads=3),
    "vit_small": VitSize(width=384, depth=12, heads=6),
    "vit_base": VitSize(width=768, depth=12, heads=12),
    "vit_large": VitSize(width=1024, depth=24, heads=16),
    "vit_huge": VitSize(width=1280, depth=32, heads=16, patch_size=14),
}


def _positive(group: object, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and value <= 0:
            raise ValueError(f"{_flag(name)} is {value}; give more than 0")


def _share(group: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(group, name) < 1:
            raise ValueError(f"{_flag(name)} is {getattr(group, name)}; give 0 to below 1")


def _choice(group: object, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(group, name) not in allowed:
        raise ValueError(
            f"{_flag(name)} is {getattr(group, name)!r}; choose one of {', '.join(allowed)}"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder and decoder.

    model: a key of `VIT_SIZES`; patch_size: pixels per side, None: the checkpoint's.
    decoder: mask_transformer or linear; decoder_layers: of the mask transformer.
    drop_path, dropout: of the encoder, shares from 0 to 1; decoder_drop_path, decoder_dropout.
    """

    model: str = "vit_large"
    patch_size: int | None = None
    decoder: str
    decoder_layers: int
    drop_path: float
    dropout: float
    decoder_drop_path: float
    decoder_dropout: float

    def __post_init__(self) -> None:
        _choice(self, "model", tuple(VIT_SIZES))
        _choice(self, "decoder", DECODERS)
        _positive(self, "patch_size", "decoder_layers")
        _share(self, "drop_path", "dropout", "decoder_drop_path", "decoder_dropout")

    @property
    def encoder(self) -> VitSize:
        """The encoder's sizes."""
        return VIT_SIZES[self.model]


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig:
    """How the weights are found.

    epochs: of the run; batch_size: images per step on all devices together.
    lr, min_lr: learning rate at its peak and at the end; warmup_fraction: share of the run in
    which it rises; schedule: poly (with poly_power) or cosine.
    momentum: of SGD; the first beta of AdamW. weight_decay: of weight matrices.
    layer_decay: each encoder block's rate is the next one's times this, 0 to 1; 1: all alike.
    clip_grad: largest gradient norm, None: off.
    seed: of order, augmentation, dropout and initial weights.
    """

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    layer_decay: float
    schedule: str
    poly_power: float
    min_lr: float
    warmup_fraction: float
    clip_grad: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _choice(self, "optimizer", OPTIMIZERS)
        _choice(self, "schedule", SCHEDULES)
        _positive(self, "epochs", "batch_size", "lr", "poly_power", "clip_grad")
        _share(self, "momentum", "warmup_fraction")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer-decay is {self.layer_decay}; give more than 0, at most 1")
        for name in ("min_lr", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """What decides which scores can be compared. All sizes in pixels.

    image_size: images are scaled to (4 x image_size, image_size), ratio kept, for training
    times 0.5 to 2; crop_size: side of the training crops.
    window_size, window_stride: of the sliding window at test time.
    scales, flip: test-time augmentation; (1.0,) and False: single scale.
    normalization: of the pixels: imagenet, or half (mean and deviation 0.5).
    """

    image_size: int
    crop_size: int
    window_size: int
    window_stride: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    normalization: str

    def __post_init__(self) -> None:
        _choice(self, "normalization", NORMALIZATIONS)
        _positive(self, "image_size", "crop_size", "window_size", "window_stride")
        if self.window_stride > self.window_size:
            raise ValueError(
                f"--window-stride {self.window_stride} is more than --window-size "
                f"{self.window_size}: parts of the image would not be looked at"
            )
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales are {self.scales}; give numbers above 0")

    def described(self) -> dict[str, Any]:
        """Plain values, as result.json and every table hold them."""
        return {**dataclasses.asdict(self), "scales": list(self.scales)}

    def multi_scale(self) -> ProtocolConfig:
        """The same protocol at several scales, each also flipped."""
        return dataclasses.replace(self, scales=MULTI_SCALES, flip=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How this call runs; nothing here but `init` changes the result (up to rounding).

    output_dir: where everything goes; dataset: ADEChallengeData2016 folder or a dataset's YAML.
    init: checkpoint of the encoder, or None for random weights.
    recipe: name of the recipe, for the record; eval_every: epochs between evaluations.
    eval_seeds: finetunings with different seeds.
    device_batch_size: most images per device at once, None: no limit.
    eval_batch_size: images whose windows are evaluated together.
    workers: loader processes per device, None: by the number of cores.
    save_every_minutes: also save inside an epoch; None: after epochs only.
    """

    output_dir: Path
    dataset: Path
    init: Path | None
    recipe: str
    eval_every: int
    eval_seeds: int = 1
    device_batch_size: int | None = None
    eval_batch_size: int = 4
    workers: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    resume: Resume = "auto"
    save_every_minutes: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "eval_every", "eval_seeds", "device_batch_size", "eval_batch_size")
        _positive(self, "save_every_minutes")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers is {self.workers}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything `python -m segmenter train` needs, by concern."""

    model: ModelConfig
    optimisation: OptimisationConfig
    protocol: ProtocolConfig
    run: RunConfig

    def recipe(self) -> dict[str, Any]:
        """Name and values of the recipe, as result.json shows them."""
        values = {**dataclasses.asdict(self.model), **dataclasses.asdict(self.optimisation)}
        left_out = ("model", "patch_size", "seed")
        return {
            "name": self.run.recipe,
            **{name: value for name, value in values.items() if name not in left_out},
            "eval_every": self.run.eval_every,
        }

    def settings(self) -> dict[str, Any]:
        """Plain values of all that decides the result, as checkpoints and result.json hold it."""
        return {
            **dataclasses.asdict(self.model),
            **dataclasses.asdict(self.optimisation),
            **self.protocol.described(),
            "eval_every": self.run.eval_every,
            "precision": self.run.precision,
            "init": RANDOM if self.run.init is None else self.run.init.name,
            "init_fingerprint": None if self.run.init is None else fingerprint(self.run.init),
        }


def fingerprint(path: Path, ends: int = 2**20) -> str:
    """Short digest of a file's size, first and last MiB: tells checkpoints of one name apart."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(ends))
        file.seek(max(0, size - ends))
        digest.update(file.read(ends))
    return digest.hexdigest()[:16]


def differing_settings(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`name: stored -> wanted` for every setting in which two runs differ."""
    return [
        f"{name}: {stored.get(name)} -> {value}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
