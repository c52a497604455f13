"""Images and annotations: read, and judged whether they fit each other and the classes.

No torch here.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from common.images import ORIENTATION, load_image, read_rgb, too_many
from segmenter.dataset import DatasetDescription, Pair, count_classes

MOST_CHECKED = 500  # pairs of a split before training; `prepare check` looks at all of them
THINNEST = 64  # an image's longer side, by the other


class MisfitError(ValueError):
    """Labels that can be read, but are no labels of this image or dataset: never an accident."""


def check_labels(
    description: DatasetDescription,
    pairs: Sequence[Pair],
    *,
    most: int | None = None,
    completely: bool = False,
    forgiving: bool = False,
) -> None:
    """Raise ValueError about the first pair that does not fit, and how many there are.

    most: so many, evenly spaced, are looked at. completely: images are decoded, too. forgiving:
    files that cannot be read are left to whoever will skip them, unless they are too many.
    """
    looked_at = pairs[:: max(1, len(pairs) // most) if most else 1]
    judge = partial(_problem_of, allowed=allowed_labels(description), completely=completely)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        found = [error for error in pool.map(judge, looked_at) if error is not None]
    misfits = [error for error in found if isinstance(error, MisfitError)]
    is_forgiven = forgiving and not too_many(len(found) - len(misfits), len(looked_at))
    problems = misfits if is_forgiven else found
    if problems:
        more = f" ({len(problems)} of {len(looked_at)} pairs are bad)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")


def allowed_labels(description: DatasetDescription) -> np.ndarray:
    """[256] bool: what an annotation file may hold."""
    # An array, since indexing it by labels is the fastest way to judge every pixel.
    allowed, num_classes = np.zeros(256, dtype=bool), count_classes(description)
    allowed[: num_classes + description.reduce_zero_label] = True  # its 0 stands before them
    if not description.reduce_zero_label:
        allowed[description.ignore_index] = True
    return allowed


def read_pair(pair: Pair, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, 3] uint8 RGB and labels [H, W] uint8 as the file numbers them.

    Raises ValueError if a file cannot be read, MisfitError if they do not fit.
    """
    image = read_image(pair.image)
    return image, _fitting_labels(pair, image.shape[:2], allowed)


def read_image(path: Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB. Raises ValueError, also if nothing would be left when it is scaled."""
    image = read_rgb(path)
    height, width, _ = image.shape
    if max(height, width) > THINNEST * min(height, width):
        raise ValueError(
            f"{path} is {width} x {height} pixels; one side may be {THINNEST} times the other"
        )
    return image


def _problem_of(pair: Pair, allowed: np.ndarray, completely: bool) -> ValueError | None:
    try:
        if completely:
            read_pair(pair, allowed)
        else:
            _fitting_labels(pair, _image_size(pair.image), allowed)
    except ValueError as error:
        return error
    return None


def _fitting_labels(pair: Pair, size: tuple[int, ...], allowed: np.ndarray) -> np.ndarray:
    """The labels of an image of height x width. Raises MisfitError if they are another's."""
    labels = read_label_file(pair.annotation)
    if labels.shape != size:  # also of an image that EXIF turns and its annotation is not
        raise MisfitError(
            f"{pair.annotation} is {labels.shape[1]} x {labels.shape[0]} pixels, its image "
            f"{pair.image} is {size[1]} x {size[0]}"
        )
    if not allowed[labels].all():
        wrong = int(labels[~allowed[labels]].min())
        limits = np.flatnonzero(allowed)
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


def _image_size(path: Path) -> tuple[int, int]:
    """Height and width, as `read_rgb` turns the image: by the EXIF orientation."""
    file = load_image(path, decode=False)  # a look at the header
    lies_on_its_side = file.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return (file.width, file.height) if lies_on_its_side else (file.height, file.width)
