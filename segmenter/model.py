"""Segmenter: encoder, decoder, and the pixels in between.

Shapes: B images, H x W pixels, K classes, P pixels per patch side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn import functional as F

from engine.vit import IMAGE_MEAN, IMAGE_STD
from segmenter.config import Decoder, ModelConfig, Normalization
from segmenter.decoder import AUXILIARY_WEIGHT, LinearDecoder, MaskTransformer, UPerNet
from segmenter.encoder import Encoder, EncoderShape
from segmenter.libraries import Interpolation, LibraryEncoder, LibraryShape, remake_encoder

# Mean and deviation of RGB pixels in 0 to 1, by `ProtocolConfig.normalization`.
PIXEL_STATISTICS = {"imagenet": (IMAGE_MEAN, IMAGE_STD), "half": ((0.5,) * 3, (0.5,) * 3)}


@dataclass(frozen=True, kw_only=True)
class SegmenterShape:
    """All that decides the shapes of the weights, so that a checkpoint can be rebuilt."""

    encoder: EncoderShape | LibraryShape
    decoder: Decoder
    decoder_layers: Annotated[int, Field(ge=0, le=1024)]  # of the mask transformer alone
    num_classes: Annotated[int, Field(ge=1, le=256)]
    normalization: Normalization


class Segmenter(nn.Module):
    """From uint8 pixels of any size to class logits of that size."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, shape: SegmenterShape, rates: ModelConfig | None = None, encoder: LibraryEncoder | None = None
    ) -> None:
        """rates: drop path and dropout for training; None: none. encoder: of `shape.encoder`, made."""
        super().__init__()
        self.shape, drop_path = shape, rates.drop_path if rates else 0.0
        self.encoder: Encoder | LibraryEncoder
        if isinstance(shape.encoder, LibraryShape):
            self.encoder = encoder or remake_encoder(shape.encoder, drop_path)
        else:
            self.encoder = Encoder(
                shape.encoder, drop_path=drop_path, dropout=rates.dropout if rates else 0.0,
                pyramid=shape.decoder == "upernet",
            )  # fmt: skip
        width, classes = self.encoder.embed_dim, shape.num_classes
        dropout = rates.decoder_dropout if rates else 0.0
        self.decoder: nn.Module
        if shape.decoder == "linear":
            self.decoder = LinearDecoder(width, classes)
        elif shape.decoder == "upernet":
            of_library = shape.encoder if isinstance(shape.encoder, LibraryShape) else None
            self.decoder = UPerNet(
                of_library.widths if of_library else [width] * 4, classes, dropout=dropout,
                is_pyramid=of_library is not None and len(set(of_library.strides)) > 1,
            )  # fmt: skip
        else:
            self.decoder = MaskTransformer(
                width, classes, layers=shape.decoder_layers, dropout=dropout,
                drop_path=rates.decoder_drop_path if rates else 0.0,
            )  # fmt: skip
        pixels: Sequence[Sequence[float]] = PIXEL_STATISTICS[shape.normalization]
        if isinstance(shape.encoder, LibraryShape):
            pixels = shape.encoder.mean, shape.encoder.std
        for name, values in zip(("mean", "std"), pixels, strict=True):
            # Times 255, since pixels come as uint8; no weights, so no part of a checkpoint.
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1) * 255, persistent=False)

    @property
    def interpolation(self) -> Interpolation:
        """By which images are scaled for it."""
        encoder = self.shape.encoder
        return encoder.interpolation if isinstance(encoder, LibraryShape) else "bilinear"

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """timm's hook for layer-wise rates: the encoder's groups, and then the decoder."""
        # No group has the decoder, for which "" stands: so it comes last, with what else has none.
        names = [("", None), *((name, None) for name, _ in self.encoder.named_parameters())]
        numbers = group_with_matcher(iter(names), self.encoder.group_matcher(), reverse=True)

        def place(name: str) -> tuple[float, ...]:
            room, _, rest = name.partition(".")
            return (float(numbers[rest if room == "encoder" else ""]),)

        return place

    def no_weight_decay(self) -> set[str]:
        """timm's hook: embeddings, which are matrices by shape only."""
        own = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return own if self.shape.decoder == "upernet" else {*own, "decoder.cls_emb"}

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[B, 3, H, W] uint8 RGB to class logits [B, K, H, W]; UPerNet in training: to a pair.

        sizes [B, 2]: height and width that are image; the rest is padding and counts as the mean.
        """
        pixels, (height, width) = self.normalise(images), images.shape[-2:]
        if sizes is not None:  # padding becomes 0, as the mean is: 1 inside, [B, 1, H, W]
            rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
            columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
            pixels = pixels * (rows[:, None, :, None] & columns[:, None, None, :]).float()
        main, *auxiliary = (self.upsample(m, height, width) for m in self._all_logits(pixels))
        return (main, auxiliary[0]) if auxiliary else main  # the second trains, and is not scored

    def normalise(self, images: Tensor) -> Tensor:
        """[..., 3, H, W] uint8 RGB to pixels of mean 0 and deviation 1."""
        return (images - self.mean) / self.std

    def patch_logits(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] normalised pixels to [B, K, ceil(H / P), ceil(W / P)]; UPerNet: 4x that."""
        return self._all_logits(pixels)[0]

    def _all_logits(self, pixels: Tensor) -> list[Tensor]:
        """The decoder's logits, and beside them those that only train."""
        patch = self.shape.encoder.patch_size
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % patch, 0, -height % patch))
        decoded = self.decoder(self.encoder(pixels))
        if isinstance(decoded, list):  # UPerNet's are maps already
            return decoded
        rows = pixels.shape[-2] // patch
        return [decoded.transpose(1, 2).unflatten(2, (rows, -1))]  # [B, N, K] to [B, K, h, w]

    def upsample(self, patch_logits: Tensor, height: int, width: int) -> Tensor:
        """[B, K, h, w] to [B, K, H, W]: bilinear, then the padding of the last patches cut off."""
        patch = self.shape.encoder.patch_size
        size = [side + -side % patch for side in (height, width)]
        # In fp32, whatever the model computes in: between patches, classes are close.
        logits = patch_logits.float()
        if torch.is_grad_enabled():
            logits = _upsample_by_products(logits, size)
        else:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


def _upsample_by_products(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, [B, K, h, w] to [B, K, H, W], as two products with fixed matrices.

    Compiled, the backward pass of `F.interpolate` adds every gradient to four places of memory, one
    by one: five times the time on a CPU, atomic additions on a GPU.
    """
    rows, columns = (
        # What becomes of a 1 at each place: [large, small].
        F.interpolate(torch.eye(small, device=logits.device)[None], large, mode="linear")[0].T
        for small, large in zip(logits.shape[-2:], size, strict=True)
    )
    with torch.autocast(logits.device.type, enabled=False):
        inner = logits.permute(0, 2, 3, 1)  # [B, h, w, K]: classes last, as the loss wants them
        tall = (rows @ inner.flatten(2)).unflatten(2, inner.shape[2:])  # [B, H, w, K]
        return (columns @ tall).permute(0, 3, 1, 2)


class TrainingLoss(nn.Module):
    """The loss is part of what is compiled: full-size logits of many classes need not be stored."""

    def __init__(self, model: Segmenter, ignore_index: int) -> None:
        super().__init__()
        self.model, self.ignore_index = model, ignore_index

    def forward(self, images: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        """See `Segmenter.forward` and `segmentation_loss`."""
        return segmentation_loss(self.model(images, sizes), labels, self.ignore_index)


def segmentation_loss(logits: Tensor | tuple[Tensor, Tensor], labels: Tensor, ignore_index: int) -> Tensor:
    """Sum of the cross entropy over all pixels whose label counts; 0 if there are none.

    logits [B, K, H, W], or a pair: the second has `AUXILIARY_WEIGHT`. labels [B, H, W], integers.
    """
    if isinstance(logits, tuple):
        main, auxiliary = (segmentation_loss(one, labels, ignore_index) for one in logits)
        return main + AUXILIARY_WEIGHT * auxiliary
    # With the classes innermost, as the decoder leaves them in memory, this is a view.
    by_pixel, classes = logits.float().permute(0, 2, 3, 1).flatten(0, 2), labels.flatten().long()
    return F.cross_entropy(by_pixel, classes, ignore_index=ignore_index, reduction="sum")
