"""The encoder: timm's ViT at any image size, with 3 or 4 input channels, and what it starts from.

For UPerNet it is what BEiT and MAE are finetuned as (Bao et al., arXiv:2106.08254; the MAE of
mmsegmentation): every block has a bias by relative position (Liu et al., arXiv:2103.14030) and a
scale per feature (Touvron et al., arXiv:2103.17239), which start without effect, and what comes
out is the result of four blocks, without a final norm.

Shapes: B images, C channels, H x W pixels, h x w patches, N = h * w tokens, D features, A heads.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.layers import gen_relative_position_index, resize_rel_pos_bias_table_simple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from engine.checkpoint import refuse_misfits
from engine.layers import PatchEmbedding
from engine.vit import IMAGE_CHANNELS, VISIBLE, vit_size
from engine.weights import CLASSIFIERS, describe_vit, read_vit_weights, resample_positions
from segmenter.config import AUTO, EncoderConfig

RELATIVE_POSITIONS = "relative_position_bias_table"
CLASS_TOKEN_DISTANCES = 3  # class token to patch, patch to class token, class token to itself
# Of a file: ignored on purpose is what pretraining alone needs, and classifiers.
IGNORED = ("mask_token", "decoder_", "preencoder.", *CLASSIFIERS)
# May be missing, and then starts fresh: MAE files that end in an average pool have no final norm.
OPTIONAL = ("norm.weight", "norm.bias")
# Of UPerNet's encoder, as pretraining has none of them: they start without effect.
WITHOUT_EFFECT = (RELATIVE_POSITIONS, ".gamma")


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """All that decides the shapes of an encoder's weights, and its arithmetic."""

    model: str
    patch_size: Annotated[int, Field(ge=1, le=16384)]  # pixels per side
    in_channels: Annotated[int, Field(ge=1, le=4)]
    grid: Annotated[int, Field(ge=1, le=16384)]  # patches per side that positions are stored for
    extra_tokens: Annotated[int, Field(ge=0, le=64)] = 0  # registers, or DeiT's distillation token
    embeds_prefix: bool = True  # whether class token and those have position embeddings
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6  # MAE's

    def __post_init__(self) -> None:
        vit_size(self.model)  # raises ValueError if there is none of that name


class Encoder(VisionTransformer):
    """A ViT whose state dict has the names of the official MAE release."""

    # pyramid: as UPerNet wants it. depths: the blocks whose results come out then, else none.

    def __init__(
        self, shape: EncoderShape, *, drop_path: float = 0.0, dropout: float = 0.0, pyramid: bool = False
    ) -> None:
        size = vit_size(shape.model)
        super().__init__(
            img_size=shape.grid * shape.patch_size, dynamic_img_size=True, embed_dim=size.width,
            patch_size=shape.patch_size, in_chans=shape.in_channels, embed_layer=PatchEmbedding,
            depth=size.depth, num_heads=size.heads, num_classes=0, global_pool="",
            reg_tokens=shape.extra_tokens, no_embed_class=not shape.embeds_prefix,
            drop_path_rate=drop_path, pos_drop_rate=dropout,
            proj_drop_rate=dropout, attn_drop_rate=dropout, final_norm=not pyramid,
            norm_layer=functools.partial(nn.LayerNorm, eps=shape.norm_eps),
            init_values=1.0 if pyramid else None,
        )  # fmt: skip
        self.shape = shape
        self.depths = depths_of(size.depth) if pyramid else []
        distances = (2 * shape.grid - 1) ** 2 + CLASS_TOKEN_DISTANCES
        for block in self.blocks if pyramid else ():
            table = nn.Parameter(torch.zeros(distances, size.heads))
            setattr(block.attn, RELATIVE_POSITIONS, table)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:  # type: ignore[override]
        """[B, 3, H, W] normalised pixels, whole patches, to tokens [B, N, D]; four [B, D, h, w]."""
        missing = self.shape.in_channels - images.shape[1]
        if missing:  # further channels say that everything is shown, padding included
            images = F.pad(images, (0, 0, 0, 0, 0, missing), value=VISIBLE)
        if self.depths:
            return self._forward_pyramid(images)
        return self.forward_features(images)[:, self.num_prefix_tokens :]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's hook for layer-wise rates, by names; the final norm comes after the last block."""
        # (timm's own ViT counts the final norm to the last block.)
        return {
            "stem": r"^(?:cls_token|pos_embed|reg_token|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None)],
        }

    def no_weight_decay(self) -> set[str]:
        """timm's hook: embeddings, which are matrices by shape only."""
        # With UPerNet they decay, as in mmsegmentation, whose rule misses them by their prefix.
        return set() if self.depths else {"cls_token", "pos_embed", "reg_token"}

    def _forward_pyramid(self, images: Tensor) -> list[Tensor]:
        rows, columns = (side // self.shape.patch_size for side in images.shape[-2:])
        tokens = self._pos_embed(self.patch_embed(images))  # [B, 1 + N, D]
        # Which row of a table is for each pair of tokens, [1 + N, 1 + N]; shared by all blocks.
        index = gen_relative_position_index((rows, columns), class_token=True, device=tokens.device)
        distances = (2 * rows - 1) * (2 * columns - 1) + CLASS_TOKEN_DISTANCES
        maps = {}
        for number, block in enumerate(self.blocks):
            stored = getattr(block.attn, RELATIVE_POSITIONS)  # of another grid: resampled, bicubic
            size = distances, stored.shape[1]
            table = resize_rel_pos_bias_table_simple(stored, (rows, columns), size)
            bias = table[index].permute(2, 0, 1).contiguous()[None]  # [1, A, 1 + N, 1 + N]
            tokens = block(tokens, attn_mask=bias)
            if number in self.depths:
                patches = tokens[:, self.num_prefix_tokens :].transpose(1, 2)
                maps[number] = patches.unflatten(2, (rows, columns))
        return [maps[number] for number in self.depths]


def depths_of(depth: int) -> list[int]:
    """The blocks, from 0, after a third, half, two thirds and all of a ViT: 3, 5, 7, 11 of 12."""
    return [max(0, round(depth * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 1)]


def read_encoder(
    path: Path, config: EncoderConfig, *, lazily: bool = False, pyramid: bool = False
) -> tuple[dict[str, Tensor], EncoderShape]:
    """Weights of a ViT by their official names, and what they say about it.

    Raises ValueError for any other file, and if it is not the wanted encoder. lazily: for a look.
    pyramid: it is for UPerNet.
    """
    weights = read_vit_weights(path, ignored=IGNORED, lazily=lazily)
    found = describe_vit(weights, path)
    model = found.model if config.model == AUTO else config.model
    if model is None:
        raise ValueError(
            f"{path} is {found.width} wide and {found.depth} deep, which no model here is; give the "
            "--plugin that defines it, or the encoder as timm:FOLDER"
        )
    wanted, asked = vit_size(model).width, config.patch_size
    if found.width != wanted:
        hint = f"; it may be a {found.model}" if found.model else ""
        raise ValueError(f"{path} is {found.width} wide, {model} is {wanted} wide{hint}")
    if asked not in (None, found.patch_size):
        raise ValueError(f"{path} has patches of {found.patch_size} pixels, --patch-size is {asked}")
    if found.in_channels not in (IMAGE_CHANNELS, IMAGE_CHANNELS + 1):
        raise ValueError(f"{path} has {found.in_channels} input channels; 3 or 4 are possible")
    if pyramid and (found.extra_tokens or not found.embeds_prefix):
        raise ValueError(f"{path} has registers, which --decoder upernet does not know; give timm:FOLDER")
    shape = EncoderShape(
        model=model, patch_size=found.patch_size, in_channels=found.in_channels, grid=found.grid,
        extra_tokens=found.extra_tokens, embeds_prefix=found.embeds_prefix,
    )  # fmt: skip
    with torch.device("meta"):  # no memory is taken, no random number drawn
        own = Encoder(shape).state_dict()
    refuse_misfits(own, weights, f"{path} does not fit", OPTIONAL)
    return weights, shape


def start_encoder(encoder: Encoder, weights: dict[str, Tensor]) -> list[str]:
    """Copy what `read_encoder` found; return the names of the weights that start fresh."""
    weights = resample_positions(weights, encoder.shape.grid)
    own = encoder.state_dict()
    if encoder.depths:  # UPerNet's has no final norm, and parts that are new
        weights = {n: weight for n, weight in weights.items() if not n.startswith(OPTIONAL)}
        own = {n: weight for n, weight in own.items() if not n.endswith(WITHOUT_EFFECT)}
    encoder.load_state_dict(weights, strict=False)
    return [name for name in own if name not in weights]
