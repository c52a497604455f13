"""How segments are made: the generators' options, and whether two stores were made alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.options import OptionGroup, fields_of, option
from common.settings import check_same
from common.yamlfile import plain


@dataclass(frozen=True, kw_only=True)
class SamSettings(OptionGroup):
    """How Segment Anything is used. The defaults are those of its `amg.py`."""

    title: ClassVar[str] = "Segment Anything"

    model: str = option(
        "SAM or SAM 2 checkpoint: a name on the Hugging Face hub, or a folder.",
        "facebook/sam-vit-huge",
    )
    points_per_side: int = option("Points along a side of the grid.", 32, at_least=1, at_most=1024)
    pred_iou_thresh: float = option("Least quality that the model predicts.", 0.88)
    stability_score_thresh: float = option(
        "Least overlap of a mask cut above and below the cutoff.", 0.95, at_least=0, at_most=1
    )
    stability_score_offset: float = option(
        "How far above and below it is cut, in logits.", 1.0, at_least=0
    )
    box_nms_thresh: float = option(
        "Of two boxes that overlap more, the one of lower quality is dropped.",
        0.7,
        at_least=0,
        at_most=1,
    )
    points_per_batch: int = option("Points at once.", 64, at_least=1)
    batch_size: int = option("Images at once.", 4, at_least=1)
    precision: Literal["auto", "bf16", "fp32"] = option("auto: bf16 on GPUs that have it.", "auto")
    device: Literal["auto", "cpu", "cuda"] = option("auto: a GPU if there is one.", "auto",
                                                    neutral=True)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FelzenszwalbSettings(OptionGroup):
    """How images are segmented by regions of similar colour."""

    title: ClassVar[str] = "Felzenszwalb"

    scales: tuple[float, ...] = option(
        "Preference for large regions; one segmentation each.", (100, 300, 1000, 3000), above=0
    )
    sigma: float = option("Width of the smoothing, in pixels of the shrunken image.", 0.8,
                          at_least=0)  # fmt: skip
    longest_side: int = option(
        "Images are shrunk to it first, in pixels; the time grows with its square.", 256,
        at_least=16,
    )  # fmt: skip
    min_coverage: float = option(
        "Smaller segments are dropped, in percent of the image.", 0.5, at_least=0, at_most=100
    )
    max_coverage: float = option(
        "Larger segments are dropped, in percent of the image.", 90.0, at_least=0, at_most=100
    )
    duplicate_iou: float = option(
        "Of two segments that overlap more, the later is dropped.", 0.85, at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_coverage >= self.max_coverage:
            raise ValueError(
                f"--min-coverage {self.min_coverage:g} has to be below --max-coverage "
                f"{self.max_coverage:g}"
            )


GENERATORS = {"sam": SamSettings, "felzenszwalb": FelzenszwalbSettings}


def as_stored(generator: str, settings: OptionGroup, **resolved: Any) -> dict[str, Any]:
    """What a store keeps of its making: each option that decides what comes out."""
    decisive = {
        name: plain(getattr(settings, name))
        for name, field in fields_of(type(settings)).items()
        if not field.spec.neutral
    }
    return {"generator": generator, **decisive, **resolved}


def check_made_alike(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError unless the segments in the store `path` were made as others are.

    Stores of earlier versions lack options that were added since: those count as their `older`.
    """
    group = GENERATORS.get(str(wanted.get("generator")))
    older = {name: field.spec.older for name, field in fields_of(group or OptionGroup).items()}
    every = {**dict.fromkeys(stored), **older, **wanted}
    remedy = "use those, remove it, or name another --out"
    check_same(stored, every, older, what=str(path), remedy=remedy)
