"""Making segments of a folder of images: sharded, resumable, the same however it was interrupted.

    images = images_by_key(Path("IN1K/train"), None)
    generator = Felzenszwalb(FelzenszwalbSettings())
    generate(images, Path("masks.sqlite"), generator, processes=None)

What a finished store lacks, be it images or coverage ratios, becomes a store of its own beside it,
and the two are merged.
"""

import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Generator as Results
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.files import beside
from common.images import ImagePath, evenly_spread, open_images, read_reduced
from common.parallel import Failure, in_order
from common.step_files import shard_path
from segments.config import STORE_NAME, VAL, check_made_alike, made_for
from segments.pack import join
from segments.segment import Segment
from segments.store import PackedImage, PackedStore, Summary, by_key, pack_image, write_store

logger = logging.getLogger(__name__)

READERS = 2  # processes that keep a GPU supplied with images
BLANK = np.zeros((8, 8, 3), np.uint8)
MOST_TIMED = 50  # batches of an estimate,
SECONDS = 30.0  # which ends after this time, too


@dataclass(frozen=True, kw_only=True)
class InputImage:
    """An image to find segments of."""

    key: str
    pixels: np.ndarray  # [h, w, 3] uint8, perhaps fewer than the image has
    height: int  # of the image, and of its segments
    width: int
    ratios: tuple[float, ...] = ()  # the nearest to these coverages, in percent; none: all segments
    damage: str = ""  # why it cannot be read: something blank stands in


class Generator(Protocol):
    """What makes segments."""

    name: str
    settings: dict[str, Any]  # what is stored with the segments
    batch_size: int  # images at once
    read_side: int  # images may be read at reduced scale, but no side shorter than this
    in_processes: bool  # whether it can be copied into one process per core
    tally: Counter[str]  # what it did so far; stays empty in processes

    def segments(self, images: Sequence[InputImage]) -> list[list[Segment]]:
        """Segments of each image, the smallest first."""


def parse_shard(text: str | None) -> tuple[int, int]:
    """Index and count, of `0/4`, the first of four; None: what torchrun or Slurm says."""
    # torchrun inside an srun sets both: its own numbers count.
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if text is None and os.environ.keys() >= set(names):
            text = "/".join(os.environ[name] for name in names)
    index, _, count = (text or "0/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {text}: write it as 0/4, the first of four; it counts from 0")
    return int(index), int(count)


def images_by_key(
    images_dir: Path, val_dir: Path | None, index_dir: Path | None = None
) -> dict[str, ImagePath]:
    """All images below a folder, and below that of held-out ones, by the names of their segments.

    index_dir: see `open_images`. Raises ValueError if there are none, or two of the same name.
    """
    folders = {"": images_dir} | ({f"{VAL}/": val_dir} if val_dir else {})
    opened = {prefix: open_images(folder, index_dir) for prefix, folder in folders.items()}
    return by_key(
        (f"{prefix}{path}", images.source / path)
        for prefix, images in opened.items()
        for path in images.names
    )


def generate(
    images: Mapping[str, ImagePath], out: Path, generator: Generator, *,
    shard: tuple[int, int] = (0, 1), processes: int | None,
) -> Summary:  # fmt: skip
    """Make the segments of images, by key, that are not in the packed store yet.

    What is there is kept, and read by others, until the new store is complete. Images that fail are
    named, recorded, and tried again by the next run. Raises ValueError if what is there was made
    with other settings, RuntimeError at the end if more than 1% failed.
    """
    part, ratios = shard_path(out, *shard), set(made_for(generator.settings))
    # A finished store is never changed: others may be reading it.
    base = PackedStore(part) if part.exists() else None
    if base is None and out.exists() and ratios:  # a part of the whole store gets more ratios
        whole = PackedStore(out)
        known = made_for(whole.settings)
        base = whole if known and not ratios <= set(known) else None
    work = Work(images, generator, shard, processes, base)
    summary = _add_what_it_lacks(base, part, work) if base else work.make(part, work.keys)
    if generator.tally:
        logger.info("%s", ", ".join(f"{n} {what}" for what, n in generator.tally.items()))
    if not summary.interrupted and summary.too_many_failed:
        what = f"{summary.left_out} of {len(work.keys)} images failed, more than 1%"
        raise RuntimeError(f"{what} (the others are in {part}); see the names above")
    return summary


def _add_what_it_lacks(base: PackedStore, part: Path, work: "Work") -> Summary:
    """What is made stands beside until it is complete; then `part` is replaced by both."""
    check_made_alike(base.path, base.settings, work.generator.settings, for_any_ratio=True)
    strangers = work.there.difference(work.images)
    if work.missing and strangers:
        raise ValueError(
            f"{base.path} has {len(strangers)} images that are not among those of --images and "
            f"--val-dir, such as {min(strangers)}, and would lose them; name the folders of then"
        )
    lacking = work.keys if work.missing else work.keys - work.there
    for_ratios = "-".join(f"{ratio:g}" for ratio in work.ratios) or "all"
    aside = beside(part.with_name(f"{part.name}.{for_ratios}"))
    if aside.exists():  # a run was killed before it had merged it
        aside.replace(beside(aside))
    made = work.make(aside, lacking)
    if made.interrupted:
        return made
    added, interrupted = PackedStore(aside), False
    done = added.images() | added.listed_empty()
    # What fails again as before is no reason to write gigabytes anew.
    news = done or not added.failures().items() <= base.failures().items()
    if news or base.path != part:
        # What failed for a new ratio is left out as a whole: the next run tries it for all of them.
        kept = done | (set() if work.missing else work.there)
        interrupted = join([base, added], part, kept, work.ratios).interrupted
    if not interrupted:
        aside.unlink()
        base = PackedStore(part)
    return replace(
        made, out=part, images=len(base.images()), without=len(base.listed_empty()),
        already_there=made.already_there + len(work.keys - lacking), interrupted=interrupted,
    )  # fmt: skip


class Work:
    """From images, by key, to rows of a store. base: a finished one that is added to."""

    def __init__(
        self, images: Mapping[str, ImagePath], generator: Generator, shard: tuple[int, int] = (0, 1),
        processes: int | None = None, base: PackedStore | None = None,
    ) -> None:  # fmt: skip
        self.images, self.generator, self.processes = images, generator, processes
        known = base.settings if base else {}
        self.ratios = made_for(generator.settings, known)  # that the store will serve; none: all
        self.missing = [ratio for ratio in self.ratios if ratio not in made_for(known)]
        self.there = base.images() | base.listed_empty() if base else set()
        # Batches are made before they are shared out: an image is always computed together with the
        # same others, and two shards make exactly what one run makes.
        every, size = list(images), generator.batch_size
        batches = [every[start : start + size] for start in range(0, len(every), size)]
        self.batches = batches[shard[0] :: shard[1]]
        self.keys = set(chain.from_iterable(self.batches))

    def make(self, out: Path, keys: Collection[str]) -> Summary:
        """Make a store of what some of the images lack, or go on with it."""
        logger.info("%s: segments of %d images", out, len(keys))
        return write_store(
            out, [key for key in self.images if key in keys], lambda left: self._rows(set(left)),
            what="generate", source=self.generator.name,
            settings={**self.generator.settings, "for_coverage": self.ratios},
        )  # fmt: skip

    def _rows(self, left: set[str]) -> Results[PackedImage | Failure, None, None]:
        # A batch is done whole, since its images influence each other by rounding.
        batches = [batch for batch in self.batches if not left.isdisjoint(batch)]
        found: Iterable[list[PackedImage | Failure]]
        if self.generator.in_processes:
            make, read = self.segment, self.read
            found = in_order(lambda k: make(read(k)), batches, processes=self.processes)
        else:  # this process has the GPU, others read for it
            found = map(self.segment, in_order(self.read, batches, processes=READERS))
        yield from (row for rows in found for row in rows if row.key in left)

    def read(self, keys: Sequence[str]) -> list[InputImage]:
        """The images of a batch, which keeps its size whatever cannot be read."""
        return [self._read(key) for key in keys]

    def _read(self, key: str) -> InputImage:
        pixels, (height, width), damage = BLANK, BLANK.shape[:2], ""
        try:
            read, (high, wide) = read_reduced(self.images[key], self.generator.read_side)
            if min(high, wide) * self.generator.read_side < max(high, wide):  # less than a pixel is left
                raise ValueError(f"{self.images[key]}: {wide} x {high} pixels are too thin for segments")
            pixels, height, width = read, high, wide
        except ValueError as error:
            damage = str(error)
        # What an image has already is merged with what is made now.
        ratios = tuple(self.missing if key in self.there else self.ratios)
        return InputImage(key=key, pixels=pixels, height=height, width=width, ratios=ratios, damage=damage)

    def segment(self, images: Sequence[InputImage]) -> list[PackedImage | Failure]:
        """The rows of each image."""
        found = self.generator.segments(images)
        return [
            Failure(one.key, one.damage) if one.damage else pack_image(one.key, segments)
            for one, segments in zip(images, found, strict=True)
        ]


def estimate_price(
    images: Mapping[str, ImagePath], generator: Generator, *, processes: int | None
) -> dict[str, Any]:
    """What all images take, by timing batches that are spread over them.

    seconds: on this machine's GPU, or on its cores. bytes: of the store.
    """
    work = Work(images, generator)
    chosen = evenly_spread(work.batches, MOST_TIMED)
    # The first batch pays for compiling and for the library's own tests of what is fast.
    work.segment(work.read(chosen[0]))
    generator.tally.clear()
    reading = segmenting = 0.0
    rows: list[PackedImage | Failure] = []
    for keys in chosen:
        started = time.perf_counter()
        batch = work.read(keys)
        reading += (read := time.perf_counter()) - started
        rows += work.segment(batch)
        segmenting += time.perf_counter() - read
        if reading + segmenting > SECONDS:
            break
    with tempfile.TemporaryDirectory() as folder:
        out, made = Path(folder) / STORE_NAME, [row.key for row in rows]
        write_store(out, made, lambda _: (r for r in rows), what="price", source="", settings={})
        stored = out.stat().st_size
    # A GPU is taken to wait for its readers only if they are slower; cores to work as fast side by
    # side as one alone.
    seconds = max(segmenting, reading / READERS)
    if generator.in_processes:
        seconds = (reading + segmenting) / (processes or len(os.sched_getaffinity(0)))
    points = generator.tally["points"]
    return {
        "seconds_per_image": seconds / len(rows),
        "images": len(images),
        "seconds": seconds / len(rows) * len(images),
        "points_per_image": points / len(rows) if points else None,
        "bytes": round(stored / len(rows) * len(images)),
    }
