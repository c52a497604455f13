"""How segments are made: models, the generators' options, and whether stores were made alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.made_alike import check_same
from common.options import OptionGroup, fields_of, older_values, option
from common.yamlfile import plain


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published checkpoint. model: on the Hugging Face hub; parameters: in millions."""

    model: str
    parameters: int
    licence: str


PRESETS = {
    "sam-base": Preset(model="facebook/sam-vit-base", parameters=94, licence="Apache-2.0"),
    "sam-large": Preset(model="facebook/sam-vit-large", parameters=312, licence="Apache-2.0"),
    "sam-huge": Preset(model="facebook/sam-vit-huge", parameters=641, licence="Apache-2.0"),
    "sam2-tiny": Preset(model="facebook/sam2.1-hiera-tiny", parameters=39, licence="Apache-2.0"),
    "sam2-small": Preset(model="facebook/sam2.1-hiera-small", parameters=46, licence="Apache-2.0"),
    "sam2-base": Preset(
        model="facebook/sam2.1-hiera-base-plus", parameters=81, licence="Apache-2.0"
    ),
    "sam2-large": Preset(model="facebook/sam2.1-hiera-large", parameters=224, licence="Apache-2.0"),
    "edgetam": Preset(model="yonigozlan/EdgeTAM-hf", parameters=14, licence="Apache-2.0"),
}


@dataclass(frozen=True, kw_only=True)
class _CoverageSettings(OptionGroup):
    """For which coverage ratios segments are made."""

    for_coverage: tuple[float, ...] = option(
        "Make only the segments nearest to these coverages, percent. Default: all segments.",
        (), at_least=0, at_most=100,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamSettings(_CoverageSettings):
    """How Segment Anything is used. The defaults are those of its `amg.py`."""

    title: ClassVar[str] = "Segment Anything"

    tolerance: float = option(
        "With --for-coverage, a segment so near ends an image's search, in points.", 1.5,
        at_least=0,
    )  # fmt: skip
    model: str = option(
        "Checkpoint for mask generation: a name on the Hugging Face hub, or a folder.",
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
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto: bf16 on GPUs that have it, fp16 on others, fp32 on a CPU.", "auto"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto: a GPU if there is one.", "auto",
                                                    neutral=True)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FelzenszwalbSettings(_CoverageSettings):
    """How images are segmented by regions of similar colour."""

    title: ClassVar[str] = "Felzenszwalb"

    scales: tuple[float, ...] = option(
        "Preference for large regions; one segmentation each.", (60, 250, 1000), above=0,
        older=(100, 300, 1000, 3000),
    )  # fmt: skip
    sigma: float = option("Width of the smoothing, in pixels of the shrunken image.", 0.5,
                          at_least=0, older=0.8)  # fmt: skip
    longest_side: int = option(
        "Images are shrunk to it first, in pixels; the time grows with its square.", 144,
        at_least=16, older=256,
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
        if self.min_coverage >= self.max_coverage:
            raise ValueError(
                f"--min-coverage {self.min_coverage:g} has to be below --max-coverage "
                f"{self.max_coverage:g}"
            )


# By the names of their commands; a store keeps "sam" or "felzenszwalb".
GENERATORS: dict[str, type[SamSettings] | type[FelzenszwalbSettings]] = {
    "sam": SamSettings,
    **dict.fromkeys(PRESETS, SamSettings),
    "felzenszwalb": FelzenszwalbSettings,
}


def as_stored(generator: str, settings: OptionGroup, **resolved: Any) -> dict[str, Any]:
    """What a store keeps of its making: each option that decides what comes out."""
    decisive = {
        name: plain(getattr(settings, name))
        for name, field in fields_of(type(settings)).items()
        if not field.spec.neutral
    }
    ratios = union(decisive["for_coverage"])
    return {"generator": generator, **decisive, "for_coverage": ratios, **resolved}


def union(*ratios: Sequence[float]) -> list[float]:
    """Coverage ratios as a store keeps them."""
    return sorted({float(ratio) for some in ratios for ratio in some})


def made_for(settings: Mapping[str, Any]) -> list[float]:
    """The coverage ratios that a store with these settings serves; empty: every one."""
    return union(settings.get("for_coverage", ()))


def command_of(
    settings: Mapping[str, Any], images: Path, out: Path, val_dir: Path | None = None
) -> str:
    """The command that makes a store of folders of images with these settings."""
    generator = str(settings["generator"])
    parts = [f"python -m mae masks generate {generator} --images {images} --out {out}"]
    parts += [f"--val-dir {val_dir}"] if val_dir else []
    for name, field in fields_of(GENERATORS[generator]).items():
        value = settings.get(name, plain(field.default))
        if value != plain(field.default):
            shown = ",".join(f"{item:g}" for item in value) if isinstance(value, list) else value
            parts.append(f"{field.flag} {shown}")
    return " ".join(parts)


def check_made_alike(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError unless the segments in the store `path` were made as others are.

    Stores of earlier versions lack options that were added since: those count as their `older`.
    """
    group = GENERATORS.get(str(wanted.get("generator")))
    older = older_values(group or OptionGroup)
    every = {**dict.fromkeys(stored), **older, **wanted}
    remedy = "use those, remove it, or name another --out"
    check_same(stored, every, older, what=str(path), remedy=remedy)
