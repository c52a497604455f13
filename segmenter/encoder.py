"""The encoder: timm's ViT at any image size, with 3 or 4 input channels.

Shapes: B images, C channels, H x W pixels, h x w patches, N = h * w tokens, D features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from common.vit import VISIBLE, vit_size

MAE_NORM_EPS = 1e-6
POSITIONS = "pos_embed"


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """All that decides the shapes of an encoder's weights, and its arithmetic.

    model: a key of `VIT_SIZES`; patch_size: pixels per side; in_channels: 3, or 4.
    grid: patches per side that the position embeddings are stored for.
    extra_tokens: tokens beside patches and class token (1: the distillation token of DeiT).
    norm_eps: of the layer norms.
    """

    model: str
    patch_size: Annotated[int, Field(ge=1, le=16384)]
    in_channels: Annotated[int, Field(ge=1, le=4)]
    grid: Annotated[int, Field(ge=1, le=16384)]
    extra_tokens: Annotated[int, Field(ge=0, le=1)] = 0
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = MAE_NORM_EPS


class Encoder(VisionTransformer):
    """A ViT whose state dict has the names of the official MAE release."""

    def __init__(self, shape: EncoderShape, *, drop_path: float = 0.0, dropout: float = 0.0):
        size = vit_size(shape.model)
        super().__init__(
            img_size=shape.grid * shape.patch_size,
            patch_size=shape.patch_size,
            in_chans=shape.in_channels,
            num_classes=0,
            global_pool="",
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            reg_tokens=shape.extra_tokens,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
            attn_drop_rate=dropout,
            norm_layer=functools.partial(nn.LayerNorm, eps=shape.norm_eps),
        )
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """[B, 3, H, W] normalised pixels to patch tokens [B, N, D]; H, W multiples of a patch."""
        missing = self.shape.in_channels - images.shape[1]
        if missing:  # further channels say that everything is shown, padding included
            images = F.pad(images, (0, 0, 0, 0, 0, missing), value=VISIBLE)
        return self.forward_features(images)[:, self.num_prefix_tokens :]
