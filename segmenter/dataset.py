"""What a dataset consists of: folders, pairs of image and annotation, classes. No torch here.

A dataset is an ADEChallengeData2016 folder, or a YAML file whose folders are relative to it:

    description = read_description(Path("camvid.yml"))
    pairs, classes = description.pairs("train"), read_classes(description)
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from common.files import read_text, relative_files, shortened
from common.formats import check_names, parsed_plain, read_yaml

TRAIN, VAL = "train", "val"
SPLITS = (TRAIN, VAL)
DESCRIPTIONS = Path(__file__).parent / "datasets"
IGNORED = 255  # what mmsegmentation's reduce_zero_label makes of label 0
MOST_NAMED = 3
# mmsegmentation knows their names; how many there are is asked before torch is loaded.
NUM_CLASSES = {"ADE20KDataset": 150, "CityscapesDataset": 19, "PascalContextDataset": 60}

_Word = Annotated[str, Field(min_length=1)]
_Colour = tuple[int, int, int]
_Names = str | Annotated[list[str | int | float | bool], Field(min_length=2)]
# What a description may hold, and what is said of a value of another form.
_FORMS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("name", "image_suffix", "annotation_suffix"), (_Word, "is {}; give a word")),
    **dict.fromkeys(
        ("images", "annotations", "splits"),
        (dict[Literal["train", "val"], _Word], "has to name a folder for each of train, val"),
    ),
    "classes": (_Names, "has to be a list of two or more names, each a word"),
    "palette": (tuple[_Colour, ...] | None, "has to be a list of [red, green, blue]"),
    "reduce_zero_label": (bool, "is {}; give true or false"),
    "ignore_index": (Annotated[int, Field(ge=0, le=255)], "is {}; give a number from 0 to 255"),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One image and its annotation."""

    name: str  # path within the split, without suffix
    image: Path
    annotation: Path


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """A dataset as its YAML file describes it."""

    source: Path  # that file, or the ADE20K folder
    name: str
    images: dict[str, Path]  # folder by split, as annotations
    annotations: dict[str, Path]
    splits: dict[str, Path] = field(default_factory=dict)  # files of names: splits share a folder
    image_suffix: str = ".jpg"
    annotation_suffix: str = ".png"
    classes: tuple[str, ...] | str  # a word: the mmsegmentation dataset that knows them
    palette: tuple[_Colour, ...] = ()  # RGB 0-255 by class; empty: mmsegmentation's, or generated
    reduce_zero_label: bool = False  # label 0 is ignored and label 1 is the first class
    ignore_index: int = IGNORED  # neither trained nor scored; after reduce_zero_label

    def __post_init__(self) -> None:
        source, index = self.source, self.ignore_index
        names = () if isinstance(self.classes, str) else self.classes  # else nobody knows them yet
        if len(set(names)) < len(names):
            raise ValueError(f"{source}: classes names one twice")
        if any(not 0 <= value <= 255 for colour in self.palette for value in colour):
            raise ValueError(f"{source}: a value of the palette is not in 0 to 255")
        if self.palette and names and len(self.palette) != len(names):
            raise ValueError(f"{source}: {len(self.palette)} colours for {len(names)} classes")
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
        images, annotations = (
            self._folder(folders, split, what)
            for folders, what in ((self.images, "images"), (self.annotations, "annotations"))
        )
        names = self._names(images, split)
        if not names:
            raise ValueError(f"{self.source}: no *{self.image_suffix} in {images} ({split} images)")
        missing, some = _missing(annotations, names, self.annotation_suffix)
        if missing:
            raise ValueError(
                f"{self.source}: {missing} of {len(names)} {split} images have no annotation: "
                f"{some}"
            )
        # A name may hold folders: Cityscapes has one for each city.
        return [
            Pair(
                name=name,
                image=images / f"{name}{self.image_suffix}",
                annotation=annotations / f"{name}{self.annotation_suffix}",
            )
            for name in names
        ]

    def _folder(self, folders: dict[str, Path], split: str, what: str) -> Path:
        if split not in folders:
            raise ValueError(f"{self.source} names no {what} for the split {split!r}")
        folder = folders[split]
        if not folder.is_dir():
            raise ValueError(f"{self.source}: the {split} {what} are missing: no folder {folder}")
        return folder

    def _names(self, images: Path, split: str) -> list[str]:
        suffix = self.image_suffix
        if split not in self.splits:
            found = relative_files(images)
            return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))
        path = self.splits[split]
        if not path.is_file():
            raise ValueError(f"{self.source}: the list of {split} names is missing: {path}")
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if len(set(names)) < len(names):  # an image that counts twice
            twice = next(name for n, name in enumerate(names) if name in names[:n])
            raise ValueError(f"{path} lists {twice} twice")
        missing, some = _missing(images, names, suffix)
        if missing:
            raise ValueError(f"{path} lists {missing} images that are not there: {some}")
        return names


def _missing(folder: Path, names: Sequence[str], suffix: str) -> tuple[int, str]:
    """How many files of these names are not in the folder, and some of them."""
    present = relative_files(folder)  # one listing: asking for each is slow on a file server
    missing = [f"{folder / name}{suffix}" for name in names if f"{name}{suffix}" not in present]
    more = ", ..." if len(missing) > MOST_NAMED else ""
    return len(missing), ", ".join(missing[:MOST_NAMED]) + more


def is_ade20k(folder: Path) -> bool:
    """Whether a folder looks like ADEChallengeData2016."""
    return (folder / "images").is_dir() and (folder / "annotations").is_dir()


def read_description(source: Path) -> DatasetDescription:
    """The description of an ADE20K folder or of a YAML file. Raises ValueError."""
    if source.is_dir() and not is_ade20k(source):
        raise ValueError(
            f"{source} is not an ADEChallengeData2016 folder (no images/ and annotations/ in it)"
            "; give one, or the .yml file of a dataset"
        )
    if not source.exists():
        raise ValueError(f"the dataset {source} does not exist")
    folder = source if source.is_dir() else source.parent
    content = read_yaml(DESCRIPTIONS / "ade20k.yml" if source.is_dir() else source)
    check_names(content, _FORMS, str(source))
    lacking = [key for key in ("images", "annotations", "classes") if not content.get(key)]
    if lacking:
        raise ValueError(f"{source} lacks {', '.join(lacking)}")
    values: dict[str, Any] = {"name": source.stem}
    for key, value in content.items():
        form, complaint = _FORMS[key]
        try:
            values[key] = parsed_plain(form, value, key)
        except ValueError:  # pydantic's words are about types; ours say what to write
            said = complaint.format(shortened(repr(value)))
            raise ValueError(f"{source}: {key} {said}") from None
    for key in {"images", "annotations", "splits"} & values.keys():
        values[key] = {split: folder / path for split, path in values[key].items()}
    if not isinstance(values["classes"], str):
        values["classes"] = tuple(map(str, values["classes"]))  # YAML reads some names as numbers
    values["palette"] = values.get("palette") or ()
    return DatasetDescription(source=source, **values)


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The K classes of a dataset."""

    names: tuple[str, ...]
    palette: np.ndarray  # [K, 3] uint8 RGB

    def __len__(self) -> int:
        return len(self.names)


def read_classes(description: DatasetDescription) -> Classes:
    """Names and colours: the description's own, or mmsegmentation's. Raises ValueError."""
    names: Sequence[str] = description.classes
    palette: Sequence[Sequence[int]] = description.palette
    if isinstance(description.classes, str):
        with quiet_imports():  # seconds
            import mmseg.datasets
        known = getattr(mmseg.datasets, description.classes, None)
        if known is None:
            raise ValueError(
                f"{description.source}: mmsegmentation has no dataset {description.classes}"
            )
        names = known.METAINFO["classes"]
        palette = palette or known.METAINFO["palette"]
    if not len(palette):  # the same colours in every run
        palette = np.random.default_rng(42).integers(32, 256, (len(names), 3)).tolist()
    return Classes(names=tuple(names), palette=np.array(palette, dtype=np.uint8))


def count_classes(description: DatasetDescription) -> int:
    """How many classes there are. Raises ValueError for an unknown dataset of mmsegmentation."""
    if not isinstance(description.classes, str):
        return len(description.classes)
    return NUM_CLASSES.get(description.classes) or len(read_classes(description))


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop what mmseg and mmcv say on import about optional parts that nothing here uses.

    "Could not import OneDL" comes by print, whatever the logging level; the warnings are about
    renamed modules and operations that were not compiled.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
