"""Samples and loaders, made of mmsegmentation's transforms.

A training sample is a pure function of (seed, epoch, index): neither worker nor process nor batch
matters. Pixels stay uint8 RGB until they are on the device.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.interruption import leave_signals_to_the_main_process
from common.samples import next_usable
from engine.schedule import SAMPLE, derived_seeds
from segmenter.classes import quiet_imports
from segmenter.config import ProtocolConfig
from segmenter.dataset import DatasetDescription, Pair
from segmenter.labels import allowed_labels, read_pair

with quiet_imports():
    from mmcv.transforms import Compose, Pad, RandomResize
    from mmseg.datasets.transforms import (
        PhotoMetricDistortion,
        RandomCrop,
        RandomFlip,
        Resize,
    )

LONG_SIDE_RATIO = 4  # the scale is (2048, 512) for an image size of 512
RATIO_RANGE = (0.5, 2.0)
MOST_OF_ONE_CLASS = 0.75  # a crop with more of one class is drawn again, up to ten times


class Batch(NamedTuple):
    """images [B, 3, S, S] uint8 RGB; labels [B, S, S] uint8; sizes [B, 2]: height and width that
    are image, the rest is padding; valid_pixels [B]: labels that count in the loss; unreadable:
    images that others stand in for, and why. One crop is the same without B."""

    images: Tensor
    labels: Tensor
    sizes: Tensor
    valid_pixels: Tensor
    unreadable: list[str]


def collate(crops: list[Batch]) -> Batch:
    """Crops to a batch."""
    images, labels, sizes, valid_pixels, unreadable = zip(*crops, strict=True)
    return Batch(
        images=torch.stack(images),
        labels=torch.stack(labels),
        sizes=torch.stack(sizes),
        valid_pixels=torch.stack(valid_pixels),
        unreadable=[text for texts in unreadable for text in texts],
    )


class TrainingCrops(Dataset[Batch]):
    """Random crops of the training images by (epoch, index).

    A pair that cannot be used is replaced by the next one, and named in the crop.
    """

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
        self.allowed = allowed_labels(description)
        size, ignored = protocol.crop_size, description.ignore_index
        # Padding comes last and by itself, so that its size is known: see `Batch.sizes`.
        self.transform = Compose(
            [
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

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        crop, skipped = next_usable(partial(self._crop, epoch), index, len(self))
        return crop._replace(unreadable=list(skipped))

    def _crop(self, epoch: int, index: int) -> Batch:
        loaded = _load(self.description, self.pairs[index], self.allowed)
        with _seeded(self.seed, epoch, index):
            sample = self.transform(loaded)
        size = torch.tensor(sample["img"].shape[:2])
        sample = self.pad(sample)
        labels = torch.from_numpy(sample["gt_seg_map"])
        valid_pixels = (labels != self.description.ignore_index).sum()
        return Batch(_to_chw_rgb(sample["img"]), labels, size, valid_pixels, [])


class TestImage(NamedTuple):
    """scaled: one image [3, h, w] uint8 RGB per scale of the protocol; labels [H, W] uint8 at the
    original size. unreadable: why there is nothing of both; else empty."""

    scaled: list[Tensor]
    labels: Tensor
    unreadable: str = ""


class WholeImages(Dataset[TestImage]):
    """Test images by index, at the scales of the protocol."""

    def __init__(
        self, description: DatasetDescription, pairs: Sequence[Pair], protocol: ProtocolConfig
    ) -> None:
        self.description = description
        self.pairs = pairs
        self.allowed = allowed_labels(description)
        self.protocol = protocol

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TestImage:
        try:
            sample = _load(self.description, self.pairs[index], self.allowed)
        except ValueError as error:
            return TestImage(scaled=[], labels=torch.zeros(0, 0), unreadable=str(error))
        return TestImage(
            scaled=scaled_images(sample["img"], self.protocol),
            labels=torch.from_numpy(sample["gt_seg_map"]),
        )


def scaled_images(image_bgr: np.ndarray, protocol: ProtocolConfig) -> list[Tensor]:
    """[H, W, 3] uint8 BGR to one [3, h, w] RGB per scale, ratio kept, by mmcv's Resize."""
    contiguous = np.ascontiguousarray(image_bgr)  # OpenCV asks for it
    sizes = [_scale(round(protocol.image_size * scale)) for scale in protocol.scales]
    return [
        _to_chw_rgb(Resize(scale=size, keep_ratio=True)({"img": contiguous})["img"])
        for size in sizes
    ]


def _scale(image_size: int) -> tuple[int, int]:
    return LONG_SIDE_RATIO * image_size, image_size


def _load(description: DatasetDescription, pair: Pair, allowed: np.ndarray) -> dict[str, Any]:
    """What mmsegmentation's transforms start from. Raises ValueError if the pair cannot be used."""
    image, labels = read_pair(pair, allowed)
    if description.reduce_zero_label:
        labels = labels - 1  # uint8 wraps round: 0 becomes 255, which is ignored
    return {
        "img": np.ascontiguousarray(image[..., ::-1]),  # BGR
        "img_shape": image.shape[:2],
        "ori_shape": image.shape[:2],
        "gt_seg_map": labels,
        "seg_fields": ["gt_seg_map"],
    }


def _to_chw_rgb(image_bgr: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_bgr[..., ::-1].transpose(2, 0, 1)))


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """numpy's and Python's global generators, which mmcv's transforms draw from, seeded for a
    while and then put back."""
    states = np.random.get_state(), random.getstate()
    numpy_seed, python_seed = derived_seeds(seed, SAMPLE, epoch, index, count=2)
    np.random.seed(numpy_seed)
    random.seed(python_seed)
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


def test_images(
    images: WholeImages, indices: Sequence[int], *, workers: int, pin_memory: bool
) -> Iterator[TestImage]:
    """The images with these indices, in this order."""
    loader: DataLoader[TestImage] = DataLoader(
        images, sampler=indices, batch_size=None, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=start_worker,
    )  # fmt: skip
    return iter(loader)


def start_worker(worker: int) -> None:
    """Workers use one thread, and leave signals to the process that will stop them."""
    import cv2

    cv2.setNumThreads(0)
    leave_signals_to_the_main_process(worker)
