"""The encoder: timm's ViT at any image size, with 3 or 4 input channels.

For UPerNet it is what BEiT and MAE are finetuned as (Bao et al., arXiv:2106.08254; the MAE of
mmsegmentation): every block has a bias by relative position (Liu et al., arXiv:2103.14030) and a
scale per feature (Touvron et al., arXiv:2103.17239), which start without effect, and what comes
out is the result of four blocks, without a final norm.

Shapes: B images, C channels, H x W pixels, h x w patches, N = h * w tokens, D features, A heads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from timm.layers import gen_relative_position_index, resize_rel_pos_bias_table_simple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from engine.layers import PatchEmbedding
from engine.vit import VISIBLE, vit_size

MAE_NORM_EPS = 1e-6
POSITIONS, RELATIVE_POSITIONS = "pos_embed", "relative_position_bias_table"
CLASS_TOKEN_DISTANCES = 3  # class token to patch, patch to class token, class token to itself


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
    """A ViT whose state dict has the names of the official MAE release.

    pyramid: as UPerNet wants it. depths: the blocks whose results come out then, else none.
    """

    def __init__(
        self,
        shape: EncoderShape,
        *,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        pyramid: bool = False,
    ) -> None:
        size = vit_size(shape.model)
        super().__init__(
            img_size=shape.grid * shape.patch_size,
            patch_size=shape.patch_size,
            embed_layer=PatchEmbedding,
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
            init_values=1.0 if pyramid else None,
            final_norm=not pyramid,
        )
        self.shape = shape
        self.depths = depths_of(size.depth) if pyramid else []
        distances = (2 * shape.grid - 1) ** 2 + CLASS_TOKEN_DISTANCES
        for block in self.blocks if pyramid else ():
            table = nn.Parameter(torch.zeros(distances, size.heads))
            setattr(block.attn, RELATIVE_POSITIONS, table)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:  # type: ignore[override]
        """[B, 3, H, W] normalised pixels to patch tokens [B, N, D]; H, W multiples of a patch.

        As a pyramid: to a list of four [B, D, h, w].
        """
        missing = self.shape.in_channels - images.shape[1]
        if missing:  # further channels say that everything is shown, padding included
            images = F.pad(images, (0, 0, 0, 0, 0, missing), value=VISIBLE)
        if self.depths:
            return self._forward_pyramid(images)
        return self.forward_features(images)[:, self.num_prefix_tokens :]

    def _forward_pyramid(self, images: Tensor) -> list[Tensor]:
        rows, columns = (side // self.shape.patch_size for side in images.shape[-2:])
        tokens = self._pos_embed(self.patch_embed(images))
        index = gen_relative_position_index((rows, columns), class_token=True, device=tokens.device)
        distances = (2 * rows - 1) * (2 * columns - 1) + CLASS_TOKEN_DISTANCES
        maps = {}
        for number, block in enumerate(self.blocks):
            stored = getattr(block.attn, RELATIVE_POSITIONS)  # of another grid: resampled, bicubic
            table = resize_rel_pos_bias_table_simple(
                stored, (rows, columns), (distances, stored.shape[1])
            )
            bias = table[index].permute(2, 0, 1).contiguous()[None]  # [1, A, 1 + N, 1 + N]
            tokens = block(tokens, attn_mask=bias)
            if number in self.depths:
                patches = tokens[:, self.num_prefix_tokens :].transpose(1, 2)
                maps[number] = patches.unflatten(2, (rows, columns))
        return [maps[number] for number in self.depths]


def depths_of(depth: int) -> list[int]:
    """The blocks, from 0, after a third, half, two thirds and all of a ViT: 3, 5, 7, 11 of 12."""
    return [max(0, round(depth * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
