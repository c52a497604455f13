"""What a frozen encoder makes of whole images: patch tokens with labels, and one mean per image.

The model's decoder has to be nn.Identity: its patch logits are then the encoder's tokens.
Shapes: N tokens of an image's windows, T kept ones, D features, P pixels per patch side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from common.images import find_images, read_rgb
from segmenter.config import ProtocolConfig
from segmenter.data import TestImage, WholeImages, scaled_images
from segmenter.dataset import Pair
from segmenter.inference import Window, cut, patch_logits
from segmenter.labels import refuse_thin
from segmenter.model import Segmenter
from segmenter.schedule import TOKEN_STREAM

MOST_TOKENS = 200_000  # kept of all training images together: 0.8 GB of ViT-L's
MOST_IMAGES = 5000  # of an image folder


class TrainingTokens:
    """Tokens of training images, each with the label that most valid pixels of its patch have.

    An image keeps at most its even share of MOST_TOKENS, drawn by (seed, index), in a place of its
    own: the processes' parts add up to what one process would have, in the same order.
    """

    def __init__(self, model: Segmenter, images: WholeImages, seed: int) -> None:
        self.model, self.images, self.seed = model, images, seed
        device = model.mean.device
        self.features = torch.zeros(MOST_TOKENS, model.encoder.embed_dim, device=device)
        self.labels = torch.zeros(MOST_TOKENS, dtype=torch.int64, device=device)  # from 1; 0: none

    def add(self, usable: list[tuple[int, TestImage]]) -> None:
        """The images of a group, with their indices."""
        found = _tokens(self.model, [sample for _, sample in usable], self.images.protocol)
        patch, ignored = self.model.shape.encoder.patch_size, self.images.description.ignore_index
        for (index, sample), windows in zip(usable, found, strict=True):
            size = sample.scaled[0].shape[-2:]
            labels = F.interpolate(sample.labels[None, None], size, mode="nearest-exact")[0, 0]
            of_tokens = torch.cat(
                [majority_labels(cut(labels, window), patch, ignored) for window, _ in windows]
            )
            share = [(index + n) * MOST_TOKENS // len(self.images) for n in (0, 1)]
            known = of_tokens.nonzero()[:, 0].numpy()
            order = np.random.default_rng([self.seed, TOKEN_STREAM, index]).permutation(known)
            chosen = torch.from_numpy(order[: share[1] - share[0]])
            place = slice(share[0], share[0] + len(chosen))
            tokens = torch.cat([features for _, features in windows])
            self.features[place] = tokens[chosen.to(tokens.device)].float()
            self.labels[place] = of_tokens[chosen].to(tokens.device)

    def total(self, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """Features [T, D] fp32 and classes [T] of all processes. RuntimeError if T is 0."""
        labels = accelerator.reduce(self.labels, reduction="sum")
        kept = labels > 0
        if not kept.any():
            raise RuntimeError("no pixel of the training images has a label that counts")
        return accelerator.reduce(self.features, reduction="sum")[kept], labels[kept] - 1


def majority_labels(labels: Tensor, patch: int, ignore_index: int) -> Tensor:
    """[h, w] uint8 to [N]: 1 + the class of most valid pixels of each patch, 0 if it has none."""
    height, width = labels.shape
    padded = F.pad(labels, (0, -width % patch, 0, -height % patch), value=ignore_index)
    pixels = padded.unfold(0, patch, patch).unfold(1, patch, patch).flatten(2).flatten(0, 1).long()
    counts = torch.zeros(len(pixels), 256).scatter_add_(1, pixels, torch.ones(pixels.shape))
    counts[:, ignore_index] = 0
    most, classes = counts.max(1)
    return torch.where(most > 0, classes + 1, 0)


class FolderImages(WholeImages):
    """Images of class folders, evenly spaced; without labels of pixels."""

    def __init__(self, folder: Path, like: WholeImages) -> None:
        names = [name for name in find_images(folder) if "/" in name]
        pairs = [
            Pair(name=name, image=folder / name, annotation=folder / name)
            for name in names[:: -(-len(names) // MOST_IMAGES) or 1]
        ]
        super().__init__(like.description, pairs, like.protocol)
        self.classes = sorted({pair.name.partition("/")[0] for pair in pairs})

    def __getitem__(self, index: int) -> TestImage:
        path, labels = self.pairs[index].image, torch.zeros(0, 0)
        try:
            image = read_rgb(path)
            refuse_thin(image.shape[:2], path)
        except ValueError as error:
            return TestImage(scaled=[], labels=labels, unreadable=str(error))
        return TestImage(scaled=scaled_images(image[..., ::-1], self.protocol), labels=labels)


class MeanTokens:
    """The mean token [D] of each image."""

    def __init__(self, model: Segmenter, images: FolderImages) -> None:
        self.model, self.images = model, images
        width, device = model.encoder.embed_dim, model.mean.device
        self.features = torch.zeros(len(images), width, device=device)

    def add(self, usable: list[tuple[int, TestImage]]) -> None:
        """The images of a group, with their indices."""
        found = _tokens(self.model, [sample for _, sample in usable], self.images.protocol)
        for (index, _), windows in zip(usable, found, strict=True):
            self.features[index] = torch.cat([tokens for _, tokens in windows]).float().mean(0)

    def total(self, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """Features [T, D] and classes [T] of the images that could be used, of all processes."""
        features = accelerator.reduce(self.features, reduction="sum")
        names = [pair.name.partition("/")[0] for pair in self.images.pairs]
        labels = torch.tensor([self.images.classes.index(name) for name in names])
        usable = features.any(1)
        return features[usable], labels.to(features.device)[usable]


def _tokens(
    model: Segmenter, samples: list[TestImage], protocol: ProtocolConfig
) -> list[list[tuple[Window, Tensor]]]:
    """For each image its windows with their tokens [N, D]."""
    found: list[list[tuple[Window, Tensor]]] = [[] for _ in samples]
    for window, features in patch_logits(model, [s.scaled[0] for s in samples], protocol):
        found[window.image].append((window, features.flatten(1).T))
    return found
