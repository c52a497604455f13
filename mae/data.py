"""Samples: from a list of images to uint8 batches, the same on any number of workers.

What happens to a sample is a pure function of (seed, epoch, image index), so neither the worker,
nor the process, nor the batch it falls into matters.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.images import next_usable
from common.tars import TarImages
from engine.schedule import FIXED, SAMPLE, sample_rng
from engine.task import MicroBatch
from engine.vit import IMAGE_CHANNELS
from mae.controls import SegmentSource
from mae.crops import CroppedImage, centre_crop, random_crop, read_crop
from mae.masking import MaskingMethod
from segments.store import segment_key


class Sample(NamedTuple):
    """One image [C, S, S] uint8, its pattern (see `mae.masking`), and what was skipped for it."""

    image: Tensor
    pattern: np.ndarray
    hidden_pixels: int
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedImages(Dataset[Sample]):
    """Samples by (epoch, index): random crop and flip, the pattern of the method.

    paths: relative to folder, as bytes. segments: None if the method does without.
    is_fixed: centre crop, and the same pattern whenever the epoch is the same.
    An unreadable image is replaced by the next one in the list and named in the sample.
    """

    folder: Path | TarImages
    paths: np.ndarray
    segments: SegmentSource | None
    method: MaskingMethod
    seed: int
    is_fixed: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        # Its neighbour stands in, so that a damaged file changes this sample alone.
        sample, skipped = next_usable(partial(self._sample, epoch), index, len(self))
        return sample._replace(unreadable=skipped)

    def _sample(self, epoch: int, index: int) -> Sample:
        image, pattern = self.draw(epoch, index)
        hidden = self.method.hidden_pixels(pattern)
        return Sample(image.pixels, pattern, hidden)

    def draw(self, epoch: int, index: int) -> tuple[CroppedImage, np.ndarray]:
        """The crop of an image and its pattern. Raises ValueError if it cannot be used."""
        rng = sample_rng(self.seed, FIXED if self.is_fixed else SAMPLE, epoch, index)
        choose_crop = centre_crop if self.is_fixed else partial(random_crop, rng)
        relative, segment = self.paths[index].decode(), None
        try:
            image = read_crop(self.folder / relative, choose_crop, self.method.image_size)
            if self.segments is not None:
                segment = self.segments.cut(self.method, segment_key(relative), image, rng)
        except ValueError as error:
            raise ValueError(f"{relative} ({error})") from None
        return image, self.method.pattern(rng, segment)


def collate(samples: list[Sample]) -> MicroBatch:
    """Samples to a batch: images [B, C, S, S] uint8, patterns [B, ...]; the loss is on what is hidden."""
    # Decoded pixels have the channel fastest; turning them costs as much as cropping.
    pixels = torch.stack([sample.image.permute(1, 2, 0) for sample in samples])  # [B, S, S, C]
    patterns = torch.from_numpy(np.stack([sample.pattern for sample in samples]))
    hidden = torch.tensor([sample.hidden_pixels for sample in samples]).double()
    coverage = hidden * (100 / pixels.shape[1] ** 2)  # percent
    return MicroBatch(
        inputs=(pixels.permute(0, 3, 1, 2), patterns),
        num_values=hidden.sum().item() * IMAGE_CHANNELS,
        unreadable=[text for sample in samples for text in sample.unreadable],
        # Sums and squares: mean and deviation over the epoch come from them at its end.
        counts=(coverage.sum().item(), coverage.square().sum().item()),
    )
