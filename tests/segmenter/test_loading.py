"""Weights from elsewhere: MAE pretraining, timm, and the release of Segmenter."""

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from segmenter.config import ModelConfig
from segmenter.encoder import (
    Encoder,
    EncoderShape,
    read_encoder,
    start_encoder,
)
from segmenter.loading import load_segmenter

MODEL = ModelConfig(
    model="vit_tiny", decoder="linear", decoder_layers=1, drop_path=0.0, dropout=0.0,
    decoder_drop_path=0.0, decoder_dropout=0.0,
)  # fmt: skip


def encoder_weights(in_channels=3, grid=4, patch_size=16):
    torch.manual_seed(0)
    shape = EncoderShape(model="vit_tiny", patch_size=patch_size, in_channels=in_channels, grid=grid)
    return Encoder(shape).state_dict()


PRETRAINING_ONLY = {
    "mask_token": torch.zeros(1, 1, 64),
    "decoder_pos_embed": torch.zeros(1, 17, 64),
    "decoder_embed.weight": torch.zeros(64, 192),
    "decoder_blocks.0.attn.qkv.weight": torch.zeros(192, 64),
    "preencoder.weight": torch.zeros(3, 4, 16, 16),
}


def start(path, grid=4):
    weights, shape = read_encoder(path, MODEL)
    encoder = Encoder(
        EncoderShape(model="vit_tiny", patch_size=shape.patch_size, in_channels=shape.in_channels, grid=grid)
    )
    return encoder, start_encoder(encoder, weights)


@pytest.mark.parametrize("in_channels", [3, 4])
def test_an_mae_checkpoint_gives_its_encoder_and_nothing_else(tmp_path, in_channels):
    weights, path = encoder_weights(in_channels), tmp_path / "mae.pth"
    torch.save({"model": {**weights, **PRETRAINING_ONLY}, "config": {"seed": 0}}, path)
    encoder, fresh = start(path)
    assert fresh == []
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_missing_final_norm_starts_fresh_and_is_listed(tmp_path):
    weights, path = encoder_weights(), tmp_path / "mae.pth"
    kept = {name: weight for name, weight in weights.items() if not name.startswith("norm.")}
    torch.save({"model": kept}, path)
    assert start(path)[1] == ["norm.weight", "norm.bias"]


def test_timm_and_safetensors_files_load(tmp_path):
    weights = timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict()
    torch.save(weights, tmp_path / "timm.pth")
    save_file(weights, tmp_path / "timm.safetensors")
    for name in ("timm.pth", "timm.safetensors"):
        encoder, fresh = start(tmp_path / name, grid=14)
        assert fresh == []
        assert torch.equal(encoder.pos_embed, weights["pos_embed"])


def test_position_embeddings_are_resampled_to_the_crop(tmp_path):
    path = tmp_path / "mae.pth"
    weights = encoder_weights(grid=4)
    torch.save({"model": weights}, path)
    encoder, _ = start(path, grid=6)
    assert encoder.pos_embed.shape == (1, 37, 192)
    assert torch.equal(encoder.pos_embed[:, 0], weights["pos_embed"][:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(surprise=torch.zeros(1)), "surprise is not part of the model"),
        (lambda w: w.pop("blocks.3.mlp.fc1.bias"), r"blocks\.3\.mlp\.fc1\.bias is missing"),
        (lambda w: w.update({"cls_token": torch.zeros(1, 2, 192)}), "cls_token is"),
        (lambda w: w.pop("patch_embed.proj.weight"), "is not a checkpoint of a ViT encoder"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 15, 192)), "no pos_embed of a class token"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    weights, path = encoder_weights(), tmp_path / "mae.pth"
    change(weights)
    torch.save({"model": weights}, path)
    with pytest.raises(ValueError, match=message):
        read_encoder(path, MODEL)


def test_another_model_or_patch_is_named(tmp_path):
    import dataclasses

    path = tmp_path / "mae.pth"
    torch.save({"model": encoder_weights()}, path)
    with pytest.raises(ValueError, match="192 wide, vit_small is 384 wide; it may be a vit_tiny"):
        read_encoder(path, dataclasses.replace(MODEL, model="vit_small"))
    with pytest.raises(ValueError, match="patches of 16 pixels, --patch-size is 8"):
        read_encoder(path, dataclasses.replace(MODEL, patch_size=8))


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    path = tmp_path / "mae.pth"
    path.write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_encoder(path, MODEL)


RELEASE_BLOCK = {
    "norm1.weight": (192,), "norm1.bias": (192,), "norm2.weight": (192,), "norm2.bias": (192,),
    "attn.qkv.weight": (576, 192), "attn.qkv.bias": (576,),
    "attn.proj.weight": (192, 192), "attn.proj.bias": (192,),
    "mlp.fc1.weight": (768, 192), "mlp.fc1.bias": (768,),
    "mlp.fc2.weight": (192, 768), "mlp.fc2.bias": (192,),
}  # fmt: skip


def write_release(folder, distilled):
    """A file with the names of Segmenter's release, and its variant.yml."""
    extra = 1 + distilled
    shapes = {
        "encoder.cls_token": (1, 1, 192), "encoder.pos_embed": (1, 4 * 4 + extra, 192),
        "encoder.patch_embed.proj.weight": (192, 3, 16, 16),
        "encoder.patch_embed.proj.bias": (192,),
        "encoder.norm.weight": (192,), "encoder.norm.bias": (192,),
        "encoder.head.weight": (1000, 192), "encoder.head.bias": (1000,),
        "decoder.cls_emb": (1, 150, 192),
        "decoder.proj_dec.weight": (192, 192), "decoder.proj_dec.bias": (192,),
        "decoder.proj_patch": (192, 192), "decoder.proj_classes": (192, 192),
        "decoder.decoder_norm.weight": (192,), "decoder.decoder_norm.bias": (192,),
        "decoder.mask_norm.weight": (150,), "decoder.mask_norm.bias": (150,),
    }  # fmt: skip
    if distilled:
        shapes |= {"encoder.dist_token": (1, 1, 192), "encoder.head_dist.weight": (1000, 192)}
    for name, shape in RELEASE_BLOCK.items():
        shapes |= {f"encoder.blocks.{number}.{name}": shape for number in range(12)}
        shapes |= {f"decoder.blocks.{number}.{name}": shape for number in range(2)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    torch.save({"model": weights, "epoch": 63, "n_cls": 150}, folder / "checkpoint.pth")
    variant = {
        "net_kwargs": {
            "backbone": "vit_tiny_patch16_384", "image_size": (64, 64), "patch_size": 16,
            "d_model": 192, "n_heads": 3, "n_layers": 12, "normalization": "vit",
            "distilled": distilled, "dropout": 0.0, "drop_path_rate": 0.1, "n_cls": 150,
            "decoder": {"name": "mask_transformer", "n_layers": 2, "dropout": 0.1,
                        "drop_path_rate": 0.0},
        },
        "dataset_kwargs": {"dataset": "ade20k", "crop_size": 64, "normalization": "vit"},
        "inference_kwargs": {"im_size": 64, "window_size": 64, "window_stride": 48},
    }  # fmt: skip
    (folder / "variant.yml").write_text(yaml.dump(variant))  # with Python's tuples, as released
    return folder / "checkpoint.pth", weights


@pytest.mark.parametrize("distilled", [False, True])
def test_a_released_segmenter_loads_with_its_variant(tmp_path, distilled):
    path, weights = write_release(tmp_path, distilled)
    assert "python/tuple" in (tmp_path / "variant.yml").read_text()
    loaded = load_segmenter(path)
    assert len(loaded.classes.names) == 150
    assert loaded.reduce_zero_label
    assert (loaded.protocol.window_stride, loaded.protocol.normalization) == (48, "half")
    assert loaded.model.encoder.num_prefix_tokens == 1 + distilled
    assert loaded.model.encoder.norm.eps == 1e-5
    assert torch.equal(loaded.model.decoder.proj_patch, weights["decoder.proj_patch"])
    with torch.no_grad():
        logits = loaded.model(torch.zeros(1, 3, 50, 70, dtype=torch.uint8))
    assert logits.shape == (1, 150, 50, 70)


def test_a_release_that_does_not_fit_its_variant_is_refused(tmp_path):
    path, weights = write_release(tmp_path, False)
    del weights["decoder.cls_emb"]
    torch.save({"model": weights}, path)
    with pytest.raises(ValueError, match=r"decoder\.cls_emb is missing"):
        load_segmenter(path)
    (tmp_path / "variant.yml").write_text("net_kwargs: {}\ninference_kwargs: {}\n")
    with pytest.raises(ValueError, match=r"and its variant\.yml are no Segmenter"):
        load_segmenter(path)
