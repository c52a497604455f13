"""Making segments of a folder of images: sharded, resumable, the same however it was interrupted.

Images are put into batches before they are shared out, so that an image is always computed together
with the same others, and two shards make exactly what one run makes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator as Outcomes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mae.interruption import Interruption
from mae.listing import find_images, segment_key
from mae.segments.images import read_rgb
from mae.segments.pack import MOST_DAMAGED, Failure
from mae.segments.parallel import in_order
from mae.segments.progress import Progress
from mae.segments.segment import Segment
from mae.segments.sinks import FolderSink, StoreSink
from mae.segments.writing import Summary

logger = logging.getLogger(__name__)

STORE_SUFFIXES = {".sqlite", ".sqlite3", ".db"}
BLANK = np.zeros((8, 8, 3), np.uint8)


class Generator(Protocol):
    """What makes segments."""

    name: str
    batch_size: int
    """Images at once."""
    in_processes: bool
    """Whether it can be copied into one process per core."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is stored with the segments."""

    def segments(self, images: list[np.ndarray]) -> list[list[Segment]]:
        """Segments of each image [H, W, 3] uint8, the smallest first."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `count`, from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"--shard {self.index}/{self.count}: the first number counts from 0 and has to be "
                "below the second"
            )

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
    images_dir: Path, out: Path, generator: Generator, *, shard: Shard, processes: int
) -> Summary:
    """Make the segments of every image below a folder that are not there yet.

    out: a packed store if its suffix is .sqlite, else a folder of RLE JSON. Images that fail are
    named, recorded, and tried again by the next run. Raises ValueError if what is there was made
    with other settings, RuntimeError at the end if more than 1% failed.
    """
    relative_paths = find_images(images_dir)
    _refuse_equal_names(relative_paths)
    size = generator.batch_size
    batches = [
        relative_paths[start : start + size] for start in range(0, len(relative_paths), size)
    ]
    batches = batches[shard.index :: shard.count]
    sink: StoreSink | FolderSink
    if out.suffix in STORE_SUFFIXES:
        sink = StoreSink(shard.name(out), generator.name, generator.settings)
    else:
        sink = FolderSink(out, generator.settings, shard.name(Path("failed.txt")).name)
    done = sink.done()
    todo = [b for b in batches if any(segment_key(path) not in done for path in b)]
    total = sum(map(len, batches))
    left = sum(map(len, todo))
    logger.info("%s: %d of %d images are to be done", sink.out, left, total)
    if not todo:
        return sink.summary(already_there=total)
    with sink, Interruption() as interruption:
        results = _results(_Batch(images_dir, generator), todo, processes)
        with closing(results), Progress("generate", total=total, done=total - left) as progress:
            for batch in results:
                _keep(sink, batch, done)
                progress.advance(len(batch))
                if interruption.requested:
                    break
        if interruption.requested:
            sink.pause()
            logger.warning("stopped; run the same command again to go on")
            return sink.summary(already_there=total - left, interrupted=True)
        sink.finish()
        summary = sink.summary(already_there=total - left)
    if summary.left_out > MOST_DAMAGED * total:
        raise RuntimeError(
            f"{summary.left_out} of {total} images failed, more than 1% (the others are in "
            f"{sink.out}); see the names above"
        )
    return summary


@dataclass(frozen=True)
class _Outcome:
    """Segments of one image, or why there are none."""

    key: str
    segments: list[Segment]
    failure: Failure | None = None


@dataclass(frozen=True)
class _Batch:
    """Reads and segments a batch of paths, in whatever process."""

    images_dir: Path
    generator: Generator

    def __call__(self, relative_paths: Sequence[str]) -> list[_Outcome]:
        """Outcomes in the order of the paths."""
        return self.segment(self.read(relative_paths))

    def read(self, relative_paths: Sequence[str]) -> list[tuple[str, np.ndarray | Failure]]:
        """Each image, or why it cannot be read."""
        images: list[tuple[str, np.ndarray | Failure]] = []
        for path in relative_paths:
            key = segment_key(path)
            try:
                images.append((key, read_rgb(self.images_dir / path)))
            except ValueError as error:
                images.append((key, Failure(key, str(error))))
        return images

    def segment(self, images: list[tuple[str, np.ndarray | Failure]]) -> list[_Outcome]:
        """Something blank stands in for what cannot be read: the batch keeps its size."""
        pixels = [BLANK if isinstance(image, Failure) else image for _, image in images]
        found = self.generator.segments(pixels)
        return [
            _Outcome(key, [], image) if isinstance(image, Failure) else _Outcome(key, segments)
            for (key, image), segments in zip(images, found, strict=True)
        ]


def _results(
    work: _Batch, batches: list[list[str]], processes: int
) -> Outcomes[list[_Outcome], None, None]:
    if work.generator.in_processes:
        yield from in_order(work, batches, processes=processes, chunk=1)
        return
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(work.read, batches[0])
        for following in [*batches[1:], []]:
            images = ahead.result()
            ahead = reader.submit(work.read, following)
            yield work.segment(images)


def _keep(sink: StoreSink | FolderSink, batch: list[_Outcome], done: set[str]) -> None:
    for outcome in batch:
        if outcome.failure is not None:
            logger.warning("%s", outcome.failure.reason)
            sink.add_failure(outcome.failure)
        elif outcome.key not in done:
            sink.add(outcome.key, outcome.segments)


def _refuse_equal_names(relative_paths: list[str]) -> None:
    seen: dict[str, str] = {}
    for path in relative_paths:
        other = seen.setdefault(segment_key(path), path)
        if other != path:
            raise ValueError(
                f"{other} and {path} differ in their suffix only, so their segments would have "
                "the same name; rename one"
            )
