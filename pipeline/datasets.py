"""Looks at data sets from outside, as far as counting, sampling and subsets go. No torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.settings import IMAGE_SUFFIXES

_ADE20K: dict[str, Any] = {
    "name": "ADE20K",
    "images": {"train": "images/training", "val": "images/validation"},
    "annotations": {"train": "annotations/training", "val": "annotations/validation"},
    "image_suffix": ".jpg",
    "annotation_suffix": ".png",
}
ADE20K_PAIRS = {"train": 20210, "val": 2000}


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def sampled(files: list[Path], count: int, seed: int = 0) -> list[Path]:
    """At most `count` of the files, the same ones each time, in their order."""
    if len(files) <= count:
        return files
    return sorted(random.Random(seed).sample(files, count))


@dataclass(frozen=True, kw_only=True)
class SegmentationData:
    """An evaluation dataset: folders of images and annotations, by split (train, val)."""

    name: str
    root: Path
    description: Mapping[str, Any]
    is_ade20k: bool

    @classmethod
    def open(cls, path: Path) -> SegmentationData:
        """Opens an ADEChallengeData2016 folder or a dataset's YAML file; ValueError otherwise."""
        if path.is_dir():
            return cls(name="ADE20K", root=path, description=_ADE20K, is_ade20k=True)
        try:
            description = yaml.safe_load(path.read_text(encoding="utf-8"))
            name = str(description["name"])
            _ = [description["images"][s] for s in ("train", "val")]
            _ = [description["annotations"][s] for s in ("train", "val")]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not describe a dataset: {error!r}") from None
        return cls(name=name, root=path.parent, description=description, is_ade20k=False)

    def pairs(self, split: str) -> Iterator[tuple[Path, Path]]:
        """Image and annotation of a split (train, val) by name; an annotation may be missing.

        Raises ValueError if the split is a list of names that cannot be read.
        """
        images = self.root / self.description["images"][split]
        annotations = self.root / self.description["annotations"][split]
        suffix = str(self.description.get("image_suffix", ".jpg"))
        annotation_suffix = str(self.description.get("annotation_suffix", ".png"))
        for name in self._names(images, suffix, split):
            yield images / f"{name}{suffix}", annotations / f"{name}{annotation_suffix}"

    def _names(self, images: Path, suffix: str, split: str) -> list[str]:
        """What the split's list names, else every image of its folder."""
        listed = (self.description.get("splits") or {}).get(split)
        if listed is None:
            files = sorted(images.rglob(f"*{suffix}"))
            return [str(file.relative_to(images)).removesuffix(suffix) for file in files]
        try:
            lines = (self.root / listed).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the list of {split} names cannot be read: {error}") from None
        return [line.strip() for line in lines if line.strip()]


def link_image_subset(in1k_dir: Path, count: int, folder: Path) -> int:
    """Makes an in1k folder with links to at most `count` training images; returns how many."""
    chosen = sampled(image_files(in1k_dir / "train"), count)
    for image in chosen:
        _link(image, folder / "train" / image.relative_to(in1k_dir / "train"))
    for name in ("val", "masks"):
        if (in1k_dir / name).exists():
            _link(in1k_dir / name, folder / name)
    return len(chosen)


def link_pair_subset(data: SegmentationData, counts: Mapping[str, int], folder: Path) -> Path:
    """Makes a dataset like `data` with at most `counts[split]` linked pairs; returns its path."""
    description = {key: value for key, value in data.description.items() if key != "splits"}
    if not data.is_ade20k:  # splits may share their folders; in the subset each has its own
        for kind in ("images", "annotations"):
            description[kind] = {split: f"{kind}/{split}" for split in counts}
    for split, count in counts.items():
        pairs = dict(data.pairs(split))
        for image in sampled(list(pairs), count):
            for kind, file in (("images", image), ("annotations", pairs[image])):
                name = file.relative_to(data.root / data.description[kind][split])
                _link(file, folder / description[kind][split] / name)
    if data.is_ade20k:
        return folder
    path = folder / "dataset.yml"
    path.write_text(yaml.safe_dump(description, sort_keys=False))
    return path


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target.resolve())
