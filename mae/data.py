"""Samples and loaders: from a list of files to uint8 batches, the same on any number of workers.

What happens to a sample is a pure function of (seed, epoch, image index), so neither the worker,
nor the process, nor the batch it falls into matters.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae.config import MethodConfig
from mae.decode import CroppedImage, read_crop
from mae.listing import segment_key
from mae.masking import MaskingMethod
from mae.schedule import FIXED_STREAM, SAMPLE_STREAM, BatchPlan, sample_rng
from mae.segments import SegmentSource
from mae.transforms import centre_crop, crop_segment, random_crop

logger = logging.getLogger(__name__)

MOST_UNREADABLE_IN_A_ROW = 100
OPEN_FILES = 65536


@dataclass(kw_only=True)
class Sample:
    """One image [C, S, S] uint8, its pattern (see `mae.masking`), and what was skipped for it."""

    image: Tensor
    pattern: np.ndarray
    hidden_pixels: int
    unreadable: tuple[str, ...] = ()
    without_segment: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Batch:
    """images [B, C, S, S] uint8, pattern [B, ...], hidden_pixels [B] int64, skipped files."""

    images: Tensor
    pattern: Tensor
    hidden_pixels: Tensor
    unreadable: list[str]
    without_segment: list[str]

    def pin_memory(self) -> Batch:
        """Into page-locked memory; the loader calls it where there is a GPU."""
        self.images, self.pattern = self.images.pin_memory(), self.pattern.pin_memory()
        return self

    def __len__(self) -> int:
        return len(self.images)


class NoSegmentError(ValueError):
    """An image without any segment."""


class MaskedImages(Dataset[Sample]):
    """Training samples by (epoch, index): random crop and flip, the pattern of the method.

    An unreadable image is replaced by the next one in the list and named in the sample; so is one
    whose file of segments turns out to be empty, which a folder's listing cannot tell.
    """

    def __init__(
        self,
        folder: Path,
        paths: np.ndarray,
        source: SegmentSource | None,
        *,
        method: MaskingMethod,
        wanted: MethodConfig,
        seed: int,
    ) -> None:
        self.folder = folder
        self.paths = paths
        self.source = source
        self.method = method
        self.wanted = wanted
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = int(key[0]), int(key[1])
        unreadable: list[str] = []
        without_segment: list[str] = []
        for offset in range(min(len(self.paths), MOST_UNREADABLE_IN_A_ROW)):
            candidate = (index + offset) % len(self.paths)
            try:
                sample = self._load(epoch, candidate)
            except NoSegmentError:
                without_segment.append(self.relative_path(candidate))
                continue
            except ValueError as error:
                unreadable.append(f"{self.relative_path(candidate)} ({error})")
                continue
            sample.unreadable = tuple(unreadable)
            sample.without_segment = tuple(without_segment)
            return sample
        skipped = [*unreadable, *without_segment]
        raise RuntimeError(f"{len(skipped)} images in a row cannot be used: {skipped[0]} ...")

    def relative_path(self, index: int) -> str:
        """Path of an image relative to its folder."""
        return self.paths[index].decode()

    def _load(self, epoch: int, index: int) -> Sample:
        relative = self.relative_path(index)
        rng = sample_rng(self.seed, SAMPLE_STREAM, epoch, index)
        image = read_crop(
            f"{self.folder}/{relative}", partial(random_crop, rng), self.method.image_size
        )
        segment = None if self.source is None else self._segment(self.source, relative, image)
        return make_sample(self.method, image.pixels, rng, segment)

    def _segment(self, source: SegmentSource, relative: str, image: CroppedImage) -> np.ndarray:
        key = segment_key(relative)
        segment = source.nearest(key, self.wanted.coverage_ratio)
        if segment is None:
            raise NoSegmentError("it has no segment")
        if (segment.height, segment.width) != (image.height, image.width):
            raise ValueError(
                f"it is {image.width}x{image.height} pixels, upright, but its segments are "
                f"{segment.width}x{segment.height}"
            )
        return crop_segment(segment.decode(), image.crop, self.method.image_size)


class FixedImages(Dataset[Sample]):
    """Samples without chance, by index: centre crop, the same pattern every time.

    Image i gets its own segment, or, as held-out images often have none, that of a lender: one of
    the training images, evenly spread. A segment is cut in its own middle.
    """

    def __init__(
        self, images: MaskedImages, paths: np.ndarray, folder: Path, *, lenders: np.ndarray
    ) -> None:
        self.images = images
        self.paths = paths
        self.folder = folder
        self.lenders = lenders

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        for offset in range(len(self.paths)):
            candidate = (index + offset) % len(self.paths)
            try:
                return self._load(candidate)
            except ValueError as error:
                logger.warning("skipped %s: %s", self.paths[candidate].decode(), error)
        raise ValueError(f"no image in {self.folder} is readable")

    def _load(self, index: int) -> Sample:
        method = self.images.method
        path = self.folder / self.paths[index].decode()
        image = read_crop(path, centre_crop, method.image_size)
        rng = sample_rng(self.images.seed, FIXED_STREAM, 0, index)
        source = self.images.source
        segment = None if source is None else self._segment(source, index, image)
        return make_sample(method, image.pixels, rng, segment)

    def _segment(self, source: SegmentSource, index: int, image: CroppedImage) -> np.ndarray:
        own = self.paths[index].decode()
        lender = self.lenders[index * len(self.lenders) // len(self.paths)].decode()
        for path in (own, lender):
            found = source.nearest(segment_key(path), self.images.wanted.coverage_ratio)
            fits = found and (found.height, found.width) == (image.height, image.width)
            if found and (fits or path == lender):
                whole = found.decode()
                return crop_segment(whole, centre_crop(*whole.shape), self.images.method.image_size)
        raise NoSegmentError("it has no segment")


def make_sample(
    method: MaskingMethod, image: Tensor, rng: np.random.Generator, segment: np.ndarray | None
) -> Sample:
    """Draw the pattern of an image [C, S, S]; `segment` [S, S] is cut as the image is."""
    pattern = method.pattern(rng, segment)
    return Sample(image=image, pattern=pattern, hidden_pixels=method.hidden_pixels(pattern))


def allow_many_files() -> None:
    """Raise the number of files this process may have open, as far as the machine lets it.

    Every tensor that comes from a loader process is one until it is used, and a step of hundreds of
    small batches holds them all.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def make_loader(
    images: MaskedImages,
    plan: BatchPlan,
    *,
    rank: int,
    start: tuple[int, int],
    epochs: int,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Sample]:
    """One loader for the whole round: workers read on across the ends of epochs."""
    return DataLoader(
        images,
        batch_sampler=_Keys(plan, rank, start, epochs),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_main_process,
        prefetch_factor=4 if workers else None,
    )


def make_fixed_loader(
    images: Dataset[Sample], *, batch_size: int, workers: int
) -> DataLoader[Sample]:
    """A loader of fixed samples, in order."""
    return DataLoader(
        images,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals_to_the_main_process,
    )


def default_workers(local_processes: int) -> int:
    """Loader processes per training process: its share of the cores, at most 12."""
    return max(1, min(12, len(os.sched_getaffinity(0)) // local_processes))


def collate(samples: list[Sample]) -> Batch:
    """Samples to a batch."""
    return Batch(
        # Decoded pixels have the channel fastest; turning them costs as much as cropping.
        images=torch.stack([sample.image.permute(1, 2, 0) for sample in samples]).permute(
            0, 3, 1, 2
        ),
        pattern=torch.from_numpy(np.stack([sample.pattern for sample in samples])),
        hidden_pixels=torch.tensor([sample.hidden_pixels for sample in samples]),
        unreadable=[text for sample in samples for text in sample.unreadable],
        without_segment=[path for sample in samples for path in sample.without_segment],
    )


class _Keys:
    """The batch sampler: lists of (epoch, index)."""

    def __init__(self, plan: BatchPlan, rank: int, start: tuple[int, int], epochs: int) -> None:
        self.plan, self.rank, self.start, self.epochs = plan, rank, start, epochs

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for keys in self.plan.micro_batches(self.rank, self.start, self.epochs):
            yield [(int(epoch), int(index)) for epoch, index in keys]


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A signal to the whole process group must not kill workers while a step is being finished.

    They end with their parent all the same: the loader watches it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
