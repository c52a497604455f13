"""Images and annotations of a dataset: read, and judged whether they fit each other and the classes.

    check_split(dataset, VAL, dataset.val)
    image, labels = read_image(pair.image), read_label_file(pair.annotation, dataset)

Labels [H, W] uint8 as annotation files number them; `dataset.as_classes` numbers them anew.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from common.images import ORIENTATION, ImagePath, load_image, read_rgb, too_many
from segmenter.dataset import IGNORED, TRAIN, DatasetDescription, Pair, Split, some_of

logger = logging.getLogger(__name__)
THINNEST = 64  # an image's longer side, by the other
LOSSY = ("JPEG", "MPO", "JPEG2000")  # Pillow's names of what may change labels


class MisfitError(ValueError):
    """Labels that can be read, but are no labels of this image or dataset: never an accident."""


def check_split(
    description: DatasetDescription, split: Split, pairs: Sequence[Pair], *, most: int | None = None,
    completely: bool = False,
) -> None:  # fmt: skip
    """Raise ValueError unless the labels of a split can be trusted; name classes that never occur.

    most, completely: as `check_labels` has them.
    """
    # As annotation files number them; with a map, as it does.
    is_mapped = bool(description.label_map)
    classes = np.arange(description.num_classes) + description.reduce_zero_label
    held = check_labels(description, pairs, most=most, completely=completely)
    there = np.flatnonzero(held.any(0))
    there = np.unique(description.as_classes(there)) if is_mapped else there
    absent, ignored = np.setdiff1d(classes, there), np.setdiff1d(there, classes)
    about = f"{description.source}: {len(held)} of {len(pairs)} {split} annotations were looked at"
    if len(absent) == len(classes):
        values = " and ".join(map(str, ignored)) or "nothing"
        raise ValueError(f"{about}, and no pixel counts: {values} is all they hold, which is ignored")
    # A score of one class says nothing where another one may be hidden behind what is ignored.
    if len(absent) == len(classes) - 1 and (split == TRAIN or len(ignored)):
        (one,) = np.intersect1d(classes, there)
        hint = ""
        if len(ignored):
            meant = absent[0] if ignored[-1] == description.ignore_index else "reduce_zero_label: false"
            hint = f"; {ignored[-1]} is ignored: did you mean {meant}?"
        raise ValueError(f"{about}, and label {one} is the only class in them{hint}")
    if len(absent):
        known = description.classes  # a word: their names would take torch
        names = [str(n) if isinstance(known, str) else known[n - classes[0]] for n in absent]
        what = f"{len(absent)} of {len(classes)} classes are in none of them: {some_of(names)}"
        logger.warning("%s; %s. Means leave them out unless they are predicted", about, what)


def check_labels(
    description: DatasetDescription, pairs: Sequence[Pair], *, most: int | None = None,
    completely: bool = False,
) -> np.ndarray:  # fmt: skip
    """Which labels the annotations hold, [N, 256] bool, of the N that were looked at.

    most: so many, evenly spaced, are looked at; those that cannot be read are left to whoever will
    skip them, unless they are too many. completely: images are decoded, too. Raises ValueError
    about the first pair that does not fit, and how many there are.
    """
    looked_at = pairs[:: max(1, len(pairs) // most) if most else 1]
    judge = partial(_held_labels, description=description, completely=completely)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        found = list(pool.map(judge, looked_at))
    errors = [error for error in found if isinstance(error, ValueError)]
    misfits = [error for error in errors if isinstance(error, MisfitError)]
    is_forgiven = most is not None and not too_many(len(errors) - len(misfits), len(looked_at))
    problems = misfits if is_forgiven else errors
    if problems:
        more = f" ({len(problems)} of {len(looked_at)} pairs are bad)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")
    return np.array([held for held in found if isinstance(held, np.ndarray)], bool).reshape(-1, 256)


def _held_labels(pair: Pair, description: DatasetDescription, completely: bool) -> np.ndarray | ValueError:
    """[256] bool: those that the annotation holds; or what is wrong with the pair."""
    try:
        file = load_image(pair.image, decode=False)  # a look at the header
        orientation, size = file.getexif().get(ORIENTATION), file.size[::-1]
        turned = file.size if orientation in (5, 6, 7, 8) else size  # as `read_rgb` turns it
        if orientation in range(2, 9) and turned == size:
            raise MisfitError(
                f"{pair.image} is turned or mirrored by EXIF (orientation {orientation}), and its "
                "annotation may not be: save the image as it is to be seen"
            )
        if completely:
            read_image(pair.image)
        return np.bincount(read_labels(pair, turned, description).ravel(), minlength=256) > 0
    except ValueError as error:
        return error


def read_image(path: ImagePath) -> np.ndarray:
    """[H, W, 3] uint8 RGB. Raises ValueError, also if nothing would be left when it is scaled."""
    image = read_rgb(path)
    height, width, _ = image.shape
    if max(height, width) > THINNEST * min(height, width):
        most = f"one side may be {THINNEST} times the other"
        raise ValueError(f"{path} is {width} x {height} pixels; {most}")
    return image


def read_labels(pair: Pair, size: tuple[int, ...], description: DatasetDescription) -> np.ndarray:
    """[H, W] uint8 as the file numbers them. Raises MisfitError if they are another image's."""
    labels = read_label_file(pair.annotation, description)
    allowed = description.allowed
    if labels.shape != size:  # also of an image that EXIF turns and its annotation is not
        raise MisfitError(
            f"{pair.annotation} is {labels.shape[1]} x {labels.shape[0]} pixels, its image "
            f"{pair.image} is {size[1]} x {size[0]}"
        )
    if not allowed[labels].all():
        wrong, known = labels[~allowed[labels]].min(), _ranges(np.flatnonzero(allowed))
        raise MisfitError(f"{pair.annotation} holds label {wrong}, which is none of {known}")
    return labels


def _ranges(numbers: np.ndarray) -> str:
    """Ascending numbers in words: 0 to 10 and 255."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    said = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return " and ".join(filter(None, (", ".join(said[:-1]), said[-1])))


def read_label_file(path: Path, description: DatasetDescription) -> np.ndarray:
    """[H, W] uint8 labels of an annotation or prediction, as it numbers them. Raises ValueError."""
    file = load_image(path)
    is_lossy = file.format in LOSSY or file.info.get("compression") == "jpeg"  # a TIFF
    if is_lossy and not description.lossy_annotations:
        remedy = "give PNGs, or set lossy_annotations: true"
        raise MisfitError(f"{path} is a JPEG, whose compression changes labels; {remedy}")
    if description.colour_labels and file.mode in ("RGB", "RGBA"):
        return _labels_of_colours(np.asarray(file.convert("RGB")), description.palette)
    if file.mode not in ("L", "P", "1", "I", "I;16"):  # P: the numbers, whatever their colours
        remedy = "; colours need a palette and colour_labels: true" if file.mode in ("RGB", "RGBA") else ""
        raise MisfitError(f"{path} is a {file.mode} image; labels have one channel{remedy}")
    labels = np.asarray(file)
    outside = labels[(labels < 0) | (labels > 255)]
    if outside.size:
        raise MisfitError(f"{path} holds label {outside[0]}; 0 to 255 are possible")
    return labels.astype(np.uint8)


def _labels_of_colours(image: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """[H, W, 3] uint8 to [H, W] places in the palette; IGNORED for any other colour."""
    weights = np.array([65536, 256, 1])
    codes, known = image.astype(np.int64) @ weights, np.array(palette, np.int64) @ weights
    order = np.argsort(known)
    places = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    return np.where(known[order][places] == codes, order[places], IGNORED).astype(np.uint8)
