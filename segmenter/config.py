"""What a finetuning and a probe are made of: options, one frozen group per concern. No torch here.

A recipe is a YAML file of the options that `segmenter`, `mae`, `upernet` and `fast` differ in: they
have no default here. What is given with a command wins over its recipe.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from common.options import (
    MOST_EPOCHS,
    MOST_SEED,
    REQUIRED,
    Layer,
    OptionGroup,
    absolute_path,
    as_arguments,
    fields_of,
    groups_of,
    make,
    merge,
    option,
    read_layer,
)
from common.step_files import OF_FINETUNING, OF_PROBES
from engine.config import DeviceConfig, OutputConfig, TrainingConfig
from engine.schedule import half_cosine, learning_rate
from engine.vit import VIT_SIZES, VitSize

RECIPES = Path(__file__).parent / "recipes"
PRESETS = Path(__file__).parent / "presets"
DEFAULT_RECIPE, OF_RECIPE = "segmenter", "default: the recipe's"
RANDOM: Literal["random"] = "random"  # an encoder that starts from nothing: timm's ViT
AUTO = "auto"  # --model of an encoder that says itself what it is
ENCODER_FORMS = "random, a file, timm:NAME|FOLDER, hf:NAME|FOLDER or FILE.py:FUNCTION"
Probe = Literal[
    "linear", "knn", "rankme", "dinov2_linear", "dinov3_linear", "capi_knn", "capi_logreg", "hummingbird"
]  # fmt: skip
Decoder = Literal["mask_transformer", "linear", "upernet"]
Normalization = Literal["imagenet", "half"]  # half: as in the first ViTs
SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou")  # percent, by their names in files
AUXILIARY_WIDTH = 256  # of the head that trains beside UPerNet, as in mmsegmentation's configs
MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # as mmsegmentation's test-time augmentation
# Ranges that several options share.
PIXELS: dict[str, Any] = {"at_least": 1, "at_most": 16384}
RATE: dict[str, Any] = {"at_least": 0, "below": 1}
SEED: dict[str, Any] = {"at_least": 0, "at_most": MOST_SEED}


# --- Encoders, by one grammar wherever one is named ---


def parse_encoder(value: Any) -> Path | str:
    """What was written: a file's path, or as it was, with an absolute path in it. ValueError.

    `random`, FILE, `timm:NAME|FOLDER`, `hf:NAME|FOLDER` (transformers), `FILE.py:FUNCTION`.
    """
    text = str(value).strip()
    library, colon, name = text.partition(":")
    if text == RANDOM:
        return RANDOM
    if colon and library in ("timm", "hf"):
        is_path = name.startswith(("/", ".", "~")) or Path(name).expanduser().is_dir()
        if not name or "\0" in name:
            raise ValueError(f"give {library}:NAME or {library}:FOLDER")
        return f"{library}:{absolute_path(name, library)}" if is_path else text
    file, colon, function = text.rpartition(":")
    if colon and file.endswith(".py"):
        if not function.isidentifier():
            raise ValueError("give FILE.py:FUNCTION")
        return f"{absolute_path(file, 'FILE.py')}:{function}"
    if colon and re.fullmatch(r"[a-z-]{2,12}", library) and not Path(text).exists():
        raise ValueError(f"there are no encoders of {library}; give {ENCODER_FORMS}")
    return absolute_path(value, "the file of an encoder")


def is_library(init: Path | str) -> bool:
    """Whether it comes from code of others: timm's, transformers', or a Python file's."""
    return not isinstance(init, Path) and init != RANDOM


def encoder_path(init: Path | str) -> Path | None:
    """The file or folder that an encoder comes from; None of one that a library fetches by name."""
    if isinstance(init, Path):
        return init
    before, _, after = init.rpartition(":")
    path = before if before.endswith(".py") else after
    return Path(path) if path.startswith("/") else None


def encoder_label(init: Path | str) -> str:
    """An encoder as files record it: without the folder, since runs and checkpoints may be moved."""
    path = encoder_path(init)
    return init.name if isinstance(init, Path) else init.replace(str(path), path.name) if path else init


def check_encoder(init: Path | str, flag: str) -> None:
    """Raise ValueError unless what it comes from is there."""
    path, is_folder = encoder_path(init), not isinstance(init, Path) and ".py:" not in init
    if path is not None and not (path.is_dir() if is_folder else path.is_file()):
        kind = "no folder" if is_folder else "is no file" if path.exists() else "does not exist"
        what = f"{path} {kind}" if not is_folder else f"there is {kind} {path}"
        raise ValueError(f"{flag} {what}; give {ENCODER_FORMS}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(OptionGroup):
    """The encoder."""

    title, no_default = "Model", OF_RECIPE
    model: str = option(
        "Size of the encoder; auto: what its file says.", "vit_large",
        choices=lambda: (*VIT_SIZES, AUTO),
    )  # fmt: skip
    patch_size: int | None = option(
        "Pixels per side of a patch. Default: the checkpoint's, else the model's.", None, **PIXELS
    )

    @property
    def encoder(self) -> VitSize:
        """Its sizes. Raises ValueError where only the encoder's file would say them."""
        if self.model == AUTO:
            raise ValueError("--model auto is for encoders that say what they are; name a size")
        return VIT_SIZES[self.model]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(EncoderConfig):
    """Encoder and decoder."""

    decoder: Decoder = option("What turns tokens into classes.")
    decoder_layers: int = option("Blocks of the mask transformer.", at_least=1, at_most=1024)
    drop_path: float = option("Stochastic depth of the encoder.", **RATE)
    dropout: float = option("Dropout of the encoder.", **RATE)
    decoder_drop_path: float = option("Stochastic depth of the decoder.", **RATE)
    decoder_dropout: float = option("Dropout of the decoder.", **RATE)


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig(OptionGroup):
    """How the weights are found, and how often they are scored."""

    title, no_default = "Optimisation", OF_RECIPE
    epochs: int = option("Epochs of the run.", at_least=1, at_most=MOST_EPOCHS)
    batch_size: int = option("Images per step, on all devices together.", at_least=1)
    optimizer: Literal["sgd", "adamw"] = option("How the weights are updated.")
    lr: float = option("Peak learning rate.", above=0)
    momentum: float = option("Momentum of SGD, first beta of AdamW.", **RATE)
    weight_decay: float = option("Of weight matrices.", at_least=0)
    layer_decay: float = option("A block's rate, by the next one's.", above=0, at_most=1)
    schedule: Literal["poly", "cosine"] = option("How the rate falls.")
    poly_power: float = option("Power of the poly schedule.", above=0)
    min_lr: float = option("Learning rate at the end.", at_least=0)
    warmup_fraction: float = option("Share of the run in which the rate rises.", **RATE)
    clip_grad: float | None = option("Largest gradient norm. Default: off.", None, above=0)
    seed: int = option("Of order, augmentation, dropout and initial weights.", 0, **SEED)
    eval_every: int = option("Epochs between evaluations; the last has one, too.", at_least=1)

    @property
    def evaluations(self) -> int:
        """How often the run is scored."""
        return -(-self.epochs // self.eval_every)

    def rate_at(self, progress: float) -> float:
        """The rate at a share of the whole run, 0 to 1."""

        def fall(done: float, whole: float) -> float:
            left = 1 - done / whole
            # The cosine by way of what is left, whose rounding every finetuning so far has had.
            return left**self.poly_power if self.schedule == "poly" else half_cosine(1 - left)

        ends = {"peak": self.lr, "least": self.min_lr}
        return learning_rate(progress, **ends, warmup_fraction=self.warmup_fraction, fall=fall)


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig(OptionGroup):
    """What decides which scores can be compared. All sizes in pixels."""

    title, no_default = "Protocol", OF_RECIPE
    image_size: int = option("Images' short side; the long one is at most 4x it.", **PIXELS)
    crop_size: int = option("Side of the training crops.", **PIXELS)
    window_size: int = option("Side of the sliding window.", **PIXELS)
    window_stride: int = option("Step of the sliding window.", **PIXELS)
    multi_scale: bool = option("Score at scales 0.5 to 1.75, each also flipped.", False)
    normalization: Normalization = option("Mean and deviation of the pixels; half: both 0.5.")

    def __post_init__(self) -> None:
        if self.window_stride > self.window_size:
            stride, size = self.window_stride, self.window_size
            raise ValueError(f"--window-stride {stride} is more than --window-size {size}")

    @property
    def scales(self) -> tuple[float, ...]:
        """Of test images, times `image_size`."""
        return MULTI_SCALES if self.multi_scale else (1.0,)

    def described(self) -> dict[str, Any]:
        """Plain values, as checkpoints, result.json and every table hold them."""
        values = dataclasses.asdict(self) | {"scales": list(self.scales), "flip": self.multi_scale}
        return {name: value for name, value in values.items() if name != "multi_scale"}

    @classmethod
    def from_described(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `described`. Raises ValueError for values that are none."""
        known = {**values, "multi_scale": values.get("flip", False)}  # both go together
        return make(cls, merge([cls], [Layer(known)]))


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(DeviceConfig):
    """Where and how images are scored."""

    eval_batch_size: int = option(
        "Images whose windows are scored together.", 4, at_least=1, neutral=True, memory=True
    )


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(OptionGroup):
    """What is trained on, and from where come the values that are not given."""

    dataset: Path = option("Folder of a known layout (ADE20K, Cityscapes, VOC, ...), or a YAML file.")
    recipe: str = option(
        "segmenter, mae, upernet, fast, or a YAML file.", DEFAULT_RECIPE,
        early=lambda name: read_recipe(name),  # its values lie below all others
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainingConfig, ScoringConfig, DatasetConfig):
    """What one finetuning starts from, where it goes and how it is kept."""

    init: Path | str = option(f"The encoder: {ENCODER_FORMS}.", parse=parse_encoder)
    device_batch_size: int | Literal["auto"] | None = option(
        "Most images per device at once; auto: by a GPU's memory. Default: no limit.", None,
        at_least=1, neutral=True, memory=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PresetConfig(OptionGroup):
    """Probes as others publish theirs."""

    preset: str | None = option(
        "Probes and sizes of a published protocol: dinov2-linear, dinov3-linear, capi, hummingbird.", None,
        early=lambda name: read_preset(name),  # its values lie below what is given, above a recipe's
    )  # fmt: skip


# PresetConfig last, since its fields come first: a preset wins over a recipe.
@dataclass(frozen=True, kw_only=True)
class ProbeRunConfig(OutputConfig, ScoringConfig, DatasetConfig, PresetConfig):
    """What is asked of a frozen encoder, and where the answers go."""

    probes: tuple[Probe, ...] = option("What is asked.", ("linear", "knn", "rankme"))
    linear_weight_decay: float | None = option(
        "Of the linear probe. Default: chosen on a fifth of the training images.", None, at_least=0
    )
    probe_steps: int | None = option("Of dinov2_linear and dinov3_linear. Default: theirs.", None, at_least=1)
    seed: int = option("Of random weights, and of the tokens that are kept.", 0, **SEED)
    image_folder: Path | None = option("Class folders, for kNN of images. Default: none.", None)
    index_dir: Path | None = option(
        "Where its images are indexed if they are in tars and their own folder cannot be written.", None,
        neutral=True,
    )  # fmt: skip


RECIPE_GROUPS: tuple[type[OptionGroup], ...] = (ModelConfig, OptimisationConfig, ProtocolConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything `python -m segmenter train` needs, by concern."""

    run: RunConfig
    model: ModelConfig
    optimisation: OptimisationConfig
    protocol: ProtocolConfig

    leaves = OF_FINETUNING  # by these names

    @property
    def init(self) -> Path | str:
        """The encoder, as `parse_encoder` has it."""
        return self.run.init

    def recipe(self) -> dict[str, Any]:
        """Name and values of the recipe, as result.json shows them."""
        values = dataclasses.asdict(self.model) | dataclasses.asdict(self.optimisation)
        for name in ("model", "patch_size", "seed"):  # stand elsewhere in result.json
            del values[name]
        return {"name": Path(self.run.recipe).stem, **values}

    def arguments(self) -> list[str]:
        """The words after `python -m segmenter train` that make this again."""
        groups = (self.run, self.model, self.optimisation, self.protocol)
        return as_arguments(*groups, below=recipe_values(self.run.recipe))


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Everything `python -m segmenter probe` needs, by concern. init: its argument."""

    init: Path | str
    run: ProbeRunConfig
    model: EncoderConfig  # no decoder, no dropout: nothing of it learns
    protocol: ProtocolConfig

    leaves = OF_PROBES

    def arguments(self) -> list[str]:
        """The words after `python -m segmenter probe` that make this again."""
        below = recipe_values(self.run.recipe)
        if self.run.preset:  # it lies above the recipe
            below |= merge(PROBE_GROUPS.values(), [read_preset(self.run.preset)])
        return [str(self.init), *as_arguments(self.run, self.model, self.protocol, below=below)]


GROUPS = groups_of(TrainConfig)
PROBE_GROUPS = {name: group for name, group in groups_of(ProbeConfig).items() if name != "init"}


def read_recipe(name: str) -> Layer:
    """A recipe, given by name or as a YAML file. Raises ValueError if it is none, or not whole."""
    path = absolute_path(name, "--recipe") if name.endswith((".yml", ".yaml")) else RECIPES / f"{name}.yml"
    if not path.is_file():
        known = ", ".join(recipe_names())
        raise ValueError(f"--recipe is {name!r}; choose one of {known}, or give a YAML file")
    layer = read_layer(path, RECIPE_GROUPS)
    needed = [n for n, field in fields_of(*RECIPE_GROUPS).items() if field.default is REQUIRED]
    missing = [name for name in needed if layer.values.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return layer


def read_preset(name: str) -> Layer:
    """A preset of probes, by name. Raises ValueError if there is none."""
    path = PRESETS / f"{str(name).replace('_', '-')}.yml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yml")))
        raise ValueError(f"--preset is {name!r}; choose one of {known}")
    return read_layer(path, PROBE_GROUPS.values())


def recipe_names() -> list[str]:
    """The recipes that are known by name."""
    return sorted(path.stem for path in RECIPES.glob("*.yml"))


def recipe_values(name: str) -> dict[str, Any]:
    """A recipe's values in the types of their options."""
    return merge(RECIPE_GROUPS, [read_recipe(name)])
