"""What a dataset consists of: folders, pairs of image and annotation, classes, labels. No torch.

A dataset is a folder that has the layout of one of `datasets/*.yml`, such as ADEChallengeData2016, or
a YAML file whose folders are relative to it:

    dataset = read_description(Path("camvid.yml"))
    pairs, classes = dataset.train, read_classes(dataset)
"""

import contextlib
import dataclasses
import io
import logging
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from common.files import read_text, relative_files, shortened
from common.formats import check_names, parsed_plain, read_yaml
from common.images import IMAGE_SUFFIXES, MOST_UNREADABLE, ImagePath

logger = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]
TRAIN: Split = "train"
VAL: Split = "val"
TEST: Split = "test"
DESCRIPTIONS = Path(__file__).parent / "datasets"
IGNORED = 255  # what mmsegmentation's reduce_zero_label makes of label 0
# mmsegmentation knows their names; how many there are is asked before torch is loaded.
NUM_CLASSES = {
    "ADE20KDataset": 150, "CityscapesDataset": 19, "COCOStuffDataset": 171, "PascalContextDataset": 60,
    "PascalVOCDataset": 21,
}  # fmt: skip
MOST_NAMED = 3

_Word = Annotated[str, Field(min_length=1)]
_Byte = Annotated[int, Field(ge=0, le=255)]
_Paths = dict[Split, Path]
_Suffixes = Annotated[tuple[_Word, ...], Field(min_length=1)]


class Pair(NamedTuple):
    """One image and its annotation."""

    name: str  # path within the split, without suffix
    image: ImagePath
    annotation: Path


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """A dataset as its YAML file describes it."""

    source: Path  # that file, or the ADE20K folder
    name: _Word
    images: _Paths  # folder by split, as annotations
    annotations: _Paths
    splits: _Paths = field(default_factory=dict)  # files of names: splits share a folder
    image_suffix: _Suffixes = (".jpg",)
    annotation_suffix: _Suffixes = (".png",)
    lossy_annotations: bool = False  # whether they may be JPEGs, which change labels
    colour_labels: bool = False  # annotations are RGB in the palette's colours; others are ignored
    # A word: the mmsegmentation dataset that knows them.
    classes: Annotated[tuple[_Word, ...], Field(min_length=2)] | _Word
    palette: tuple[tuple[_Byte, _Byte, _Byte], ...] = ()  # empty: mmsegmentation's, or generated
    reduce_zero_label: bool = False  # label 0 is ignored and label 1 is the first class
    ignore_index: _Byte = IGNORED  # as files number it: neither trained nor scored, nor is 255
    # Numbers of annotation files to those of classes, or to ignore_index; what it has not is ignored.
    label_map: dict[_Byte, _Byte] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = () if isinstance(self.classes, str) else self.classes  # else nobody knows them yet
        if len(set(names)) < len(names):
            raise ValueError(f"classes names {statistics.mode(names)!r} twice")
        if self.palette and names and len(self.palette) != len(names):
            raise ValueError(f"{len(self.palette)} colours for {len(names)} classes")
        if self.colour_labels and (self.reduce_zero_label or self.label_map or not self.palette):
            raise ValueError("colour_labels needs a palette, and no reduce_zero_label or label_map")
        if self.label_map and self.reduce_zero_label:
            raise ValueError("give label_map or reduce_zero_label: the one can say what the other does")
        colours = [tuple(colour) for colour in self.palette]
        if self.colour_labels and len(set(colours)) < len(colours):
            raise ValueError(f"two classes have the colour {list(statistics.mode(colours))}")
        beyond = [n for n in self.label_map.values() if names and len(names) <= n != self.ignore_index]
        if beyond:
            raise ValueError(f"label_map has the class {beyond[0]}, and there are 0 to {len(names) - 1}")
        first = int(self.reduce_zero_label)  # the first class, as annotation files number it
        ignores_a_class = first <= self.ignore_index < first + len(names)
        if ignores_a_class or (self.ignore_index < first and not self.reduce_zero_label):
            raise ValueError(
                f"ignore_index {self.ignore_index} is the class {names[self.ignore_index - first]!r}; if "
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
        if self.label_map:
            return np.ones(256, bool)
        allowed = np.arange(256) < self.num_classes + self.reduce_zero_label
        allowed[self.ignore_index] = True
        allowed[IGNORED] |= self.reduce_zero_label or self.colour_labels
        return allowed

    @property
    def ignored(self) -> int:
        """What `as_classes` makes of all labels that are ignored."""
        return (
            IGNORED if self.reduce_zero_label or self.label_map or self.colour_labels else self.ignore_index
        )

    @cached_property
    def _numbering(self) -> np.ndarray:
        """[256] uint8: from numbers of annotation files to classes."""
        numbers = np.arange(256, dtype=np.uint8)
        if self.label_map:
            numbers[:] = IGNORED
            for number, label in self.label_map.items():
                numbers[number] = IGNORED if label == self.ignore_index else label
        elif self.reduce_zero_label:  # as mmsegmentation: 0 and 255 become 255
            numbers[1:IGNORED] = numbers[: IGNORED - 1].copy()
            numbers[[0, self.ignore_index]] = IGNORED
        return numbers

    def as_classes(self, labels: np.ndarray) -> np.ndarray:
        """Labels as annotation files number them, uint8, to classes, and `ignored`."""
        return self._numbering[labels]

    @cached_property
    def file_labels(self) -> np.ndarray:
        """[K] uint8: the (first) number of each class in annotation files."""
        classes = np.arange(self.num_classes)
        return np.array([np.flatnonzero(self._numbering == n)[0] for n in classes], dtype=np.uint8)

    def pairs(self, split: Split) -> list[Pair]:
        """Image and annotation of a split, by name. Raises ValueError that says what is missing.

        What is left over on either side is named, and refused if it is more than 1% of all.
        """
        images, annotations = self._folder("images", split), self._folder("annotations", split)
        # One listing of each: asking for every file is slow on a file server.
        image_files = relative_files(images)
        by_name = _by_name(images, image_files, self.image_suffix)
        labels = _by_name(annotations, relative_files(annotations), self.annotation_suffix)
        suffixes, listed = " or ".join(self.image_suffix), self.splits.get(split)
        names = sorted(by_name) if listed is None else self._listed(listed, split)
        if absent := [f"{images / name}{suffixes}" for name in names if name not in by_name]:
            raise ValueError(f"{listed} lists {len(absent)} images that are not there: {some_of(absent)}")
        if not names:
            raise ValueError(f"{self.source}: no *{suffixes} in {images} ({split} images)")
        # A name may hold folders: Cityscapes has one for each city.
        pairs = [Pair(n, images / by_name[n], annotations / labels[n]) for n in names if n in labels]
        unlabelled = [images / by_name[name] for name in names if name not in labels]
        unpictured, others = list[Path](), list[Path]()
        if listed is None:  # else what is not listed may belong to another split
            unpictured = [annotations / file for name, file in labels.items() if name not in by_name]
            # A suffix such as _leftImg8bit.png chooses; .jpg may only have forgotten .JPG.
            if all(suffix.startswith(".") for suffix in self.image_suffix):
                pictures = (file for file in sorted(image_files) if file.lower().endswith(IMAGE_SUFFIXES))
                others = [images / file for file in pictures if not file.endswith(self.image_suffix)]
        left_over = {
            f"of {len(names)} {split} images have no annotation": unlabelled,
            f"of {len(labels)} {split} annotations have no image *{suffixes}": unpictured,
            f"images in {images} have another suffix": others,
        }
        self._judge(left_over, pairs)
        return pairs

    def _judge(self, left_over: dict[str, list[Path]], pairs: Sequence[Pair]) -> None:
        # Images and annotations may share a folder, and then the suffix of one may end the other's.
        used = {path for pair in pairs for path in (pair.image, pair.annotation)}
        names = {what: [p.name for p in paths if p not in used] for what, paths in left_over.items()}
        said = "; ".join(f"{len(some)} {what}: {some_of(some)}" for what, some in names.items() if some)
        count = sum(map(len, names.values()))
        if count > MOST_UNREADABLE * (len(pairs) + count):
            remedy = "add what is missing, move the rest away, or give more suffixes, as [.jpg, .JPG]"
            raise ValueError(f"{self.source}: {said}; {remedy}")
        if count:
            logger.warning("%s: left out: %s", self.source, said)

    def _folder(self, what: Literal["images", "annotations"], split: Split) -> Path:
        folder = getattr(self, what).get(split)
        if folder is None or not folder.is_dir():
            missing = f"the {split} {what} are missing: no folder {folder or 'is named'}"
            raise ValueError(f"{self.source}: {missing}")
        return folder

    def _listed(self, path: Path, split: Split) -> list[str]:
        """The names that a file lists."""
        if not path.is_file():
            raise ValueError(f"{self.source}: the list of {split} names is missing: {path}")
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if len(set(names)) < len(names):  # an image that counts twice
            raise ValueError(f"{path} lists {statistics.mode(names)} twice")
        return names


def _by_name(folder: Path, files: Iterable[str], suffixes: Sequence[str]) -> dict[str, str]:
    """Files by their names without a suffix. Raises ValueError if two have the same."""
    found: dict[str, str] = {}
    for file in sorted(files):
        if suffix := next((suffix for suffix in suffixes if file.endswith(suffix)), None):
            other = found.setdefault(file.removesuffix(suffix), file)
            if other != file:
                raise ValueError(f"{folder}: {other} and {file} have the same name; remove one")
    return found


def some_of(names: Sequence[str]) -> str:
    """The first of them, for a message."""
    return ", ".join([*map(shortened, names[:MOST_NAMED]), *(["..."] if names[MOST_NAMED:] else [])])


def is_ade20k(folder: Path) -> bool:
    """Whether a folder looks like ADEChallengeData2016."""
    return (folder / "images").is_dir() and (folder / "annotations").is_dir()


def _ready_description(folder: Path) -> Path:
    """The one of this project's descriptions that a folder has the layout of. Raises ValueError."""
    known, fitting = sorted(DESCRIPTIONS.glob("*.yml")), list[Path]()
    for path in known:
        content = read_yaml(path)
        parts = [content[kind]["val"] for kind in ("images", "annotations", "splits") if kind in content]
        fitting += [path] if all((folder / part).exists() for part in parts) else []
    if not fitting and is_ade20k(folder):  # not whole: what is missing will be said
        fitting = [DESCRIPTIONS / "ade20k.yml"]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(path.stem for path in fitting or known)
    text = f"has the layouts of {names}" if fitting else f"has none of the layouts of {names}"
    raise ValueError(f"{folder} {text}; copy one of {DESCRIPTIONS}/*.yml into it and give that file")


def read_description(source: Path) -> DatasetDescription:
    """The description of an ADE20K folder or of a YAML file. Raises ValueError."""
    if not source.exists():
        raise ValueError(f"the dataset {source} does not exist")
    folder = source if source.is_dir() else source.parent
    content = read_yaml(_ready_description(source) if source.is_dir() else source)
    known = [option.name for option in dataclasses.fields(DatasetDescription)]
    check_names(content, known[1:], str(source))  # but for the source
    given = {name: value for name, value in content.items() if value is not None}
    if isinstance(given.get("classes"), list):  # YAML reads some names as numbers
        given["classes"] = [str(n) if isinstance(n, int | float) else n for n in given["classes"]]
    for name in ("image_suffix", "annotation_suffix"):  # one, or several
        if isinstance(given.get(name), str):
            given[name] = [given[name]]
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
        known = getattr(getattr(mmseg.datasets, names, None), "METAINFO", {})
        if not known.get("classes"):  # a base class has none
            raise ValueError(f"{description.source}: mmsegmentation has no dataset {names} of named classes")
        names, palette = known["classes"], palette or known.get("palette") or ()
        dataclasses.replace(description, classes=names, palette=palette)  # which checks them
    if not len(palette):  # the same colours in every run
        palette = np.random.default_rng(42).integers(32, 256, (len(names), 3)).tolist()
    return Classes(tuple(names), np.array(palette, dtype=np.uint8))


def other_names(stored: Sequence[str], names: Sequence[str]) -> str:
    """What a model's stored classes are called, where that is not what the dataset says; or ""."""
    if len(stored) != len(names):
        return f"{len(stored)}, not {len(names)}"
    both = enumerate(zip(stored, names, strict=True))
    differing = [f"{n} is {had!r}, not {name!r}" for n, (had, name) in both if had != name]
    return f"{some_of(differing)} ({len(differing)} of {len(names)} differ)" if differing else ""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop what mmseg and mmcv say on import about optional parts that nothing here uses."""
    # "Could not import OneDL" comes by print, whatever the logging level; the warnings are about
    # renamed modules and operations that were not compiled.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
