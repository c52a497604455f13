"""What a pretraining run is made of: its options, one frozen group per concern. No torch here."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.options import (
    MOST_EPOCHS,
    MOST_SEED,
    Group,
    Layer,
    OptionGroup,
    as_arguments,
    check_same,
    groups_of,
    make,
    merge,
    older_values,
    option,
)
from engine.config import TrainingConfig
from engine.schedule import half_cosine, learning_rate
from engine.vit import IMAGE_CHANNELS, VIT_SIZES, VitSize, transformer_parameters
from mae.masking import METHODS, MaskingMethod
from segments.config import default_masks

_VARIETY = re.compile(r"fixed|nearest-(?P<count>[1-9]\d{0,3})")
AT_ONCE = 64  # images on a device
END_DIGITS = 6  # of a number of epochs: far below a step
# Whose segments are hidden: the image's, or those of a control; the first is the default.
SegmentsFrom = Literal["own", "borrowed", "blob", "block"]
# The published checkpoints, and their digests, of which the release tells the first digits.
OFFICIAL_FILES = {"vit_base": "md5:8cad7c", "vit_large": "md5:b8b06e", "vit_huge": "md5:9bdbb0"}


@dataclass(frozen=True, kw_only=True)
class DataConfig(OptionGroup):
    """Where images and segments come from."""

    title: ClassVar[str] = "Data"
    in1k_dir: Path = option("Folder with train/, and perhaps val/ and masks/.")
    masks_dir: Path | None = option(
        "Packed segments, or their folder. Default: IN1K_DIR/masks, or masks.sqlite there.", None
    )
    index_dir: Path | None = option(
        "Where images in tars are indexed if their own folder cannot be written.", None, neutral=True
    )
    allow_missing_segments: bool = option(
        "Go on if more than half of the images have no segment.", False, neutral=True
    )
    use_unmasked_images: bool = option("Train `patches` on images without segments too.", False)
    val_images: int = option("Most images of val/ for the held-out loss.", 2000, at_least=0)

    @property
    def segments_path(self) -> Path:
        """Where the segments lie."""
        return self.masks_dir or default_masks(self.in1k_dir)

    @property
    def reads(self) -> tuple[Path, ...]:
        """The folders whose files are input."""
        return (self.in1k_dir / "train", self.in1k_dir / "val", self.segments_path)


@dataclass(frozen=True, kw_only=True)
class MethodConfig(OptionGroup):
    """What is hidden."""

    title: ClassVar[str] = "Masking"
    mask_method: str = option("What is hidden from the encoder.", "patches", choices=lambda: METHODS)
    coverage_ratio: float = option(
        "Wanted coverage of the segment, percent of the image.", 15.0, at_least=0, at_most=100
    )
    hide: Literal["segment", "background"] = option("Which side of the segment.", "segment")
    segments_from: SegmentsFrom = option("Whose: the image's, another's like it, or a shape as large.", "own")
    segment_variety: str = option(
        "One for each image (fixed), or drawn in every epoch from those nearest to the ratio "
        "(nearest-K); controls likewise.", "fixed",
        # Controls were drawn anew in every epoch when there was no choice.
        older=lambda stored: "fixed" if stored.get("segments_from", "own") == "own" else "nearest-1",
    )  # fmt: skip
    segment_choice: Literal["nearest", "interior", "compact"] = option(
        "The nearest to the ratio of all segments, of those that touch one side of the image at "
        "most, or the largest island of that.", "nearest",
    )  # fmt: skip
    mask_ratio: float = option(
        "Share of the patches that is removed, where some are.", 0.75, at_least=0, below=1
    )
    noise: Literal["red", "green", "blue", "purple"] = option("Colour of green_patches' noise.", "green")

    def __post_init__(self) -> None:
        if not _VARIETY.fullmatch(self.segment_variety):
            raise ValueError(
                f"--segment-variety is {self.segment_variety!r}; give fixed, or nearest-K such as nearest-5"
            )

    @property
    def nearest_count(self) -> int | None:
        """Segments of an image of which one is drawn in each epoch; None: it is always the same."""
        found = _VARIETY.fullmatch(self.segment_variety)
        return int(found["count"]) if found and found["count"] else None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(OptionGroup):
    """The masked autoencoder."""

    title: ClassVar[str] = "Model"
    model: str = option("Size of the encoder.", "vit_large", choices=lambda: VIT_SIZES)
    image_size: int = option("Pixels per side.", 224, at_least=1, at_most=16384)
    patch_size: int | None = option("Pixels per side of a patch. Default: the model's.", None, at_least=1)
    decoder_width: int = option("Width of the decoder.", 512, at_least=1, at_most=65536)
    decoder_depth: int = option("Blocks of the decoder.", 8, at_least=1, at_most=1024)
    decoder_heads: int = option("Attention heads of the decoder.", 16, at_least=1)
    norm_pix_loss: bool = option("Normalise each patch of the target by itself.", False)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_pixels:
            raise ValueError(
                f"--image-size {self.image_size} is not a multiple of the patch size {self.patch_pixels}"
            )
        # Sines and cosines of rows and columns share the width of the positions.
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
        return VIT_SIZES[self.model]

    @property
    def patch_pixels(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_size or self.encoder.patch_size

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_pixels) ** 2

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: fp32 weights and AdamW's two moments."""
        patch_values = self.patch_pixels**2 * IMAGE_CHANNELS
        parameters = (
            transformer_parameters(self.encoder.width, self.encoder.depth)
            + transformer_parameters(self.decoder_width, self.decoder_depth)
            + (self.encoder.width + self.decoder_width) * (patch_values + self.num_patches)
        )
        return 12 * parameters  # three fp32 numbers of each


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig(OptionGroup):
    """AdamW over the whole run."""

    title: ClassVar[str] = "Optimisation"
    epochs: int = option(
        "Epochs of the whole run; the schedule ends there.", 50, at_least=1, at_most=MOST_EPOCHS
    )
    last_epoch: float = option(
        "Share of the last epoch that is trained, where a budget ends within it.", 1.0, above=0, at_most=1
    )
    warmup_fraction: float = option("Share of the run in which the rate rises.", 0.05, at_least=0, below=1)
    base_lr: float = option("Learning rate per 256 images.", 1.5e-4, above=0)
    min_lr: float = option("Learning rate at the end.", 0.0, at_least=0)
    weight_decay: float = option("Of weight matrices; biases and norms have none.", 0.05, at_least=0)
    clip_grad: float | None = option("Largest gradient norm. Default: off.", None, above=0)
    effective_batch_size: int = option(
        "Images per optimizer step, on any number of devices.", 4096, at_least=1
    )
    seed: int = option(
        "Of order, augmentation, masking and initial weights.", 0, at_least=0, at_most=MOST_SEED
    )

    @property
    def end(self) -> float:
        """Epochs that are trained, the last one by its share; of so many digits that it comes back."""
        return round(self.epochs - 1 + self.last_epoch, END_DIGITS)

    @property
    def learning_rate(self) -> float:
        """The peak rate: base_lr x effective batch / 256 (Goyal et al. 2017)."""
        return self.base_lr * self.effective_batch_size / 256

    def rate_at(self, progress: float) -> float:
        """The rate at a share of the whole run, 0 to 1."""
        return learning_rate(
            progress, peak=self.learning_rate, least=self.min_lr,
            warmup_fraction=self.warmup_fraction, fall=half_cosine,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainingConfig):
    """How this call runs; nothing here but `init` changes the result (up to rounding)."""

    init: Path | None = option("Official MAE checkpoint to start from.", None)
    stop_after: int | None = option(
        "End this round after so many epochs of the run. Default: at its end.", None, neutral=True
    )
    batch_size: int | Literal["auto"] = option(
        "Most images per device at once; auto: by a GPU's memory.", AT_ONCE,
        at_least=1, neutral=True, memory=True,
    )  # fmt: skip

    @property
    def most_at_once(self) -> int:
        """The same where there is no GPU to measure."""
        return AT_ONCE if self.batch_size == "auto" else self.batch_size


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything `python -m mae pretrain` needs, by concern."""

    data: DataConfig
    method: MethodConfig
    model: ModelConfig
    optimisation: OptimisationConfig
    run: RunConfig

    def __post_init__(self) -> None:
        if not 0 <= self.epochs_this_round <= self.optimisation.epochs:
            raise ValueError(
                f"--stop-after is {self.run.stop_after}; give 0 (the model as it starts) to the "
                f"{self.optimisation.epochs} epochs of the whole run (--epochs)"
            )
        if self.data.use_unmasked_images and METHODS[self.method.mask_method].uses_segments:
            raise ValueError(
                f"--use-unmasked-images is for methods without segments; {self.method.mask_method} needs them"
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
            "patch_size": self.model.patch_pixels,
            "in_channels": IMAGE_CHANNELS + METHODS[self.method.mask_method].extra_channels,
            **dataclasses.asdict(self.optimisation),
            "use_unmasked_images": self.data.use_unmasked_images,
            "val_images": self.data.val_images,
            "precision": self.run.precision,
            "init": self.run.init.name if self.run.init else None,
        }

    def check_same(self, stored: Mapping[str, Any], path: Path) -> None:
        """Raise ValueError naming the settings in which the run differs from its checkpoint's.

        Settings of other masking methods do not count: `patches` is the same at any coverage ratio.
        """
        idle = idle_settings(self.method.mask_method)
        wanted = {name: value for name, value in self.settings().items() if name not in idle}
        check_same(stored, wanted, older_values(*GROUPS.values(), stored=stored), what=str(path))

    def arguments(self) -> list[str]:
        """The words after `python -m mae pretrain` that make this again."""
        return as_arguments(self.data, self.method, self.model, self.optimisation, self.run)


GROUPS = groups_of(PretrainConfig)


def idle_settings(mask_method: str | None) -> set[str]:
    """Settings that matter to other masking methods only; none for a method that is not known."""
    if mask_method not in METHODS:
        return set()
    every = {name for method in METHODS.values() for name in method.settings}
    return every - set(METHODS[mask_method].settings)


def make_method(method: MethodConfig, model: ModelConfig) -> MaskingMethod:
    """The run's masking method: the only place where its name turns into an object."""
    return METHODS[method.mask_method](
        image_size=model.image_size,
        patch_size=model.patch_pixels,
        mask_ratio=method.mask_ratio,
        hide=method.hide,
        noise=method.noise,
    )


def training_flops(config: ModelConfig, method: MaskingMethod) -> float:
    """Floating-point operations of one image's forward and backward pass, by its matrix products.

    Twice the multiply-adds, and the backward pass counted as two forward passes, as is usual for
    model FLOPs utilisation (Chowdhery et al. 2022, appendix B).
    """
    kept = method.num_kept
    encoder, patch_values = config.encoder, config.patch_pixels**2 * IMAGE_CHANNELS
    forward = (
        _transformer_flops(kept + 1, encoder.width, encoder.depth)
        + _transformer_flops(config.num_patches + 1, config.decoder_width, config.decoder_depth)
        + 2 * patch_values * (kept * encoder.width + config.num_patches * config.decoder_width)
        + 2 * (kept + 1) * encoder.width * config.decoder_width
        + 2 * config.image_size**2 * method.preencoder_weights(IMAGE_CHANNELS)  # each at every pixel
    )
    return 3.0 * forward


def _transformer_flops(tokens: int, width: int, depth: int) -> int:
    """Forward pass of `depth` blocks: 12 width^2 weights each, and tokens x tokens attention."""
    return depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


def parse_group(group: type[Group], settings: Mapping[str, Any], path: Path) -> Group:
    """A group from the `config` of the checkpoint at `path`, also of an earlier version.

    Raises ValueError if it holds what is not known here, such as a method of a plugin.
    """
    return make(
        group, merge([group], [Layer(older_values(group, stored=settings)), Layer(settings, str(path))])
    )
