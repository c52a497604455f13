"""What a dataset consists of: folders, classes, pairs of image and annotation. No torch here.

A dataset is an ADEChallengeData2016 folder, or a YAML file whose folders are relative to it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_text
from common.folders import relative_files
from common.yamlfile import check_names, read_yaml

TRAIN, VAL = "train", "val"
SPLITS = (TRAIN, VAL)
DESCRIPTIONS = Path(__file__).parent / "datasets"
IGNORED = 255  # what mmsegmentation's reduce_zero_label makes of label 0
MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One image and its annotation. name: path within the split, without suffix."""

    name: str
    image: Path
    annotation: Path


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """A dataset as its YAML file describes it.

    source: that file, or the ADE20K folder. images, annotations: folder by split.
    splits: file with the names of a split, for splits that share a folder.
    classes: their names, or the name of an mmsegmentation dataset that knows them.
    palette: RGB 0-255 by class, empty: mmsegmentation's, or generated.
    reduce_zero_label: label 0 is ignored and label 1 is the first class.
    ignore_index: the label that is neither trained nor scored, after reduce_zero_label.
    """

    source: Path
    name: str
    images: dict[str, Path]
    annotations: dict[str, Path]
    splits: dict[str, Path]
    image_suffix: str
    annotation_suffix: str
    classes: tuple[str, ...] | str
    palette: tuple[tuple[int, int, int], ...]
    reduce_zero_label: bool
    ignore_index: int

    def __post_init__(self) -> None:
        source, index = self.source, self.ignore_index
        names = () if isinstance(self.classes, str) else self.classes
        if any(not 0 <= value <= 255 for colour in self.palette for value in colour):
            raise ValueError(f"{source}: a value of the palette is not in 0 to 255")
        if self.palette and names and len(self.palette) != len(names):
            raise ValueError(f"{source}: {len(self.palette)} colours for {len(names)} classes")
        if not isinstance(self.reduce_zero_label, bool):
            given = f"{source}: reduce_zero_label is {self.reduce_zero_label!r}"
            raise ValueError(f"{given}; give true or false")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= 255:
            raise ValueError(f"{source}: ignore_index is {index!r}; give a number from 0 to 255")
        if self.reduce_zero_label and index != IGNORED:
            raise ValueError(f"{source}: with reduce_zero_label, ignore_index has to be {IGNORED}")
        if index < len(names):
            raise ValueError(
                f"{source}: ignore_index {index} is the class {names[index]!r}, which would score "
                "0; if label 0 is no class, leave that name out and set reduce_zero_label: true"
            )

    @property
    def reads(self) -> tuple[Path, ...]:
        """The folders whose files are input."""
        return (*self.images.values(), *self.annotations.values())

    def pairs(self, split: str) -> list[Pair]:
        """Image and annotation of a split, by name. Raises ValueError that says what is missing."""
        images = self._folder(self.images, split, "images")
        annotations = self._folder(self.annotations, split, "annotations")
        names = self._names(images, split)
        if not names:
            raise ValueError(f"{self.source}: no *{self.image_suffix} in {images} ({split} images)")
        pairs = [
            Pair(
                name=name,
                image=images / f"{name}{self.image_suffix}",
                annotation=annotations / f"{name}{self.annotation_suffix}",
            )
            for name in names
        ]
        present = relative_files(annotations)
        missing = [
            pair.annotation for pair in pairs
            if f"{pair.name}{self.annotation_suffix}" not in present
        ]  # fmt: skip
        if missing:
            raise ValueError(
                f"{self.source}: {len(missing)} of {len(pairs)} {split} images have no annotation: "
                f"{_some(missing)}"
            )
        return pairs

    def _folder(self, folders: dict[str, Path], split: str, what: str) -> Path:
        if split not in folders:
            raise ValueError(f"{self.source} names no {what} for the split {split!r}")
        if not folders[split].is_dir():
            raise ValueError(
                f"{self.source}: the {split} {what} are missing: no folder {folders[split]}"
            )
        return folders[split]

    def _names(self, images: Path, split: str) -> list[str]:
        suffix = self.image_suffix
        present = relative_files(images)
        if split not in self.splits:
            return sorted(name.removesuffix(suffix) for name in present if name.endswith(suffix))
        path = self.splits[split]
        if not path.is_file():
            raise ValueError(f"{self.source}: the list of {split} names is missing: {path}")
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if len(set(names)) < len(names):
            twice = next(name for n, name in enumerate(names) if name in names[:n])
            raise ValueError(f"{path} lists {twice} twice")
        missing = [images / f"{name}{suffix}" for name in names if f"{name}{suffix}" not in present]
        if missing:
            raise ValueError(
                f"{path} lists {len(missing)} images that are not there: {_some(missing)}"
            )
        return names


def is_ade20k(folder: Path) -> bool:
    """Whether a folder looks like ADEChallengeData2016."""
    return (folder / "images").is_dir() and (folder / "annotations").is_dir()


def read_description(path: Path) -> DatasetDescription:
    """The description of an ADE20K folder or of a YAML file. Raises ValueError."""
    if path.is_dir():
        if not is_ade20k(path):
            raise ValueError(
                f"{path} is not an ADEChallengeData2016 folder (no images/ and annotations/ in it)"
                "; give one, or the .yml file of a dataset"
            )
        return _describe(read_yaml(DESCRIPTIONS / "ade20k.yml"), path, path)
    if not path.is_file():
        raise ValueError(f"the dataset {path} does not exist")
    return _describe(read_yaml(path), path, path.parent)


def _describe(content: dict[str, Any], source: Path, folder: Path) -> DatasetDescription:
    known = {field.name for field in dataclasses.fields(DatasetDescription)} - {"source"}
    check_names(content, known, str(source))
    missing = [key for key in ("images", "annotations", "classes") if not content.get(key)]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}")
    classes = content["classes"]
    if not isinstance(classes, str):
        if not isinstance(classes, list) or len(classes) < 2:
            raise ValueError(f"{source}: classes has to be a list of two or more names")
        if not all(isinstance(name, str | int | float) for name in classes):
            raise ValueError(f"{source}: classes has to be a list of names, each a word")
        classes = tuple(str(name) for name in classes)
        if len(set(classes)) < len(classes):
            raise ValueError(f"{source}: classes names one twice")
    for key in ("name", "image_suffix", "annotation_suffix"):
        if key in content and not (isinstance(content[key], str) and content[key]):
            raise ValueError(f"{source}: {key} is {content[key]!r}; give a word")
    return DatasetDescription(
        source=source,
        name=str(content.get("name", source.stem)),
        images=_folders(content, "images", source, folder),
        annotations=_folders(content, "annotations", source, folder),
        splits=_folders({"splits": {}} | content, "splits", source, folder),
        image_suffix=str(content.get("image_suffix", ".jpg")),
        annotation_suffix=str(content.get("annotation_suffix", ".png")),
        classes=classes,
        palette=_palette(content.get("palette") or [], source),
        reduce_zero_label=content.get("reduce_zero_label", False),
        ignore_index=content.get("ignore_index", IGNORED),
    )


def _folders(content: dict[str, Any], key: str, source: Path, folder: Path) -> dict[str, Path]:
    value = content[key]
    known = isinstance(value, dict) and set(value) <= set(SPLITS)
    if not known or not all(isinstance(path, str) and path for path in value.values()):
        raise ValueError(f"{source}: {key} has to name a folder for each of {', '.join(SPLITS)}")
    return {split: folder / str(path) for split, path in value.items()}


def _palette(rows: Any, source: Path) -> tuple[tuple[int, int, int], ...]:
    try:
        if not all(isinstance(value, int) for row in rows for value in row):
            raise ValueError
        return tuple((red, green, blue) for red, green, blue in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: palette has to be a list of [red, green, blue]") from error


def _some(paths: list[Path]) -> str:
    more = ", ..." if len(paths) > MOST_NAMED else ""
    return ", ".join(str(path) for path in paths[:MOST_NAMED]) + more
