"""How segments are made: models, the generators' options, and whether stores were made alike.

Free of torch, so that `benchmark.py` plans with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.options import (
    Layer,
    OptionGroup,
    as_arguments,
    check_same,
    decisive_values,
    make,
    merge,
    older_values,
    option,
)

STORE_NAME = "masks.sqlite"  # of a packed store that is found by its folder
VAL = "val"  # the held-out images' folder, and what the keys of their segments begin with
SHARE: dict[str, Any] = {"at_least": 0, "at_most": 1}
PERCENT: dict[str, Any] = {"at_least": 0, "at_most": 100}

# Published checkpoints: the name on the Hugging Face hub, and the parameters in millions. All under
# Apache-2.0; SAM 3, which has a licence of its own, goes by `sam --model`.
PRESETS = {
    "sam-base": ("facebook/sam-vit-base", 94),
    "sam-large": ("facebook/sam-vit-large", 312),
    "sam-huge": ("facebook/sam-vit-huge", 641),
    "sam2-tiny": ("facebook/sam2.1-hiera-tiny", 39),
    "sam2-small": ("facebook/sam2.1-hiera-small", 46),
    "sam2-base": ("facebook/sam2.1-hiera-base-plus", 81),
    "sam2-large": ("facebook/sam2.1-hiera-large", 224),
    "edgetam": ("yonigozlan/EdgeTAM-hf", 14),
}


def default_masks(in1k_dir: Path) -> Path:
    """Where the segments of these images lie unless it is said: masks/, or masks.sqlite alone."""
    folder, store = in1k_dir / "masks", in1k_dir / STORE_NAME
    return store if store.is_file() and not folder.exists() else folder


@dataclass(frozen=True, kw_only=True)
class _CoverageSettings(OptionGroup):
    """For which coverage ratios segments are made."""

    for_coverage: tuple[float, ...] = option(
        "Make only the segments nearest to these coverages, percent. Default: all segments.", (), **PERCENT
    )


@dataclass(frozen=True, kw_only=True)
class SamSettings(_CoverageSettings):
    """How Segment Anything is used. The defaults are those of its `amg.py`."""

    title: ClassVar[str] = "Segment Anything"

    # A random crop changes the coverage by far more.
    tolerance: float = option(
        "With --for-coverage, a segment so near ends an image's search, in points.", 1.5, at_least=0
    )
    model: str = option("A name on the Hugging Face hub, or a folder.", "facebook/sam-vit-huge")
    points_per_side: int = option("Points along a side of the grid.", 32, at_least=1, at_most=1024)
    pred_iou_thresh: float = option("Least quality that the model predicts.", 0.88)
    stability_score_thresh: float = option(
        "Least overlap of a mask cut above and below the cutoff.", 0.95, **SHARE
    )
    stability_score_offset: float = option("How far off it is cut, in logits.", 1.0, at_least=0)
    box_nms_thresh: float = option(
        "Of two boxes that overlap more, the one of lower quality is dropped.", 0.7, **SHARE
    )
    points_per_batch: int = option("Points at once.", 64, at_least=1)
    batch_size: int = option("Images at once.", 4, at_least=1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto: bf16 on GPUs that have it, fp16 on others, fp32 on a CPU.", "auto"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto: a GPU if any.", "auto", neutral=True)


@dataclass(frozen=True, kw_only=True)
class FelzenszwalbSettings(_CoverageSettings):
    """How images are segmented by regions of similar colour."""

    title: ClassVar[str] = "Felzenszwalb"

    # The defaults find as much as those of before (`older`) in a fifth of the time: README.md.
    scales: tuple[float, ...] = option(
        "Preference for large regions; one segmentation each.", (60, 250, 1000), above=0,
        older=(100, 300, 1000, 3000),
    )  # fmt: skip
    sigma: float = option(
        "Width of the smoothing, in pixels of the shrunken image.", 0.5, at_least=0, older=0.8
    )
    longest_side: int = option(
        "Images are shrunk to it first, in pixels; the time grows with its square.", 144,
        at_least=16, older=256,
    )  # fmt: skip
    min_coverage: float = option("Drop segments that cover less, percent.", 0.5, **PERCENT)
    max_coverage: float = option("Drop segments that cover more, percent.", 90.0, **PERCENT)
    duplicate_iou: float = option("Of two segments that overlap more, the later is dropped.", 0.85, **SHARE)

    def __post_init__(self) -> None:
        if self.min_coverage >= self.max_coverage:
            low, high = self.min_coverage, self.max_coverage
            raise ValueError(f"--min-coverage {low:g} has to be below --max-coverage {high:g}")


# By the names of their commands; a store keeps "sam" or "felzenszwalb".
GENERATORS: dict[str, type[SamSettings] | type[FelzenszwalbSettings]] = {
    "sam": SamSettings,
    **dict.fromkeys(PRESETS, SamSettings),
    "felzenszwalb": FelzenszwalbSettings,
}


def as_stored(generator: str, settings: OptionGroup, **resolved: Any) -> dict[str, Any]:
    """What a store keeps of its making: each option that decides what comes out."""
    decisive = decisive_values(settings)
    return {"generator": generator, **decisive, "for_coverage": made_for(decisive), **resolved}


def made_for(*settings: Mapping[str, Any]) -> list[float]:
    """The coverage ratios that stores with these settings serve together; empty: every one."""
    return sorted({float(ratio) for some in settings for ratio in some.get("for_coverage", ())})


def command_of(settings: Mapping[str, Any], images: Path, out: Path, val_dir: Path | None = None) -> str:
    """The command that makes a store of folders of images with these settings."""
    name = str(settings["generator"])
    words = [name, "--images", images, "--out", out, *(["--val-dir", val_dir] if val_dir else [])]
    group = GENERATORS[name]
    made = make(group, merge([group], [Layer(settings, f"the settings of {out}")]))
    # Defaults are left out, so that people read what is special.
    return " ".join(map(str, ["python -m segments generate", *words, *as_arguments(made)]))


def check_made_alike(
    path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], *, for_any_ratio: bool = False
) -> None:
    """Raise ValueError unless the segments in the store `path` were made as others are.

    for_any_ratio: not if they were only made for other coverages; all segments are something else.
    Stores of earlier versions lack options that were added since: those count as their `older`.
    """
    if for_any_ratio and made_for(stored) and made_for(wanted):
        stored = {**stored, "for_coverage": wanted["for_coverage"]}
    # Stores that were packed from files have no generator, and no settings.
    group = GENERATORS.get(str(wanted.get("generator")))
    older = older_values(group, stored=stored) if group else {}
    every = {**dict.fromkeys(stored), **older, **wanted}
    remedy = "use those, remove it, or name another --out"
    check_same(stored, every, older, what=str(path), remedy=remedy)
