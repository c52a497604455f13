"""What segments of a dataset will cost, known from a few real batches."""

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.images import evenly_spread
from common.progress import clock
from segments.config import STORE_NAME
from segments.generate import READERS, Generator, Work
from segments.writing import StoreWriter

SECONDS = 30.0  # of timing, or less if `MOST_BATCHES` are done by then
MOST_BATCHES = 50


@dataclass(frozen=True, kw_only=True)
class Price:
    """Of all images on this machine's GPU, or on its cores. bytes: of the store."""

    seconds_per_image: float
    images: int
    seconds: float
    points_per_image: float | None
    bytes: int

    def text(self) -> str:
        """For people."""
        points = self.points_per_image
        visited = "" if points is None else f", {points:.0f} points an image"
        return (
            f"{self.images} images: {clock(self.seconds)} here, {self.seconds / 3600:.2f} hours of "
            f"this device; {1 / self.seconds_per_image:.1f} images/s{visited}; a store of "
            f"{self.bytes / 2**20:.0f} MiB. N devices (--shard I/N) take 1/N of the time"
        )


def estimate_price(
    images: Mapping[str, Path], generator: Generator, *, processes: int | None
) -> Price:
    """Time batches that are spread over the images."""
    work = Work(images, generator)
    chosen = evenly_spread(work.batches, MOST_BATCHES)
    # The first batch pays for compiling and for the library's own tests of what is fast.
    work.segment(work.read(chosen[0]))
    generator.tally.clear()
    reading = segmenting = 0.0
    timed = 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / STORE_NAME
        with StoreWriter(out, source=generator.name, settings=generator.settings) as writer:
            for keys in chosen:
                started = time.perf_counter()
                batch = work.read(keys)
                reading += (read := time.perf_counter()) - started
                for row in work.segment(batch):
                    writer.add(row)
                segmenting += time.perf_counter() - read
                timed += len(keys)
                if reading + segmenting > SECONDS:
                    break
            writer.finish()
        stored = out.stat().st_size
    # A GPU is taken to wait for its readers only if they are slower; cores to work as fast side by
    # side as one alone.
    seconds = max(segmenting, reading / READERS)
    if generator.in_processes:
        seconds = (reading + segmenting) / (processes or len(os.sched_getaffinity(0)))
    points = generator.tally["points"]
    return Price(
        seconds_per_image=seconds / timed,
        images=len(images),
        seconds=seconds / timed * len(images),
        points_per_image=points / timed if points else None,
        bytes=round(stored / timed * len(images)),
    )
