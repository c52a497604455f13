"""The two decoders of Segmenter (Strudel et al., ICCV 2021, arXiv:2105.05633, section 3.2), and
UPerNet (Xiao et al., ECCV 2018, arXiv:1807.10221) as mmsegmentation finetunes MAE with it.

The names of the weights are those of their releases. Shapes: B images, N = h * w patches, D encoder
features, K classes.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from segmenter.config import AUXILIARY_WIDTH
from segmenter.dataset import quiet_imports

NORM_EPS = 1e-5
INIT_STD = 0.02
AUXILIARY_WEIGHT = 0.4  # in the loss; UPerNet as mmsegmentation's upernet_mae.py has it


class LinearDecoder(nn.Module):
    """Classes from every patch token by itself."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, num_classes)
        _init_weights(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to class logits [B, N, K]."""
        return self.head(tokens)


class MaskTransformer(nn.Module):
    """Class embeddings travel with the patches through a few blocks; their products are logits."""

    def __init__(
        self, width: int, num_classes: int, *, layers: int = 2, drop_path: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        block: dict[str, Any] = {
            "dim": width, "num_heads": max(1, width // 64), "qkv_bias": True,
            "proj_drop": dropout, "attn_drop": dropout,
            "norm_layer": functools.partial(nn.LayerNorm, eps=NORM_EPS),
        }  # fmt: skip
        rates = torch.linspace(0, drop_path, layers).tolist()  # rising, as the encoder's
        self.blocks = nn.ModuleList(Block(drop_path=rate, **block) for rate in rates)
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, width))
        self.proj_dec = nn.Linear(width, width)
        self.proj_patch = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.proj_classes = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mask_norm = nn.LayerNorm(num_classes, eps=NORM_EPS)
        _init_weights(self)
        nn.init.trunc_normal_(self.cls_emb, std=INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to class logits [B, N, K]."""
        classes = self.cls_emb.expand(len(tokens), -1, -1)
        joint = torch.cat([self.proj_dec(tokens), classes], dim=1)  # [B, N + K, D]
        for block in self.blocks:
            joint = block(joint)
        joint = self.decoder_norm(joint)
        # Cosines of patches and classes, normed over the classes of each patch: [B, N, K].
        patches, classes = joint.split([tokens.shape[1], self.num_classes], dim=1)
        patches = F.normalize(patches @ self.proj_patch, dim=-1)
        classes = F.normalize(classes @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2))


class UPerNet(nn.Module):
    """mmsegmentation's feature pyramid, UPerHead, and the FCN head that trains beside it."""

    # dropout: of whole feature maps before the classifiers. is_pyramid: the four maps have strides
    # of 4, 8, 16, 32, as those of stages have.
    def __init__(
        self, widths: Sequence[int], num_classes: int, *, dropout: float = 0.0, is_pyramid: bool = False
    ) -> None:
        super().__init__()
        width = widths[-1]
        with quiet_imports():  # seconds
            from mmseg.models.decode_heads import FCNHead, UPerHead
            from mmseg.models.necks import Feature2Pyramid

            norm = {"type": "BN"}
            # out_channels: without it two classes would be warned about, one takes the other way.
            common: dict[str, Any] = {
                "num_classes": num_classes, "out_channels": num_classes, "dropout_ratio": dropout,
                "norm_cfg": norm, "align_corners": False,
            }  # fmt: skip
            # The four depths to strides 4, 8, 16, 32 for patches of 16.
            self.neck = nn.Identity() if is_pyramid else Feature2Pyramid(width, [4, 2, 1, 0.5], norm_cfg=norm)
            depths = {"in_channels": list(widths), "in_index": [0, 1, 2, 3]}
            self.decode_head = UPerHead(channels=width, **depths, **common)
            third = {"in_channels": widths[2], "in_index": 2, "num_convs": 1, "concat_input": False}
            self.auxiliary_head = FCNHead(channels=AUXILIARY_WIDTH, **third, **common)
        for head in (self.decode_head, self.auxiliary_head):
            nn.init.normal_(head.conv_seg.weight, std=0.01)
            nn.init.zeros_(head.conv_seg.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Four [B, D, h, w] to class logits [B, K, 4h, 4w], and in training [B, K, h, w] beside."""
        pyramid = self.neck(features)
        heads = [self.decode_head, self.auxiliary_head] if self.training else [self.decode_head]
        # Classes innermost in memory, as the other decoders leave them.
        return [head(pyramid).contiguous(memory_format=torch.channels_last) for head in heads]


def _init_weights(decoder: nn.Module) -> None:
    for layer in (module for module in decoder.modules() if isinstance(module, nn.Linear)):
        nn.init.trunc_normal_(layer.weight, std=INIT_STD)
        nn.init.zeros_(layer.bias)
