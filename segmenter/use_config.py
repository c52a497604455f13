"""Options of the commands that use a model: evaluate, predict, draw-features. No torch here."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.options import REQUIRED, OptionGroup, option, option_of
from segmenter.config import PIXELS, DatasetConfig, ProtocolConfig, parse_encoder


@dataclass(frozen=True, kw_only=True)
class ProtocolChanges(OptionGroup):
    """What a checkpoint is scored with in place of its own protocol. None: as that says."""

    # Not crop_size and normalization: what a model was trained with, it has to be scored with.
    title = "Protocol, in place of the checkpoint's"
    image_size: int | None = option_of(ProtocolConfig, "image_size", None)
    window_size: int | None = option_of(ProtocolConfig, "window_size", None)
    window_stride: int | None = option_of(ProtocolConfig, "window_stride", None)
    multi_scale: bool | None = option_of(ProtocolConfig, "multi_scale", None)

    def applied_to(self, protocol: ProtocolConfig) -> ProtocolConfig:
        """The protocol with these values; at one scale, if nothing is said. Raises ValueError."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(protocol, **{"multi_scale": False, **given})


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(OptionGroup):
    """What `evaluate` scores, and where the scores go."""

    title = "Evaluation"
    dataset: Path = option_of(DatasetConfig, "dataset", REQUIRED)
    split: Literal["train", "val", "test"] = option("Which images.", "val")
    save_predictions: Path | None = option("Folder for the label maps.", None)
    classes_by_number: bool = option("Score classes that the checkpoint calls otherwise.", False)
    predictions: Path | None = option("Score the label maps of this folder instead.", None)
    out: Path | None = option("JSON file for the scores.", None)


@dataclass(frozen=True, kw_only=True)
class PictureConfig(OptionGroup):
    """What `predict` draws."""

    title = "Pictures"
    out: Path = option("Folder for the pictures.")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(OptionGroup):
    """What `draw-features` draws."""

    title = "Pictures"
    out: Path = option("PNG file.")
    before: Path | str | None = option(
        "Another encoder, to be drawn beside it: what it was before pretraining.", None, parse=parse_encoder
    )
    size: int = option("Images' short side, in pixels.", 512, **PIXELS)
    patch: tuple[int, ...] = option(
        "Whose likeness is shown: percent from the top, from the left.", (50, 50), at_least=0, at_most=100
    )

    def __post_init__(self) -> None:
        if len(self.patch) != 2:
            raise ValueError(f"--patch is {','.join(map(str, self.patch))}; give two numbers, as 50,50")
