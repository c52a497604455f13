"""Which of many images are looked at; and those that cannot be used: skipped, named, counted."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Sample = TypeVar("Sample")

logger = logging.getLogger(__name__)

MOST_UNREADABLE = 0.01  # share of the images; one image is forgiven in any case
MOST_IN_A_ROW = 100
MOST_NAMED = 5


def evenly_spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly spread."""
    count = min(len(items), most)
    return [items[index * len(items) // count] for index in range(count)]


def next_usable(
    load: Callable[[int], Sample], index: int, images: int
) -> tuple[Sample, tuple[str, ...]]:
    """What `load` makes of the image, or of the next one that can be used; and what was skipped.

    load: raises ValueError, which names the image. Raises RuntimeError after MOST_IN_A_ROW.
    """
    skipped: list[str] = []
    for offset in range(min(images, MOST_IN_A_ROW)):
        try:
            return load((index + offset) % images), tuple(skipped)
        except ValueError as error:
            skipped.append(str(error))
    raise RuntimeError(f"{len(skipped)} images in a row cannot be used: {skipped[0]} ...")


def too_many(unreadable: float, images: int) -> bool:
    """Whether so many of the images are more than accidents."""
    return unreadable > max(1.0, MOST_UNREADABLE * images)


class Unreadable:
    """What one process has met of them."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}  # in order

    def note(self, texts: Iterable[str]) -> None:
        """Name each image once. texts: path and reason."""
        for text in texts:
            if text not in self.texts:
                self.texts[text] = None
                logger.warning("skipped an unreadable image: %s", text)

    def check(self, unreadable: float, images: int) -> None:
        """Raise RuntimeError if too many are unreadable, over all processes."""
        if too_many(unreadable, images):
            names = ", ".join(list(self.texts)[:MOST_NAMED]) or "named by another process"
            raise RuntimeError(
                f"{unreadable:.0f} of {images} images are unreadable "
                f"(more than {MOST_UNREADABLE:.0%}): {names}"
            )
