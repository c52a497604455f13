"""What a pretraining run is made of, one frozen group per concern. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mae.masking import METHODS, MaskingMethod

Resume = Literal["auto", "never", "required"]
IMAGE_CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class VitSize:
    """A ViT encoder: width, depth, heads, and the patch size that belongs to it."""

    width: int
    depth: int
    heads: int
    patch_size: int = 16


MODELS: dict[str, VitSize] = {
    "vit_tiny": VitSize(width=192, depth=12, heads=3),
    "vit_small": VitSize(width=384, depth=12, heads=6),
    "vit_base": VitSize(width=768, depth=12, heads=12),
    "vit_large": VitSize(width=1024, depth=24, heads=16),
    "vit_huge": VitSize(width=1280, depth=32, heads=16, patch_size=14),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images and segments come from.

    in1k_dir: folder with train/, and perhaps val/ and masks/.
    masks_dir: folder or packed store of segments; None: in1k_dir/masks.
    allow_missing_segments: go on when more than half of the images have no segment.
    use_unmasked_images: let a method without segments train on images that have none.
    val_images: at most this many images of val/ make the held-out loss.
    """

    in1k_dir: Path
    masks_dir: Path | None = None
    allow_missing_segments: bool = False
    use_unmasked_images: bool = False
    val_images: int = 2000

    def __post_init__(self) -> None:
        if self.val_images < 0:
            raise ValueError(f"--val-images is {self.val_images}; give 0 or more")

    @property
    def segments_path(self) -> Path:
        """Where the segments lie."""
        return self.masks_dir or self.in1k_dir / "masks"


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is hidden.

    mask_method: a key of `mae.masking.METHODS`.
    coverage_ratio: wanted coverage of the segment in percent of the image, 0 to 100.
    hide: the segment itself, or the background around it.
    mask_ratio: share of the patches that `patches` removes, 0 to 1.
    """

    mask_method: str = "patches"
    coverage_ratio: float = 15.0
    hide: Literal["segment", "background"] = "segment"
    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        if self.mask_method not in METHODS:
            allowed = ", ".join(METHODS)
            raise ValueError(f"--mask-method is {self.mask_method!r}; choose one of {allowed}")
        if not 0 <= self.coverage_ratio <= 100:
            raise ValueError(
                f"--coverage-ratio is {self.coverage_ratio:g}; give 0 to 100 (percent)"
            )
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"--mask-ratio is {self.mask_ratio:g}; give a share from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The masked autoencoder.

    model: a key of `MODELS`.
    image_size, patch_size: pixels per side; patch_size None: the model's own.
    decoder_width, decoder_depth, decoder_heads: of the transformer that predicts pixels.
    norm_pix_loss: each patch of the target is normalised by its own mean and deviation.
    """

    model: str = "vit_large"
    image_size: int = 224
    patch_size: int | None = None
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    norm_pix_loss: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"--model is {self.model!r}; choose one of {', '.join(MODELS)}")
        if self.patch_size is None:
            object.__setattr__(self, "patch_size", MODELS[self.model].patch_size)
        for name in ("image_size", "patch_size", "decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; give 1 or more"
                )
        if self.image_size % self.patch_pixels:
            raise ValueError(
                f"--image-size {self.image_size} is not a multiple of the patch size "
                f"{self.patch_pixels}"
            )
        for name, width in (("the model", self.encoder.width), ("the decoder", self.decoder_width)):
            if width % 4:
                raise ValueError(f"the width of {name} is {width}; it has to be a multiple of 4")
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"--decoder-width {self.decoder_width} cannot be split into "
                f"{self.decoder_heads} heads; change --decoder-heads"
            )

    @property
    def encoder(self) -> VitSize:
        """The encoder's sizes."""
        return MODELS[self.model]

    @property
    def patch_pixels(self) -> int:
        """Side of a patch in pixels."""
        assert self.patch_size is not None
        return self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_pixels) ** 2


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig:
    """AdamW over the whole run.

    epochs: of the whole run; the schedule ends there.
    warmup_fraction: share of the run in which the rate rises, 0 to 1.
    base_lr: learning rate per 256 images; min_lr: where the cosine ends.
    weight_decay: on weight matrices only; clip_grad: largest gradient norm, None: off.
    effective_batch_size: images per optimizer step, on any number of devices.
    seed: of order, augmentation, masking and initial weights.
    """

    epochs: int = 50
    warmup_fraction: float = 0.05
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    weight_decay: float = 0.05
    clip_grad: float | None = None
    effective_batch_size: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"--epochs is {self.epochs}; give 1 or more")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"--warmup-fraction is {self.warmup_fraction:g}; give 0 to below 1")
        if self.base_lr <= 0:
            raise ValueError(f"--base-lr is {self.base_lr:g}; give more than 0")
        if self.min_lr < 0 or self.weight_decay < 0:
            raise ValueError("--min-lr and --weight-decay have to be 0 or more")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(
                f"--clip-grad is {self.clip_grad:g}; give more than 0, or leave it out"
            )
        if self.effective_batch_size < 1:
            raise ValueError(
                f"--effective-batch-size is {self.effective_batch_size}; give 1 or more"
            )
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; give 0 or more")

    @property
    def learning_rate(self) -> float:
        """The peak rate: base_lr x effective batch / 256 (Goyal et al. 2017)."""
        return self.base_lr * self.effective_batch_size / 256


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How this call runs; nothing here changes the result (up to rounding).

    output_dir: where log and checkpoints go.
    stop_after: this round ends after so many epochs of the run; None: at its end.
    batch_size: most images per device and forward pass; workers: loader processes, None: by cores.
    init: official MAE checkpoint to start from; it does change the result, and is compared by name.
    save_every_minutes: also save inside an epoch; None: after epochs only.
    """

    output_dir: Path
    stop_after: int | None = None
    batch_size: int = 64
    workers: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    resume: Resume = "auto"
    save_every_minutes: float | None = None
    init: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}; give 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers is {self.workers}; give 0 or more")
        if self.save_every_minutes is not None and self.save_every_minutes <= 0:
            raise ValueError("--save-every-minutes has to be more than 0")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything `python -m mae pretrain` needs, by concern."""

    data: DataConfig
    method: MethodConfig
    model: ModelConfig
    optimisation: OptimisationConfig
    run: RunConfig

    def __post_init__(self) -> None:
        if self.epochs_this_round < 1 or self.epochs_this_round > self.optimisation.epochs:
            raise ValueError(
                f"--stop-after is {self.run.stop_after}; give 1 to the {self.optimisation.epochs} "
                "epochs of the whole run (--epochs)"
            )
        if self.data.use_unmasked_images and METHODS[self.method.mask_method].uses_segments:
            raise ValueError(
                f"--use-unmasked-images is for methods without segments; {self.method.mask_method} "
                "needs them"
            )

    @property
    def epochs_this_round(self) -> int:
        """Epochs completed when this call ends."""
        return self.optimisation.epochs if self.run.stop_after is None else self.run.stop_after

    def settings(self) -> dict[str, Any]:
        """Plain values of all that decides the result, as a checkpoint's `config` keeps them."""
        return {
            **dataclasses.asdict(self.method),
            **dataclasses.asdict(self.model),
            "in_channels": IMAGE_CHANNELS + METHODS[self.method.mask_method].extra_channels,
            **dataclasses.asdict(self.optimisation),
            "use_unmasked_images": self.data.use_unmasked_images,
            "val_images": self.data.val_images,
            "precision": self.run.precision,
            "init": self.run.init.name if self.run.init else None,
        }


def make_method(method: MethodConfig, model: ModelConfig) -> MaskingMethod:
    """The run's masking method: the only place where its name turns into an object."""
    return METHODS[method.mask_method](
        image_size=model.image_size,
        patch_size=model.patch_pixels,
        mask_ratio=method.mask_ratio,
        hide=method.hide,
    )


def parse_settings(settings: dict[str, Any]) -> tuple[MethodConfig, ModelConfig]:
    """Method and model of a checkpoint's `config`. Raises KeyError if one is missing."""
    method_names = [field.name for field in dataclasses.fields(MethodConfig)]
    model_names = [field.name for field in dataclasses.fields(ModelConfig)]
    return (
        MethodConfig(**{name: settings[name] for name in method_names}),
        ModelConfig(**{name: settings[name] for name in model_names}),
    )


def differing_settings(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`name: stored -> wanted` for every setting that would change the run of a checkpoint.

    Settings of other masking methods do not count: `patches` is the same at any coverage ratio.
    """
    idle = {name for method in METHODS.values() for name in method.settings}
    idle -= set(METHODS[wanted["mask_method"]].settings)
    return [
        f"{name}: {stored.get(name)} -> {value}"
        for name, value in wanted.items()
        if stored.get(name) != value and name not in idle
    ]
