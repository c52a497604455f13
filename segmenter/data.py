"""Samples and loaders, made of mmsegmentation's transforms.

A training sample is a pure function of (seed, epoch, index): neither worker nor process nor batch
matters. Pixels stay uint8 RGB until they are on the device.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.images import next_usable
from engine.schedule import SAMPLE, derived_seeds
from engine.task import MicroBatch, start_loader_process
from segmenter.config import ProtocolConfig
from segmenter.dataset import DatasetDescription, Pair, quiet_imports
from segmenter.labels import read_image, read_labels

with quiet_imports():
    from mmcv.transforms import Compose, Pad, RandomResize
    from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop, RandomFlip, Resize


class Crop(NamedTuple):
    """image [3, S, S] uint8 RGB; labels [S, S] uint8; size [2]: height and width that are image, the
    rest is padding; valid_pixels: labels that count; unreadable: images it stands in for, and why."""

    image: Tensor
    labels: Tensor
    size: Tensor
    valid_pixels: Tensor
    unreadable: tuple[str, ...] = ()


class TestImage(NamedTuple):
    """scaled: one image [3, h, w] uint8 RGB per scale of the protocol; labels [H, W] uint8 at the
    original size. unreadable: why there is nothing of both; else empty."""

    scaled: list[Tensor]
    labels: Tensor
    unreadable: str = ""


class _Pairs:
    """Pairs of image and annotation, by index. interpolation: by which images are scaled."""

    def __init__(
        self, description: DatasetDescription, pairs: Sequence[Pair], protocol: ProtocolConfig,
        interpolation: str = "bilinear",
    ) -> None:  # fmt: skip
        self.description, self.pairs, self.protocol = description, pairs, protocol
        self.interpolation = interpolation

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """[H, W, 3] uint8 RGB and [H, W] uint8 labels. Raises ValueError for an unusable pair."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        labels = read_labels(pair, image.shape[:2], self.description)
        return image, self.description.as_classes(labels)


class TrainingCrops(_Pairs, Dataset[Crop]):
    """Random crops of the training images by (epoch, index)."""

    def __init__(
        self, description: DatasetDescription, pairs: Sequence[Pair], protocol: ProtocolConfig, seed: int,
        interpolation: str = "bilinear",
    ) -> None:  # fmt: skip
        super().__init__(description, pairs, protocol, interpolation)
        self.seed = seed
        side, ignored = protocol.crop_size, description.ignored
        # The augmentation of mmsegmentation's ADE20K configs, which Segmenter and MAE trained with.
        scale = 4 * protocol.image_size, protocol.image_size  # (2048, 512)
        resize = RandomResize(scale, ratio_range=(0.5, 2.0), keep_ratio=True, interpolation=interpolation)
        # A crop with more of one class than that is drawn again, up to ten times.
        crop = RandomCrop((side, side), cat_max_ratio=0.75, ignore_index=ignored)
        self.transform = Compose([resize, crop, RandomFlip(prob=0.5), PhotoMetricDistortion()])
        # Padding comes last and by itself, so that its size is known: see `Crop.size`.
        self.pad = Pad(size=(side, side), pad_val={"img": 0, "seg": ignored})

    def __getitem__(self, key: tuple[int, int]) -> Crop:
        epoch, index = key
        # A pair that cannot be used is replaced by the next one, and named in the crop.
        crop, skipped = next_usable(partial(self._crop, epoch), index, len(self))
        return crop._replace(unreadable=skipped)

    def _crop(self, epoch: int, index: int) -> Crop:
        image, labels = self.load(index)
        sample = {
            "img": np.ascontiguousarray(image[..., ::-1]),  # mmsegmentation's colours are BGR
            "img_shape": labels.shape, "gt_seg_map": labels, "seg_fields": ["gt_seg_map"],
        }  # fmt: skip
        with _seeded(self.seed, epoch, index):
            sample = self.transform(sample)
        size = torch.tensor(sample["img"].shape[:2])
        sample = self.pad(sample)
        cropped = torch.from_numpy(sample["gt_seg_map"])
        valid_pixels = (cropped != self.description.ignored).sum()
        return Crop(_to_chw(sample["img"][..., ::-1]), cropped, size, valid_pixels)


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """The global generators, which mmcv's transforms draw from, seeded and then put back."""
    states = np.random.get_state(), random.getstate()
    numpy_seed, python_seed = derived_seeds(seed, SAMPLE, epoch, index, count=2)
    np.random.seed(numpy_seed)
    random.seed(python_seed)
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


def collate(crops: list[Crop]) -> MicroBatch:
    """Crops to a batch: the loss is over the pixels whose label counts."""
    *tensors, unreadable = zip(*crops, strict=True)
    *inputs, valid_pixels = map(torch.stack, tensors)  # images, labels and sizes, each [B, ...]
    return MicroBatch(inputs, valid_pixels.sum().item(), [text for one in unreadable for text in one])


class WholeImages(_Pairs, Dataset[TestImage]):
    """Test images by index, at the scales of the protocol."""

    def __getitem__(self, index: int) -> TestImage:
        try:
            image, labels = self.load(index)
        except ValueError as error:  # evaluating goes on without it, and names it
            return TestImage(scaled=[], labels=torch.zeros(0, 0), unreadable=str(error))
        return TestImage(scaled_images(image, self.protocol, self.interpolation), torch.from_numpy(labels))


def scaled_images(
    image: np.ndarray, protocol: ProtocolConfig, interpolation: str = "bilinear"
) -> list[Tensor]:
    """[H, W, 3] uint8 RGB to one [3, h, w] per scale, ratio kept, by mmcv's Resize."""
    sizes = [round(protocol.image_size * scale) for scale in protocol.scales]
    resizes = [Resize(scale=(4 * size, size), keep_ratio=True, interpolation=interpolation) for size in sizes]
    return [_to_chw(resize({"img": image})["img"]) for resize in resizes]


def _to_chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def start_worker(worker: int) -> None:
    """What a loader's process does first."""
    import cv2

    cv2.setNumThreads(0)  # as many workers as cores run already
    start_loader_process(worker)
