"""Making segments of a folder of images: sharded, resumable, the same however it was interrupted.

Images are put into batches before they are shared out, so that an image is always computed together
with the same others, and two shards make exactly what one run makes.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Generator as Results
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.images import find_images, read_reduced
from common.step_files import shard_path
from segments.config import check_made_alike, made_for, union
from segments.parallel import in_order
from segments.segment import Segment, ordered
from segments.store import VAL, PackedImage, PackedStore, segment_key
from segments.writing import MOST_FAILED, Failure, StoreWriter, Summary, pack_image

logger = logging.getLogger(__name__)

READERS = 2  # processes that keep a GPU supplied with images
BLANK = np.zeros((8, 8, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """An image to find segments of.

    pixels: [h, w, 3] uint8, perhaps fewer than the image's own height x width, which its segments
    have. ratios: coverages in percent to which the nearest segments are wanted; none: all segments.
    """

    key: str
    pixels: np.ndarray
    height: int
    width: int
    ratios: tuple[float, ...] = ()


class Generator(Protocol):
    """What makes segments."""

    name: str
    settings: dict[str, Any]  # what is stored with the segments
    batch_size: int  # images at once
    read_side: int  # images may be read at reduced scale, but no side shorter than this
    in_processes: bool  # whether it can be copied into one process per core
    tally: Counter[str]  # what it did so far; stays empty in processes

    def segments(self, photographs: Sequence[Photograph]) -> list[list[Segment]]:
        """Segments of each photograph, the smallest first."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `count`, from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Shard:
        """From `0/4`, the first of four; None: what torchrun or Slurm says, or else the whole.

        Raises ValueError.
        """
        what = f"--shard {text}"
        for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if text is None and os.environ.keys() >= set(names):
                text = "/".join(os.environ[name] for name in names)
                what = f"{'/'.join(names)} is {text}"
        if text is None:
            return cls()
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"{what}: write it as 0/4, the first of four; it counts from 0")
        return cls(index=int(index), count=int(count))

    def name(self, out: Path) -> Path:
        """Where this part of a store is written."""
        return shard_path(out, self.index, self.count)


def images_by_key(images_dir: Path, val_dir: Path | None) -> dict[str, Path]:
    """All images below a folder, and below that of held-out ones, by the names of their segments.

    Raises ValueError if there are none, or two of the same name.
    """
    found: dict[str, Path] = {}
    folders = {"": images_dir} | ({f"{VAL}/": val_dir} if val_dir else {})
    for prefix, folder in folders.items():
        for path in find_images(folder):
            key = segment_key(f"{prefix}{path}")
            if key in found:
                raise ValueError(
                    f"{found[key]} and {folder / path} would have segments of the same name, "
                    f"{key}; rename one"
                )
            found[key] = folder / path
    return found


def generate(
    images: Mapping[str, Path],
    out: Path,
    generator: Generator,
    *,
    shard: Shard,
    processes: int | None,
) -> Summary:
    """Make the segments of images, by key, that are not in the packed store yet.

    To a store that was made for other coverage ratios the wanted ones are added: what is there is
    kept, and read by others, until the new store is complete. Images that fail are named, recorded,
    and tried again by the next run. Raises ValueError if what is there was made with other
    settings, RuntimeError at the end if more than 1% failed.
    """
    part = shard.name(out)
    settings, base = _with_earlier_ratios(generator.settings, part if part.exists() else out)
    if base is not None:
        _refuse_missing_folders(base, images)
    work = Work(images, generator, tuple(made_for(settings)), base)
    batches = work.batches()[shard.index :: shard.count]
    total = sum(map(len, batches))
    with StoreWriter(part, source=generator.name, settings=settings, extend=base is None) as writer:
        done = writer.keys()
        todo = [batch for batch in batches if not done.issuperset(batch)]
        already_there = sum(key in done for batch in batches for key in batch)
        logger.info("%s: %d of %d images are done", writer.out, already_there, total)
        with closing(work.results(todo, processes)) as results:
            new = (result for result in results if result.key not in done)
            summary = writer.add_all(new, what="generate", total=total, already_there=already_there)
        if generator.tally:
            logger.info("%s", ", ".join(f"{n} {what}" for what, n in generator.tally.items()))
        if summary.interrupted:
            return summary
        writer.finish()
    if summary.left_out > MOST_FAILED * total:
        raise RuntimeError(
            f"{summary.left_out} of {total} images failed, more than 1% (the others are in "
            f"{summary.out}); see the names above"
        )
    return summary


def _with_earlier_ratios(
    settings: dict[str, Any], path: Path
) -> tuple[dict[str, Any], PackedStore | None]:
    """Settings with the coverage ratios of the finished store there, and it, if it lacks some."""
    store = PackedStore(path) if path.exists() else None
    known = made_for(store.settings) if store else []
    if store is None or not known or not made_for(settings):  # all segments serve every ratio
        return settings, None
    check_made_alike(path, store.settings, {**settings, "for_coverage": known})
    settings = {**settings, "for_coverage": union(known, made_for(settings))}
    return settings, None if made_for(settings) == known else store


def _refuse_missing_folders(base: PackedStore, images: Mapping[str, Path]) -> None:
    """A store to which ratios are added is made anew, of the images that are named."""
    lost = (base.images() | base.listed_empty()).difference(images)
    if lost:
        raise ValueError(
            f"{base.path} has {len(lost)} images that are not among those of --images and "
            f"--val-dir, such as {min(lost)}, and would lose them; name the same folders as then"
        )


@dataclass(frozen=True)
class Work:
    """From images, by key, to rows of a store. base: one with segments for some of the ratios."""

    images: Mapping[str, Path]
    generator: Generator
    ratios: tuple[float, ...]
    base: PackedStore | None = None

    def batches(self) -> list[list[str]]:
        """The keys of all images."""
        keys, size = list(self.images), self.generator.batch_size
        return [keys[start : start + size] for start in range(0, len(keys), size)]

    def results(
        self, batches: Sequence[Sequence[str]], processes: int | None
    ) -> Results[PackedImage | Failure, None, None]:
        """Every image of the batches, in their order."""
        found: Iterable[list[PackedImage | Failure]]
        if self.generator.in_processes:
            found = in_order(self._do, batches, processes=processes, chunk=1)
        else:
            found = map(self.segment, in_order(self.read, batches, processes=READERS, chunk=1))
        yield from chain.from_iterable(found)

    def _do(self, keys: Sequence[str]) -> list[PackedImage | Failure]:
        return self.segment(self.read(keys))

    def read(self, keys: Sequence[str]) -> list[tuple[Photograph, str]]:
        """Each image, and why it cannot be read; something blank stands in for what cannot, so that
        the batch keeps its size."""
        images = []
        for key in keys:
            pixels, size, reason = BLANK, BLANK.shape[:2], ""
            try:
                pixels, size = read_reduced(self.images[key], self.generator.read_side)
            except ValueError as error:
                reason = str(error)
            height, width = size
            image = Photograph(
                key=key, pixels=pixels, height=height, width=width, ratios=self._missing(key)
            )
            images.append((image, reason))
        return images

    def segment(self, images: Sequence[tuple[Photograph, str]]) -> list[PackedImage | Failure]:
        """The rows of each image, with those that the base has of it."""
        found = self.generator.segments([image for image, _ in images])
        return [
            Failure(image.key, reason)
            if reason
            else pack_image(image.key, ordered({*segments, *self._known(image.key)}))
            for (image, reason), segments in zip(images, found, strict=True)
        ]

    def _known(self, key: str) -> list[Segment]:
        return self.base.segments(key) if self.base else []

    def _missing(self, key: str) -> tuple[float, ...]:
        there = made_for(self.base.settings) if self.base and self._known(key) else []
        return tuple(ratio for ratio in self.ratios if ratio not in there)
