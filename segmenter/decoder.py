"""The two decoders of Segmenter (Strudel et al., ICCV 2021, arXiv:2105.05633, section 3.2).

The names of the weights are those of its release. Shapes: B images, N = h * w patches, D encoder
features, K classes.
"""

from __future__ import annotations

import functools

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WIDTH = 64  # features per attention head
NORM_EPS = 1e-5
INIT_STD = 0.02


class LinearDecoder(nn.Module):
    """Classes from every patch token by itself."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, num_classes)
        self.apply(_init_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to class logits [B, N, K]."""
        return self.head(tokens)


class MaskTransformer(nn.Module):
    """Class embeddings travel with the patches through a few blocks; their products are logits."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        layers: int = 2,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        rates = torch.linspace(0, drop_path, layers).tolist()
        self.blocks = nn.ModuleList(
            Block(
                width,
                max(1, width // HEAD_WIDTH),
                qkv_bias=True,
                proj_drop=dropout,
                attn_drop=dropout,
                drop_path=rate,
                norm_layer=functools.partial(nn.LayerNorm, eps=NORM_EPS),  # type: ignore[arg-type]
            )
            for rate in rates
        )
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, width))
        self.proj_dec = nn.Linear(width, width)
        self.proj_patch = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.proj_classes = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mask_norm = nn.LayerNorm(num_classes, eps=NORM_EPS)
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.cls_emb, std=INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to class logits [B, N, K]."""
        classes = self.cls_emb.expand(len(tokens), -1, -1)
        joint = torch.cat([self.proj_dec(tokens), classes], dim=1)  # [B, N + K, D]
        for block in self.blocks:
            joint = block(joint)
        joint = self.decoder_norm(joint)
        patches, classes = joint.split([tokens.shape[1], self.num_classes], dim=1)
        patches = F.normalize(patches @ self.proj_patch, dim=-1)
        classes = F.normalize(classes @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
