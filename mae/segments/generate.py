"""Making segments of a folder of images: sharded, resumable, the same however it was interrupted.

Images are put into batches before they are shared out, so that an image is always computed together
with the same others, and two shards make exactly what one run makes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator as Results
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.images import find_images, read_rgb
from mae.listing import segment_key
from mae.segments.parallel import in_order
from mae.segments.segment import Segment
from mae.segments.store import PackedImage
from mae.segments.writing import MOST_FAILED, Failure, StoreWriter, Summary, pack_image

logger = logging.getLogger(__name__)

READERS = 2  # processes that keep a GPU supplied with images
BLANK = np.zeros((8, 8, 3), np.uint8)


class Generator(Protocol):
    """What makes segments."""

    name: str
    settings: dict[str, Any]
    """What is stored with the segments."""
    batch_size: int
    """Images at once."""
    in_processes: bool
    """Whether it can be copied into one process per core."""

    def segments(self, images: list[np.ndarray]) -> list[list[Segment]]:
        """Segments of each image [H, W, 3] uint8, the smallest first."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `count`, from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `0/4`, the first of four. Raises ValueError."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(
                f"--shard {text}: write it as 0/4, the first of four; it counts from 0"
            )
        return cls(index=int(index), count=int(count))

    @classmethod
    def from_environment(cls) -> Shard:
        """What torchrun or Slurm says; the whole where neither started this process."""
        for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if index in os.environ and count in os.environ:
                return cls(index=int(os.environ[index]), count=int(os.environ[count]))
        return cls()

    def name(self, out: Path) -> Path:
        """Where this part of a store is written."""
        if self.count == 1:
            return out
        return out.with_name(f"{out.stem}-{self.index}-of-{self.count}{out.suffix}")


def generate(
    images_dir: Path, out: Path, generator: Generator, *, shard: Shard, processes: int | None
) -> Summary:
    """Make the segments of every image below a folder that are not in the packed store yet.

    Images that fail are named, recorded, and tried again by the next run. Raises ValueError if what
    is there was made with other settings, RuntimeError at the end if more than 1% failed.
    """
    paths = find_images(images_dir)
    _refuse_equal_names(paths)
    size = generator.batch_size
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    batches = batches[shard.index :: shard.count]
    total = sum(map(len, batches))
    with StoreWriter(
        shard.name(out), source=generator.name, settings=generator.settings, extend=True
    ) as writer:
        done = writer.keys()
        left = sum(segment_key(path) not in done for batch in batches for path in batch)
        logger.info("%s: %d of %d images are to be done", writer.out, left, total)
        work = _Batch(images_dir, generator, done)
        todo = [b for b in batches if any(segment_key(path) not in done for path in b)]
        with closing(work.results(todo, processes)) as results:
            summary = writer.add_all(
                results, what="generate", total=total, already_there=total - left
            )
        if summary.interrupted:
            return summary
        writer.finish()
    if summary.left_out > MOST_FAILED * total:
        raise RuntimeError(
            f"{summary.left_out} of {total} images failed, more than 1% (the others are in "
            f"{summary.out}); see the names above"
        )
    return summary


@dataclass(frozen=True)
class _Batch:
    """Reads and segments batches of paths; nothing comes of images that are done."""

    images_dir: Path
    generator: Generator
    done: set[str]

    def results(
        self, batches: Sequence[Sequence[str]], processes: int | None
    ) -> Results[list[PackedImage | Failure], None, None]:
        """In the order of the batches."""
        if self.generator.in_processes:
            yield from in_order(self.read_and_segment, batches, processes=processes, chunk=1)
        else:
            yield from map(self.segment, in_order(self.read, batches, processes=READERS, chunk=1))

    def read_and_segment(self, paths: Sequence[str]) -> list[PackedImage | Failure]:
        """Both, in whatever process."""
        return self.segment(self.read(paths))

    def read(self, paths: Sequence[str]) -> list[tuple[str, np.ndarray | Failure]]:
        """Each image by its key, or why it cannot be read."""
        images: list[tuple[str, np.ndarray | Failure]] = []
        for path in paths:
            key = segment_key(path)
            try:
                images.append((key, read_rgb(self.images_dir / path)))
            except ValueError as error:
                images.append((key, Failure(key, str(error))))
        return images

    def segment(
        self, images: Sequence[tuple[str, np.ndarray | Failure]]
    ) -> list[PackedImage | Failure]:
        """Something blank stands in for what cannot be read: the batch keeps its size."""
        pixels = [BLANK if isinstance(image, Failure) else image for _, image in images]
        found = self.generator.segments(pixels)
        return [
            image if isinstance(image, Failure) else pack_image(key, segments)
            for (key, image), segments in zip(images, found, strict=True)
            if key not in self.done
        ]


def _refuse_equal_names(paths: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(segment_key(path), path)
        if other != path:
            raise ValueError(
                f"{other} and {path} differ in their suffix only, so their segments would have "
                "the same name; rename one"
            )
