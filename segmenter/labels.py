"""Do annotations fit their images and classes? Looked at before any work starts. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from segmenter.dataset import NUM_CLASSES, DatasetDescription, Pair

MOST_CHECKED = 500  # pairs of a split before training; `prepare check` looks at all of them


def check_labels(
    description: DatasetDescription, pairs: Sequence[Pair], *, everything: bool
) -> None:
    """Raise ValueError about the first pair that does not fit, and how many there are.

    everything: look at all pairs, not only at MOST_CHECKED evenly spaced ones.
    """
    step = 1 if everything else max(1, len(pairs) // MOST_CHECKED)
    looked_at = pairs[::step]
    num_classes = count_classes(description)
    allowed = np.zeros(256, dtype=bool)  # what an annotation file may hold
    if description.reduce_zero_label:
        allowed[: num_classes + 1] = True
    else:
        allowed[:num_classes] = True
        allowed[description.ignore_index] = True
    with ThreadPoolExecutor() as pool:
        found = pool.map(partial(_problem_of, allowed=allowed), looked_at)
        problems = [text for text in found if text is not None]
    if problems:
        more = f" ({len(problems)} of {len(looked_at)} pairs are bad)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")


def count_classes(description: DatasetDescription) -> int:
    """How many classes there are. Raises ValueError for an unknown dataset of mmsegmentation."""
    if not isinstance(description.classes, str):
        return len(description.classes)
    if description.classes not in NUM_CLASSES:
        from segmenter.data import read_classes  # takes seconds to import

        return len(read_classes(description))
    return NUM_CLASSES[description.classes]


def _problem_of(pair: Pair, allowed: np.ndarray) -> str | None:
    try:
        _check_pair(pair, allowed)
    except ValueError as error:
        return str(error)
    return None


def _check_pair(pair: Pair, allowed: np.ndarray) -> None:
    """Raise ValueError if the files cannot be read or do not fit each other or the classes."""
    labels = read_label_file(pair.annotation)
    width, height = _image_size(pair.image)
    if labels.shape != (height, width):
        raise ValueError(
            f"{pair.annotation} is {labels.shape[1]} x {labels.shape[0]} pixels, its image "
            f"{pair.image} is {width} x {height}"
        )
    wrong = [int(label) for label in np.unique(labels) if not allowed[label]]
    if wrong:
        limits = np.flatnonzero(allowed)
        raise ValueError(
            f"{pair.annotation} holds label {wrong[0]}, which is none of the "
            f"{len(limits)} allowed ones ({limits[0]} to {limits[-1]})"
        )


def read_label_file(path: Path) -> np.ndarray:
    """[H, W] uint8 labels of an annotation or prediction. Raises ValueError."""
    with open_image(path) as file:
        if file.mode not in ("L", "P", "1", "I", "I;16"):
            raise ValueError(f"{path} is a {file.mode} image; labels have one channel")
        labels = np.asarray(file)
    if labels.size and labels.max() > 255:
        raise ValueError(f"{path} holds label {labels.max()}; at most 255 is possible")
    return labels.astype(np.uint8)


def _image_size(path: Path) -> tuple[int, int]:
    """Width and height, as decoders turn it: by the EXIF orientation."""
    with open_image(path) as file:
        turned = file.getexif().get(0x0112, 1) >= 5
        return (file.height, file.width) if turned else (file.width, file.height)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """By Pillow, whose errors become a ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with Image.open(path) as file:
            yield file
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
