"""What a dataset consists of: folders, pairs of image and annotation, classes, labels. No torch.

A dataset is an ADEChallengeData2016 folder, or a YAML file whose folders are relative to it:

    dataset = read_description(Path("camvid.yml"))
    pairs, classes = dataset.train, read_classes(dataset)
"""

import contextlib
import dataclasses
import io
import statistics
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from common.files import read_text, relative_files
from common.formats import check_names, parsed_plain, read_yaml
from common.images import ORIENTATION, load_image, read_rgb, too_many

Split = Literal["train", "val"]
TRAIN: Split = "train"
VAL: Split = "val"
DESCRIPTIONS = Path(__file__).parent / "datasets"
IGNORED = 255  # what mmsegmentation's reduce_zero_label makes of label 0
# mmsegmentation knows their names; how many there are is asked before torch is loaded.
NUM_CLASSES = {"ADE20KDataset": 150, "CityscapesDataset": 19, "PascalContextDataset": 60}
MOST_NAMED = 3
MOST_CHECKED = 500  # pairs of a split before training; `prepare check` looks at all of them
THINNEST = 64  # an image's longer side, by the other

_Word = Annotated[str, Field(min_length=1)]
_Byte = Annotated[int, Field(ge=0, le=255)]
_Paths = dict[Split, Path]


class Pair(NamedTuple):
    """One image and its annotation."""

    name: str  # path within the split, without suffix
    image: Path
    annotation: Path


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """A dataset as its YAML file describes it."""

    source: Path  # that file, or the ADE20K folder
    name: _Word
    images: _Paths  # folder by split, as annotations
    annotations: _Paths
    splits: _Paths = field(default_factory=dict)  # files of names: splits share a folder
    image_suffix: _Word = ".jpg"
    annotation_suffix: _Word = ".png"
    # A word: the mmsegmentation dataset that knows them.
    classes: Annotated[tuple[_Word, ...], Field(min_length=2)] | _Word
    palette: tuple[tuple[_Byte, _Byte, _Byte], ...] = ()  # empty: mmsegmentation's, or generated
    reduce_zero_label: bool = False  # label 0 is ignored and label 1 is the first class
    ignore_index: _Byte = IGNORED  # neither trained nor scored; after reduce_zero_label

    def __post_init__(self) -> None:
        names = () if isinstance(self.classes, str) else self.classes  # else nobody knows them yet
        if len(set(names)) < len(names):
            raise ValueError(f"classes names {statistics.mode(names)!r} twice")
        if self.palette and names and len(self.palette) != len(names):
            raise ValueError(f"{len(self.palette)} colours for {len(names)} classes")
        if self.reduce_zero_label and self.ignore_index != IGNORED:
            raise ValueError(f"with reduce_zero_label, ignore_index has to be {IGNORED}")
        if self.ignore_index < len(names):
            raise ValueError(
                f"ignore_index {self.ignore_index} is the class {names[self.ignore_index]!r}; if "
                "label 0 is no class, leave that name out and set reduce_zero_label: true"
            )

    @property
    def reads(self) -> tuple[Path, ...]:
        """The folders whose files are input."""
        return (*self.images.values(), *self.annotations.values())

    @cached_property
    def num_classes(self) -> int:
        """How many there are. Raises ValueError for an unknown dataset of mmsegmentation."""
        if not isinstance(self.classes, str):
            return len(self.classes)
        return NUM_CLASSES.get(self.classes) or len(read_classes(self).names)

    @cached_property
    def train(self) -> list[Pair]:
        """What there is to train on, as `pairs` finds it."""
        return self.pairs(TRAIN)

    @cached_property
    def val(self) -> list[Pair]:
        """What is scored."""
        return self.pairs(VAL)

    @cached_property
    def allowed(self) -> np.ndarray:
        """[256] bool: which labels an annotation file may hold."""
        # An array, since indexing it by labels is the fastest way to judge every pixel. With
        # reduce_zero_label, the file's 0 stands before the classes.
        allowed = np.arange(256) < self.num_classes + self.reduce_zero_label
        if not self.reduce_zero_label:
            allowed[self.ignore_index] = True
        return allowed

    def pairs(self, split: Split) -> list[Pair]:
        """Image and annotation of a split, by name. Raises ValueError that says what is missing."""
        images, annotations = self._folder("images", split), self._folder("annotations", split)
        names = self._names(images, split)
        if not names:
            raise ValueError(f"{self.source}: no *{self.image_suffix} in {images} ({split} images)")
        complaint = f"{self.source}: {{}} of {len(names)} {split} images have no annotation"
        _refuse_missing(annotations, names, self.annotation_suffix, complaint)
        # A name may hold folders: Cityscapes has one for each city.
        ends = self.image_suffix, self.annotation_suffix
        return [Pair(n, images / f"{n}{ends[0]}", annotations / f"{n}{ends[1]}") for n in names]

    def _folder(self, what: Literal["images", "annotations"], split: Split) -> Path:
        folder = getattr(self, what).get(split)
        if folder is None or not folder.is_dir():
            missing = f"the {split} {what} are missing: no folder {folder or 'is named'}"
            raise ValueError(f"{self.source}: {missing}")
        return folder

    def _names(self, images: Path, split: Split) -> list[str]:
        path, suffix = self.splits.get(split), self.image_suffix
        if path is None:
            found = relative_files(images)
            return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))
        if not path.is_file():
            raise ValueError(f"{self.source}: the list of {split} names is missing: {path}")
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if len(set(names)) < len(names):  # an image that counts twice
            raise ValueError(f"{path} lists {statistics.mode(names)} twice")
        _refuse_missing(images, names, suffix, f"{path} lists {{}} images that are not there")
        return names


def _refuse_missing(folder: Path, names: Sequence[str], suffix: str, complaint: str) -> None:
    """Raise ValueError with the complaint, filled with how many files are missing, and some."""
    present = relative_files(folder)  # one listing: asking for each is slow on a file server
    missing = [f"{folder / name}{suffix}" for name in names if f"{name}{suffix}" not in present]
    if missing:
        some = ", ".join([*missing[:MOST_NAMED], *(["..."] if missing[MOST_NAMED:] else [])])
        raise ValueError(f"{complaint.format(len(missing))}: {some}")


def is_ade20k(folder: Path) -> bool:
    """Whether a folder looks like ADEChallengeData2016."""
    return (folder / "images").is_dir() and (folder / "annotations").is_dir()


def read_description(source: Path) -> DatasetDescription:
    """The description of an ADE20K folder or of a YAML file. Raises ValueError."""
    if source.is_dir() and not is_ade20k(source):
        text = "is not an ADEChallengeData2016 folder (no images/ and annotations/ in it); give one"
        raise ValueError(f"{source} {text}, or the .yml file of a dataset")
    if not source.exists():
        raise ValueError(f"the dataset {source} does not exist")
    folder = source if source.is_dir() else source.parent
    content = read_yaml(DESCRIPTIONS / "ade20k.yml" if source.is_dir() else source)
    known = [option.name for option in dataclasses.fields(DatasetDescription)]
    check_names(content, known[1:], str(source))  # but for the source
    given = {name: value for name, value in content.items() if value is not None}
    if isinstance(given.get("classes"), list):  # YAML reads some names as numbers
        given["classes"] = [str(n) if isinstance(n, int | float) else n for n in given["classes"]]
    values = {"source": str(source), "name": source.stem, **given}
    read = parsed_plain(DatasetDescription, values, str(source))
    paths = {
        name: {split: folder / path for split, path in getattr(read, name).items()}
        for name in ("images", "annotations", "splits")
    }
    return dataclasses.replace(read, **paths)


@dataclass(frozen=True)
class Classes:
    """The K classes of a dataset."""

    names: tuple[str, ...]
    palette: np.ndarray  # [K, 3] uint8 RGB


def read_classes(description: DatasetDescription) -> Classes:
    """Names and colours: the description's own, or mmsegmentation's. Raises ValueError."""
    names, palette = description.classes, description.palette
    if isinstance(names, str):
        with quiet_imports():  # seconds
            import mmseg.datasets
        known = getattr(mmseg.datasets, names, None)
        if known is None:
            raise ValueError(f"{description.source}: mmsegmentation has no dataset {names}")
        names = known.METAINFO["classes"]
        palette = palette or known.METAINFO["palette"]
    if not len(palette):  # the same colours in every run
        palette = np.random.default_rng(42).integers(32, 256, (len(names), 3)).tolist()
    return Classes(tuple(names), np.array(palette, dtype=np.uint8))


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop what mmseg and mmcv say on import about optional parts that nothing here uses."""
    # "Could not import OneDL" comes by print, whatever the logging level; the warnings are about
    # renamed modules and operations that were not compiled.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# --- Images and annotations: read, and judged whether they fit each other and the classes ---


class MisfitError(ValueError):
    """Labels that can be read, but are no labels of this image or dataset: never an accident."""


def check_labels(
    description: DatasetDescription, pairs: Sequence[Pair], *, most: int | None = None,
    completely: bool = False,
) -> None:  # fmt: skip
    """Raise ValueError about the first pair that does not fit, and how many there are.

    most: so many, evenly spaced, are looked at; those that cannot be read are left to whoever will
    skip them, unless they are too many. completely: images are decoded, too.
    """
    looked_at = pairs[:: max(1, len(pairs) // most) if most else 1]
    judge = partial(_problem_of, allowed=description.allowed, completely=completely)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        found = [error for error in pool.map(judge, looked_at) if error is not None]
    misfits = [error for error in found if isinstance(error, MisfitError)]
    is_forgiven = most is not None and not too_many(len(found) - len(misfits), len(looked_at))
    problems = misfits if is_forgiven else found
    if problems:
        more = f" ({len(problems)} of {len(looked_at)} pairs are bad)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")


def _problem_of(pair: Pair, allowed: np.ndarray, completely: bool) -> ValueError | None:
    try:
        if completely:
            size = read_image(pair.image).shape[:2]
        else:
            file = load_image(pair.image, decode=False)  # a look at the header
            turned = file.getexif().get(ORIENTATION) in (5, 6, 7, 8)  # as `read_rgb` turns it
            size = file.size if turned else file.size[::-1]
        read_labels(pair, size, allowed)
    except ValueError as error:
        return error
    return None


def read_image(path: Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB. Raises ValueError, also if nothing would be left when it is scaled."""
    image = read_rgb(path)
    height, width, _ = image.shape
    if max(height, width) > THINNEST * min(height, width):
        most = f"one side may be {THINNEST} times the other"
        raise ValueError(f"{path} is {width} x {height} pixels; {most}")
    return image


def read_labels(pair: Pair, size: tuple[int, ...], allowed: np.ndarray) -> np.ndarray:
    """[H, W] uint8 as the file numbers them. Raises MisfitError if they are another image's."""
    labels = read_label_file(pair.annotation)
    if labels.shape != size:  # also of an image that EXIF turns and its annotation is not
        raise MisfitError(
            f"{pair.annotation} is {labels.shape[1]} x {labels.shape[0]} pixels, its image "
            f"{pair.image} is {size[1]} x {size[0]}"
        )
    if not allowed[labels].all():
        wrong, limits = labels[~allowed[labels]].min(), np.flatnonzero(allowed)
        raise MisfitError(
            f"{pair.annotation} holds label {wrong}, which is none of the "
            f"{len(limits)} allowed ones ({limits[0]} to {limits[-1]})"
        )
    return labels


def read_label_file(path: Path) -> np.ndarray:
    """[H, W] uint8 labels of an annotation or prediction. Raises ValueError."""
    file = load_image(path)
    if file.mode not in ("L", "P", "1", "I", "I;16"):  # P: the numbers, whatever their colours
        raise MisfitError(f"{path} is a {file.mode} image; labels have one channel")
    labels = np.asarray(file)
    outside = labels[(labels < 0) | (labels > 255)]
    if outside.size:
        raise MisfitError(f"{path} holds label {outside[0]}; 0 to 255 are possible")
    return labels.astype(np.uint8)
