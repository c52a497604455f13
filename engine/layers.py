"""What the ViTs of both parts are built with, beyond timm's layers."""

import functools

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class PatchEmbedding(PatchEmbed):
    """timm's, its convolution computed as one matrix product; the weights keep name and shape.

    B images, C channels, h x w patches of P x P pixels, K kept ones, D features.
    """

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """[B, C, h * P, w * P] to [B, h * w, D], or as timm's `flatten` says to [B, h, w, D].

        ids_keep: [B, K], the patches that are wanted: to [B, K, D].
        """
        patch = self.proj.kernel_size[0]
        tiles = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, C, h, P, w, P]
        tiles = tiles.permute(0, 2, 4, 1, 3, 5)  # a view, as the convolution orders its weights
        if ids_keep is not None:
            columns = tiles.shape[2]
            image = torch.arange(len(images), device=images.device)[:, None]
            tiles = tiles[image, ids_keep // columns, ids_keep % columns]  # [B, K, C, P, P]
        elif self.flatten:
            tiles = tiles.flatten(1, 2)
        return F.linear(tiles.flatten(-3), self.proj.weight.flatten(1), self.proj.bias)


def recompute_activations(model: nn.Module) -> None:
    """Let each transformer block keep only its input, and compute the rest again when asked back.

    Chen et al. 2016, arXiv:1604.06174. Dropout draws the same numbers again.
    """
    for module in model.modules():
        if isinstance(module, Block):
            forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
            module.forward = forward  # type: ignore[method-assign]
