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


def lower_precision(model: nn.Module, precision: str) -> None:
    """What a precision has beyond autocast: tokens in bf16 from block to block, float8 in the encoder's.

    float8: torchao's dynamic scaling of whole tensors; parameters keep their names and stay fp32.
    Raises ValueError if torchao is not there, or the GPU has no float8.
    """
    if precision not in ("bf16-residual", "float8"):
        return
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(_in_bf16)
    if precision == "float8":
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ImportError:
            raise ValueError("--precision float8 needs torchao: python -m pip install torchao") from None
        on_gpu = next(model.parameters()).is_cuda
        if on_gpu and (capability := torch.cuda.get_device_capability()) < (8, 9):
            major, minor = capability
            raise ValueError(f"--precision float8: this GPU is sm_{major}{minor}, float8 begins at sm_89")
        convert_to_float8_training(
            model, module_filter_fn=lambda module, name: "blocks." in name and "decoder" not in name,
            config=Float8LinearConfig(emulate=not on_gpu, pad_inner_dim=True),
        )  # fmt: skip


def _in_bf16(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Positions and tokens that do not come from a matrix product are fp32."""
    tokens, *others = inputs
    lower = torch.is_autocast_enabled(tokens.device.type)  # pictures are drawn without
    return (tokens.to(torch.bfloat16) if lower else tokens, *others)
