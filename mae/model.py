"""The masked autoencoder (He et al. 2022, arXiv:2111.06377) for all masking methods.

Names in the state dict are those of the official MAE release, so that its checkpoints load here
and ours load there. B images, C channels, H x W pixels, P patch size, N patches, D encoder width,
E decoder width.
"""

import torch
from timm.layers import LayerNorm  # its eps is 1e-6
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from engine.layers import PatchEmbedding
from engine.vit import IMAGE_CHANNELS, IMAGE_MEAN, IMAGE_STD
from mae.config import ModelConfig
from mae.masking import MaskedView, MaskingMethod, patchify, unpatchify

PATCH_VARIANCE_EPSILON = 1e-6


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder, and a masking method that is chosen once, here."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, method: MaskingMethod) -> None:
        super().__init__()
        self.config = config
        self.method = method
        encoder, num_patches = config.encoder, config.num_patches

        preencoder = method.preencoder(IMAGE_CHANNELS)
        self.preencoder = preencoder if preencoder is not None else nn.Identity()
        channels = IMAGE_CHANNELS + method.extra_channels
        self.patch_embed = PatchEmbedding(config.image_size, config.patch_pixels, channels, encoder.width)
        # No class is learned, but a finetuned ViT may want the token (as the official encoder).
        self.cls_token = nn.Parameter(torch.zeros(1, 1, encoder.width))
        self.pos_embed = _fixed_positions(num_patches, encoder.width)
        self.blocks = nn.ModuleList(
            Block(encoder.width, encoder.heads, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(encoder.depth)
        )
        self.norm = LayerNorm(encoder.width)

        self.decoder_embed = nn.Linear(encoder.width, config.decoder_width)
        # A method that keeps all tokens has no use for the mask token; it stays in the file, as in
        # the official one, but takes no gradient: DDP need not look for unused parameters.
        self.mask_token = nn.Parameter(
            torch.zeros(1, 1, config.decoder_width), requires_grad=method.removes_tokens
        )
        self.decoder_pos_embed = _fixed_positions(num_patches, config.decoder_width)
        self.decoder_blocks = nn.ModuleList(
            Block(config.decoder_width, config.decoder_heads, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = LayerNorm(config.decoder_width)
        self.decoder_pred = nn.Linear(config.decoder_width, config.patch_pixels**2 * IMAGE_CHANNELS)

        # Constants: they move to the device with the model, and are no part of checkpoints.
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(1, -1, 1, 1), persistent=False)
        self._initialise()

    def forward(self, images_uint8: Tensor, pattern: Tensor) -> Tensor:
        """Squared error of each image, summed over its hidden pixels and channels: [B] float32.

        images_uint8: [B, C, H, W], 0 to 255; pattern: [B, ...] as the masking method draws it.
        """
        return self.squared_error(self.normalise(images_uint8), pattern)

    def normalise(self, images_uint8: Tensor) -> Tensor:
        """[B, C, H, W] uint8 to float32 with ImageNet's mean 0 and deviation 1."""
        return (images_uint8.float() / 255 - self.mean) / self.std

    def squared_error(self, images: Tensor, pattern: Tensor) -> Tensor:
        """As `forward`, from normalised images [B, C, H, W] float32."""
        view = self.method.view(images, pattern)
        predicted = self.decode(self.encode(view), view).float()
        target = self.target(images)
        # In fp32 whatever the precision: bf16's 8 bits would be lost in a sum of so many.
        error = (predicted - target).square().unflatten(-1, (-1, IMAGE_CHANNELS))  # [B, N, P*P, C]
        return (error * view.hidden.unsqueeze(-1)).sum(dim=(1, 2, 3))

    def encode(self, view: MaskedView) -> Tensor:
        """Class token and kept patches, encoded and normalised: [B, 1 + K, D]."""
        # Only what is kept costs anything from here on: MAE's saving of three quarters.
        positions = self.pos_embed[:, 1:]
        if view.ids_keep is not None:
            positions = _pick(positions.expand(len(view.ids_keep), -1, -1), view.ids_keep)
        # On CPUs with AMX, oneDNN computes the pre-encoder's convolution wrongly in bf16 (from 4
        # channels to 3, kernel 16: off by its own size): in fp32 there. A GPU's autocast goes on.
        with torch.autocast("cpu", enabled=False):
            pixels = self.preencoder(view.encoder_input)
        tokens = self.patch_embed(pixels, view.ids_keep) + positions  # [B, K, D]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls_token, tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def decode(self, encoded: Tensor, view: MaskedView) -> Tensor:
        """Predicted patches [B, N, P * P * C], laid out as `patchify` does."""
        tokens = self.decoder_embed(encoded)
        if view.ids_restore is not None:
            cls_token, kept = tokens[:, :1], tokens[:, 1:]
            num_removed = view.ids_restore.shape[1] - kept.shape[1]
            # Appended at the end, where `ids_restore` expects the removed ones, then put in order.
            mask_tokens = self.mask_token.to(kept.dtype).expand(len(kept), num_removed, -1)
            patches = _pick(torch.cat([kept, mask_tokens], dim=1), view.ids_restore)
            tokens = torch.cat([cls_token, patches], dim=1)
        tokens = tokens + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens)[:, 1:])

    def target(self, images: Tensor) -> Tensor:
        """What the decoder should predict: [B, N, P * P * C]."""
        patches = patchify(images, self.config.patch_pixels)
        if not self.config.norm_pix_loss:
            return patches
        mean, deviation = _patch_statistics(patches)
        return (patches - mean) / deviation

    @torch.no_grad()
    def reconstruct(self, images: Tensor, pattern: Tensor) -> Tensor:
        """Predict normalised images [B, C, H, W] from what their patterns show.

        Under norm-pix-loss a prediction is relative to its patch; the patch's true mean and
        deviation bring it back to colours.
        """
        view = self.method.view(images, pattern)
        predicted = self.decode(self.encode(view), view).float()
        if self.config.norm_pix_loss:
            mean, deviation = _patch_statistics(patchify(images, self.config.patch_pixels))
            predicted = predicted * deviation + mean
        return unpatchify(predicted, self.config.patch_pixels)

    def _initialise(self) -> None:
        """Initial weights as MAE has them: Xavier for matrices, 0.02 for tokens."""
        for part in (self.blocks, self.decoder_blocks, self.decoder_embed, self.decoder_pred):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer in the form of a convolution.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.encoder.width, -1))
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)


def sincos_positions(side: int, width: int) -> Tensor:
    """Two-dimensional sine-cosine position embeddings [1 + side * side, width], class token first.

    Half of the width encodes the column, half the row (Chen et al. 2021, arXiv:2104.02057), each
    as sines then cosines at `width / 4` frequencies from 1 down to 1/10000. The class token has 0.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [side, width / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    patches = torch.cat([columns, rows], dim=2).reshape(side * side, width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float()


def _fixed_positions(num_patches: int, width: int) -> nn.Parameter:
    """[1, 1 + N, width], not trained."""
    positions = sincos_positions(round(num_patches**0.5), width)
    return nn.Parameter(positions.unsqueeze(0), requires_grad=False)


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, N, D] at index [B, K]: [B, K, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [B, N, 1] of each patch over all its pixels, hidden or not."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return mean, (variance + PATCH_VARIANCE_EPSILON).sqrt()
