"""`patches` is MAE: an independent implementation gets the same numbers."""

import pytest
import torch
from timm.layers import build_sincos2d_pos_embed
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae.config import MethodConfig, ModelConfig, make_method
from mae.masking import patchify
from mae.model import MaskedAutoencoder, sincos_positions

SIZES = {
    "vit_tiny": {"image_size": 64, "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4},
    "vit_base": {"image_size": 224},
}


def _ours(model_name, norm_pix_loss):
    torch.manual_seed(0)
    config = ModelConfig(model=model_name, norm_pix_loss=norm_pix_loss, **SIZES[model_name])
    return MaskedAutoencoder(config, make_method(MethodConfig(mask_method="patches"), config))


def _theirs(config):
    encoder = config.encoder
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=encoder.width,
            num_hidden_layers=encoder.depth,
            num_attention_heads=encoder.heads,
            intermediate_size=4 * encoder.width,
            image_size=config.image_size,
            patch_size=config.patch_pixels,
            decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=4 * config.decoder_width,
            norm_pix_loss=config.norm_pix_loss,
            layer_norm_eps=1e-6,
        )
    )


def _translate(name, tensor):
    """One of our weights or gradients to (name, tensor) pairs in transformers' names."""
    if ".attn.qkv." in name:
        prefix, kind = name.split(".attn.qkv.")
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            yield _rename(f"{prefix}.attention.{part}_proj.{kind}"), piece
    else:
        yield _rename(name), tensor


def _rename(name):
    for ours, theirs in (
        (".attn.proj.", ".attention.o_proj."),
        ("norm1.", "layernorm_before."),
        ("norm2.", "layernorm_after."),
        ("patch_embed.proj.", "patch_embeddings.projection."),
        ("pos_embed", "position_embeddings"),
        ("decoder_blocks.", "decoder_layers."),
        ("decoder_position_embeddings", "decoder_pos_embed"),
    ):
        name = name.replace(ours, theirs)
    if name.startswith(("decoder", "mask_token")):
        return f"decoder.{name}"
    if name.startswith("blocks."):
        return f"vit.layers.{name.removeprefix('blocks.')}"
    if name.startswith("norm."):
        return f"vit.layernorm.{name.removeprefix('norm.')}"
    return f"vit.embeddings.{name}"


def _translated(tensors):
    return dict(pair for name, tensor in tensors for pair in _translate(name, tensor))


@pytest.mark.parametrize(
    ("model_name", "norm_pix_loss"),
    [("vit_tiny", False), ("vit_tiny", True), pytest.param("vit_base", True, marks=pytest.mark.slow)],
)
def test_patches_has_the_loss_prediction_and_gradients_of_transformers(model_name, norm_pix_loss):
    ours = _ours(model_name, norm_pix_loss)
    config = ours.config
    with torch.device("meta"):  # without weights of its own
        theirs = _theirs(config)
    theirs.load_state_dict(_translated(ours.state_dict().items()), assign=True)

    images = torch.randn(2, 3, config.image_size, config.image_size)
    noise = torch.rand(2, config.num_patches)
    expected = theirs(images, noise=noise)
    expected.loss.backward()

    view = ours.method.view(images, noise)
    predicted = ours.decode(ours.encode(view), view)
    hidden_values = 2 * 0.75 * config.num_patches * config.patch_pixels**2 * 3
    loss = ours.squared_error(images, noise).sum() / hidden_values
    loss.backward()

    assert torch.equal(view.hidden.squeeze(-1), expected.mask)
    assert torch.allclose(predicted, expected.logits, atol=1e-5)
    assert torch.allclose(loss, expected.loss, atol=1e-5)
    gradients = _translated((n, p.grad) for n, p in ours.named_parameters() if p.requires_grad)
    references = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == references.keys()
    for name, reference in references.items():
        assert torch.allclose(gradients[name], reference, atol=1e-5), name


def test_position_embeddings_are_sines_and_cosines_of_column_then_row():
    """timm has the same values as sines of row and column, then cosines of row and column."""
    sine_row, sine_column, cosine_row, cosine_column = build_sincos2d_pos_embed([5, 5], 64).chunk(4, 1)
    expected = torch.cat([sine_column, cosine_column, sine_row, cosine_row], dim=1)
    positions = sincos_positions(5, 64)
    assert torch.equal(positions[0], torch.zeros(64))
    assert torch.allclose(positions[1:], expected, atol=1e-5)


def test_patchify_lays_pixels_out_as_transformers_does():
    theirs = _theirs(ModelConfig(model="vit_tiny", **SIZES["vit_tiny"]))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(patchify(images, 16), theirs.patchify(images))
