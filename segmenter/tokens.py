"""What a frozen encoder makes of whole images: tokens with labels, in bounded memory.

Shapes: N tokens of an image, T kept ones of all, D features, P pixels per patch side.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from common.images import find_images
from engine.schedule import TOKENS
from segmenter.data import TestImage, WholeImages, scaled_images
from segmenter.dataset import Pair
from segmenter.inference import cut, patch_logits
from segmenter.labels import read_image
from segmenter.model import Segmenter

MOST_TOKENS = 200_000  # kept of all images together: 0.8 GB of ViT-L's
MOST_IMAGES = 5000  # of class folders


class Tokens:
    """Tokens of images, each with the label that most valid pixels of its patch have.

    An image keeps at most its even share of MOST_TOKENS, drawn by (seed, index), in a place of its
    own: the processes' parts add up to what one process would have, in the same order. An image
    that has one label itself keeps the mean of its tokens.
    """

    def __init__(self, model: Segmenter, images: WholeImages, seed: int) -> None:
        # The model's decoder is nn.Identity, so that its patch logits are the encoder's tokens.
        self.model, self.images, self.seed = model, images, seed
        device = model.mean.device
        self.features = torch.zeros(MOST_TOKENS, model.encoder.embed_dim, device=device)
        self.labels = torch.zeros(MOST_TOKENS, dtype=torch.int64)  # from 1; 0: none

    def add(self, usable: list[tuple[int, TestImage]]) -> None:
        """The images of a group, with their indices."""
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in usable]  # by window
        scaled = [sample.scaled[0] for _, sample in usable]
        for window, features in patch_logits(self.model, scaled, self.images.protocol):
            labels, size = usable[window.image][1].labels, scaled[window.image].shape[-2:]
            if labels.dim() == 2:  # by pixel; else the image's own
                fitting = F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0]
                labels = self._majority(cut(fitting, window))
            # [D, h, w] to [N, D]
            found[window.image].append((features.flatten(1).T.float(), labels))
        for (index, sample), windows in zip(usable, found, strict=True):
            features, labels = (torch.cat(parts) for parts in zip(*windows, strict=True))
            if sample.labels.dim() == 1:
                features, labels = features.mean(0, keepdim=True), sample.labels
            self._keep(index, features, labels)

    def _majority(self, labels: Tensor) -> Tensor:
        """[h, w] uint8 to [N]: 1 + the class of most valid pixels of each patch, 0 if none is."""
        patch, ignored = self.model.shape.encoder.patch_size, self.images.description.ignore_index
        height, width = labels.shape
        padded = F.pad(labels, (0, -width % patch, 0, -height % patch), value=ignored)
        by_patch = padded.unfold(0, patch, patch).unfold(1, patch, patch)
        pixels = by_patch.flatten(2).flatten(0, 1).long()  # [N, P * P]
        counts = torch.zeros(len(pixels), 256).scatter_add_(1, pixels, torch.ones(pixels.shape))
        counts[:, ignored] = 0  # padding, too
        most, classes = counts.max(1)
        return torch.where(most > 0, classes + 1, 0)

    def _keep(self, index: int, features: Tensor, labels: Tensor) -> None:
        first, end = ((index + n) * MOST_TOKENS // len(self.images) for n in (0, 1))
        rng = np.random.default_rng([self.seed, TOKENS, index])
        known = rng.permutation(labels.nonzero()[:, 0].numpy())  # those that have a label
        chosen = torch.from_numpy(known[: end - first])
        place = slice(first, first + len(chosen))
        self.features[place] = features[chosen.to(features.device, non_blocking=True)]
        self.labels[place] = labels[chosen]

    def total(self, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """Features [T, D] fp32 and classes [T] of all processes. RuntimeError if T is 0."""
        labels = accelerator.reduce(self.labels.to(self.features.device), reduction="sum")
        kept = labels > 0  # places that no image filled, of small images, stay 0
        if not kept.any():
            raise RuntimeError("no pixel of the training images has a label that counts")
        return accelerator.reduce(self.features, reduction="sum")[kept], labels[kept] - 1


class ClassFolders(WholeImages):
    """Images of DIR/<class>/, evenly spaced; the label of one is its class, from 1."""

    def __init__(self, folder: Path, like: WholeImages) -> None:
        names = [name for name in find_images(folder) if "/" in name]
        names = names[:: -(-len(names) // MOST_IMAGES) or 1]
        pairs = [Pair(name=n, image=folder / n, annotation=folder / n) for n in names]
        super().__init__(like.description, pairs, like.protocol)
        self.classes = sorted({name.partition("/")[0] for name in names})

    def __getitem__(self, index: int) -> TestImage:
        pair = self.pairs[index]
        label = torch.tensor([1 + self.classes.index(pair.name.partition("/")[0])])
        try:
            image = read_image(pair.image)
        except ValueError as error:
            return TestImage([], label, unreadable=str(error))
        return TestImage(scaled_images(image[..., ::-1], self.protocol), label)
