"""Samples and loaders, made of mmsegmentation's transforms.

A training sample is a pure function of (seed, epoch, index): neither worker nor process nor batch
matters. Pixels stay uint8 RGB until they are on the device.
"""

from __future__ import annotations

import functools
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segmenter.config import LONG_SIDE_RATIO, ProtocolConfig
from segmenter.dataset import DatasetDescription, Pair
from segmenter.quiet import quiet_imports
from segmenter.schedule import SAMPLE_STREAM, BatchPlan

with quiet_imports():
    import mmseg.datasets
    from mmcv.transforms import Compose, LoadImageFromFile, Pad, RandomResize
    from mmseg.datasets.transforms import (
        LoadAnnotations,
        PhotoMetricDistortion,
        RandomCrop,
        RandomFlip,
        Resize,
    )

RATIO_RANGE = (0.5, 2.0)
MOST_OF_ONE_CLASS = 0.75  # a crop with more of one class is drawn again, up to ten times


@dataclass(frozen=True, kw_only=True)
class Classes:
    """names and palette [K, 3] uint8 RGB of the classes."""

    names: tuple[str, ...]
    palette: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def read_classes(description: DatasetDescription) -> Classes:
    """Names and colours: the description's own, or mmsegmentation's. Raises ValueError."""
    names: Sequence[str] = description.classes
    palette: Sequence[Sequence[int]] = description.palette
    if isinstance(description.classes, str):
        known = getattr(mmseg.datasets, description.classes, None)
        if known is None:
            raise ValueError(
                f"{description.source}: mmsegmentation has no dataset {description.classes}"
            )
        names = known.METAINFO["classes"]
        palette = palette or known.METAINFO["palette"]
    if not len(palette):
        palette = np.random.default_rng(42).integers(32, 256, (len(names), 3)).tolist()
    return Classes(names=tuple(names), palette=np.array(palette, dtype=np.uint8))


@dataclass(kw_only=True)
class Batch:
    """images [B, 3, S, S] uint8 RGB; labels [B, S, S] uint8; sizes [B, 2]: height and width that
    are image, the rest is padding; valid_pixels: labels that count in the loss."""

    images: Tensor
    labels: Tensor
    sizes: Tensor
    valid_pixels: int

    def pin_memory(self) -> Batch:
        """Into page-locked memory; the loader calls it where there is a GPU."""
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        self.sizes = self.sizes.pin_memory()
        return self

    def __len__(self) -> int:
        return len(self.images)

    def parts(self, most: int | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and sizes in parts of at most `most` images."""
        size = most or len(self)
        return list(
            zip(
                self.images.split(size),
                self.labels.split(size),
                self.sizes.split(size),
                strict=True,
            )
        )


class TrainingCrops(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Random crops of the training images by (epoch, index)."""

    def __init__(
        self,
        description: DatasetDescription,
        pairs: Sequence[Pair],
        protocol: ProtocolConfig,
        seed: int,
    ) -> None:
        self.description = description
        self.pairs = pairs
        self.seed = seed
        size, ignored = protocol.crop_size, description.ignore_index
        # Padding comes last and by itself, so that its size is known: see `Batch.sizes`.
        self.transform = Compose(
            [
                LoadImageFromFile(),
                LoadAnnotations(),
                RandomResize(
                    scale=_scale(protocol.image_size), ratio_range=RATIO_RANGE, keep_ratio=True
                ),
                RandomCrop((size, size), cat_max_ratio=MOST_OF_ONE_CLASS, ignore_index=ignored),
                RandomFlip(prob=0.5),
                PhotoMetricDistortion(),
            ]
        )
        self.pad = Pad(size=(size, size), pad_val={"img": 0, "seg": ignored})

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        epoch, index = key
        with _seeded(self.seed, epoch, index):
            sample = _apply(self.transform, self.description, self.pairs[index])
        size = sample["img"].shape[:2]
        sample = self.pad(sample)
        return (
            _to_chw_rgb(sample["img"]),
            torch.from_numpy(sample["gt_seg_map"]),
            torch.tensor(size),
        )


@dataclass(kw_only=True)
class TestImage:
    """index of the pair; scaled: one image [3, h, w] uint8 RGB per scale of the protocol;
    labels [H, W] uint8 at the original size."""

    index: int
    scaled: list[Tensor]
    labels: Tensor


class WholeImages(Dataset[TestImage]):
    """Test images by index, at the scales of the protocol."""

    def __init__(
        self, description: DatasetDescription, pairs: Sequence[Pair], protocol: ProtocolConfig
    ) -> None:
        self.description = description
        self.pairs = pairs
        self.load = Compose([LoadImageFromFile(), LoadAnnotations()])
        self.protocol = protocol

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TestImage:
        sample = _apply(self.load, self.description, self.pairs[index])
        return TestImage(
            index=index,
            scaled=scaled_images(sample["img"], self.protocol),
            labels=torch.from_numpy(sample["gt_seg_map"]),
        )


def scaled_images(image_bgr: np.ndarray, protocol: ProtocolConfig) -> list[Tensor]:
    """[H, W, 3] uint8 BGR to one [3, h, w] RGB per scale, ratio kept, by mmcv's Resize."""
    return [
        _to_chw_rgb(_resize(protocol.image_size, scale)({"img": image_bgr})["img"])
        for scale in protocol.scales
    ]


@functools.cache
def _resize(image_size: int, scale: float) -> Any:
    return Resize(scale=_scale(round(image_size * scale)), keep_ratio=True)


def _scale(image_size: int) -> tuple[int, int]:
    return LONG_SIDE_RATIO * image_size, image_size


def _apply(transform: Any, description: DatasetDescription, pair: Pair) -> dict[str, Any]:
    """What a dataset of mmsegmentation does. Raises ValueError naming a file that is broken."""
    try:
        return transform(
            {
                "img_path": str(pair.image),
                "seg_map_path": str(pair.annotation),
                "label_map": None,
                "reduce_zero_label": description.reduce_zero_label,
                "seg_fields": [],
            }
        )
    except (OSError, AssertionError, AttributeError) as error:  # mmcv asserts that it could decode
        raise ValueError(f"{pair.image} or its annotation cannot be read: {error}") from error


def _to_chw_rgb(image_bgr: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_bgr[..., ::-1].transpose(2, 0, 1)))


class _seeded:  # noqa: N801  (used like a function)
    """numpy's and Python's global generators, which mmcv's transforms draw from, seeded for a
    while and then put back."""

    def __init__(self, *key: int) -> None:
        self.key = key

    def __enter__(self) -> None:
        self.states = np.random.get_state(), random.getstate()
        sequence = np.random.SeedSequence([self.key[0], SAMPLE_STREAM, *self.key[1:]])
        numpy_seed, python_seed = sequence.generate_state(2)
        np.random.seed(numpy_seed)
        random.seed(int(python_seed))

    def __exit__(self, *_: object) -> None:
        np.random.set_state(self.states[0])
        random.setstate(self.states[1])


def training_batches(
    crops: TrainingCrops,
    plan: BatchPlan,
    *,
    rank: int,
    start: tuple[int, int],
    epochs: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """This process's batches from (epoch, step) `start` to the end of the run."""
    keys = [
        [(epoch, index) for index in indices]
        for epoch in range(start[0], epochs)
        for indices in plan.indices(crops.seed, epoch, rank, start[1] if epoch == start[0] else 0)
    ]
    collate = functools.partial(_collate, ignore_index=crops.description.ignore_index)
    loader = DataLoader(
        crops, batch_sampler=keys, num_workers=workers, collate_fn=collate,
        pin_memory=pin_memory, worker_init_fn=_start_worker,
    )  # fmt: skip
    return iter(loader)


def test_images(
    images: WholeImages, indices: Sequence[int], *, workers: int, pin_memory: bool
) -> Iterator[TestImage]:
    """The images with these indices, in this order."""
    loader: DataLoader[TestImage] = DataLoader(
        images, sampler=indices, batch_size=None, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )  # fmt: skip
    return iter(loader)


def default_workers() -> int:
    """Loader processes for one of the processes on this machine: at most 10, none on few cores.

    torchrun says how many there are on each machine (LOCAL_WORLD_SIZE).
    """
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if cores < 3 else min(10, cores - 1)


def _collate(samples: list[tuple[Tensor, Tensor, Tensor]], *, ignore_index: int) -> Batch:
    images, labels, sizes = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return Batch(
        images=images, labels=labels, sizes=sizes,
        valid_pixels=int((labels != ignore_index).sum()),
    )  # fmt: skip


def _start_worker(worker: int) -> None:
    """Workers use one thread, and leave signals to the process that will stop them."""
    import cv2

    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
