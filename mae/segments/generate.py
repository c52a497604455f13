"""Making segments of a folder of images: sharded, resumable, the same however it was interrupted.

Images are put into batches before they are shared out, so that an image is always computed together
with the same others, and two shards make exactly what one run makes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator as Results
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.images import find_images, read_rgb
from common.layout import shard_path
from mae.listing import VAL, segment_key
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
    settings: dict[str, Any]  # what is stored with the segments
    batch_size: int  # images at once
    in_processes: bool  # whether it can be copied into one process per core

    def segments(self, images: list[np.ndarray]) -> list[list[Segment]]:
        """Segments of each image [H, W, 3] uint8, the smallest first."""


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
    images_dir: Path,
    out: Path,
    generator: Generator,
    *,
    shard: Shard,
    processes: int | None,
    val_dir: Path | None = None,
) -> Summary:
    """Make the segments of every image below a folder that are not in the packed store yet.

    Images that fail are named, recorded, and tried again by the next run. Raises ValueError if what
    is there was made with other settings, RuntimeError at the end if more than 1% failed.
    """
    images = images_by_key(images_dir, val_dir)
    keys, size = list(images), generator.batch_size
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    batches = batches[shard.index :: shard.count]
    total = sum(map(len, batches))
    with StoreWriter(
        shard.name(out), source=generator.name, settings=generator.settings, extend=True
    ) as writer:
        done = writer.keys()
        todo = [batch for batch in batches if not done.issuperset(batch)]
        already_there = sum(key in done for batch in batches for key in batch)
        logger.info("%s: %d of %d images are done", writer.out, already_there, total)
        with closing(_segmented(todo, images, generator, processes)) as results:
            new = (result for result in results if result.key not in done)
            summary = writer.add_all(new, what="generate", total=total, already_there=already_there)
        if summary.interrupted:
            return summary
        writer.finish()
    if summary.left_out > MOST_FAILED * total:
        raise RuntimeError(
            f"{summary.left_out} of {total} images failed, more than 1% (the others are in "
            f"{summary.out}); see the names above"
        )
    return summary


def _segmented(
    batches: Sequence[Sequence[str]],
    images: Mapping[str, Path],
    generator: Generator,
    processes: int | None,
) -> Results[PackedImage | Failure, None, None]:
    """Every image of the batches, in their order."""
    read, segment = partial(_read, images), partial(_segment, generator)
    found: Iterable[list[PackedImage | Failure]]
    if generator.in_processes:
        found = in_order(lambda keys: segment(read(keys)), batches, processes=processes, chunk=1)
    else:
        found = map(segment, in_order(read, batches, processes=READERS, chunk=1))
    yield from chain.from_iterable(found)


def _read(files: Mapping[str, Path], keys: Sequence[str]) -> list[tuple[str, np.ndarray | str]]:
    """Each image by its key, or why it cannot be read."""
    images: list[tuple[str, np.ndarray | str]] = []
    for key in keys:
        try:
            images.append((key, read_rgb(files[key])))
        except ValueError as error:
            images.append((key, str(error)))
    return images


def _segment(
    generator: Generator, images: Sequence[tuple[str, np.ndarray | str]]
) -> list[PackedImage | Failure]:
    """Something blank stands in for what cannot be read: the batch keeps its size."""
    found = generator.segments([BLANK if isinstance(image, str) else image for _, image in images])
    return [
        Failure(key, image) if isinstance(image, str) else pack_image(key, segments)
        for (key, image), segments in zip(images, found, strict=True)
    ]
