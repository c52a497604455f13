"""Weights come in from official checkpoints and go out as plain ViTs."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from engine.vit import IMAGE_MEAN, IMAGE_STD, VISIBLE, VIT_SIZES, VitSize
from engine.weights import CLASSIFIERS, read_vit_weights, resample_positions
from mae.config import METHODS, MethodConfig, ModelConfig, make_method
from mae.model import MaskedAutoencoder, sincos_positions
from mae.weights import export_encoder, load_encoder, start_from_official
from tests.mae.conftest import make_config

TINY = ModelConfig(model="vit_tiny", decoder_width=64, decoder_depth=1, decoder_heads=4)


def make_model(mask_method, config=TINY, seed=0):
    torch.manual_seed(seed)
    method = make_method(MethodConfig(mask_method=mask_method), config)
    return MaskedAutoencoder(config, method).eval()


def save_run(model, mask_method, path, /, **options):
    options = {"model": "vit_tiny", "image_size": 224, "decoder_width": 64, **options}
    settings = make_config(".", ".", mask_method=mask_method, **options)
    content = {"model": model.state_dict(), "optimizer": {}, "config": settings.settings()}
    progress = {"epochs_completed": 3, "steps_completed": 0, "format_version": 1}
    for_drawing = {"images": {"count": 0, "digest": ""}, "fixed_set": {}}
    torch.save({**content, **progress, **for_drawing}, path)


@pytest.mark.parametrize("mask_method", METHODS)
def test_export_loads_into_timm_without_missing_or_unexpected_keys(tmp_path, mask_method):
    model = make_model(mask_method)
    save_run(model, mask_method, tmp_path / "checkpoint-3.pth")
    out = tmp_path / "encoder.safetensors"
    plain = eval(export_encoder(tmp_path / "checkpoint-3.pth", out), {"timm": timm})
    assert load_file(out)["patch_embed.proj.weight"].shape == (192, 3, 16, 16)
    for name, weight in plain.state_dict().items():
        if not name.startswith("patch_embed"):
            assert torch.equal(weight, model.state_dict()[name]), name
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_four_channels_folds_into_three_with_equal_outputs(tmp_path):
    model = make_model("four_channels")
    save_run(model, "four_channels", tmp_path / "checkpoint-3.pth")
    out = tmp_path / "encoder.safetensors"
    plain = eval(export_encoder(tmp_path / "checkpoint-3.pth", out), {"timm": timm}).eval()
    images = torch.randn(2, 3, 224, 224)
    everything_shown = torch.full((2, 224, 224), VISIBLE, dtype=torch.uint8)
    with torch.no_grad():
        expected = model.encode(model.method.view(images, everything_shown))
        assert torch.allclose(plain.forward_features(images), expected, atol=1e-5)


def test_official_pth_export_can_start_a_run(tmp_path):
    save_run(make_model("segments"), "segments", tmp_path / "checkpoint-3.pth")
    export_encoder(tmp_path / "checkpoint-3.pth", tmp_path / "encoder.pth")
    other = make_model("segments", seed=1)
    fresh = start_from_official(other, read_vit_weights(tmp_path / "encoder.pth"))
    assert fresh == [
        "decoder_blocks", "decoder_embed", "decoder_norm", "decoder_pred", "mask_token"
    ]  # fmt: skip


def official_weights(*, decoder, seed=5):
    """A state dict with the names of the release (facebookresearch/mae)."""
    names = ("decoder_", "mask_token")
    weights = make_model("patches", seed=seed).state_dict()
    return {n: w for n, w in weights.items() if decoder or not n.startswith(names)}


def test_names_are_those_of_the_official_release():
    block = {f"{part}.{kind}" for part in
             ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")}  # fmt: skip
    expected = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    for layer in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"):
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    expected |= {f"blocks.{number}.{name}" for number in range(12) for name in block}
    expected |= {f"decoder_blocks.0.{name}" for name in block}
    assert official_weights(decoder=True).keys() == expected


def test_official_checkpoint_with_decoder_loads_completely():
    weights, model = official_weights(decoder=True), make_model("patches")
    assert start_from_official(model, weights) == []
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_four_channels_starts_as_the_official_model_does():
    weights, model = official_weights(decoder=False), make_model("four_channels")
    fresh = start_from_official(model, weights)
    assert fresh[0] == "patch_embed.proj.weight of input channel 4 (zeros)"
    assert "decoder_blocks" in fresh
    assert torch.equal(model.patch_embed.proj.weight[:, :3], weights["patch_embed.proj.weight"])
    assert model.patch_embed.proj.weight[:, 3].abs().sum() == 0


def test_preencoder_is_listed_as_fresh():
    fresh = start_from_official(make_model("preencoder"), official_weights(decoder=True))
    assert fresh == ["preencoder"]


def test_position_embeddings_are_resampled_for_another_size():
    small = ModelConfig(**{**vars(TINY), "image_size": 112})
    model = make_model("segments", small)
    start_from_official(model, official_weights(decoder=True))
    assert model.pos_embed.shape == (1, 50, 192)
    assert torch.equal(model.decoder_pos_embed[0], sincos_positions(7, 64))
    smooth = {"pos_embed": sincos_positions(14, 192)[None]}
    assert torch.equal(resample_positions(smooth, 14)["pos_embed"], smooth["pos_embed"])
    assert resample_positions(smooth, 7)["pos_embed"][0, 0].abs().sum() == 0


def test_whatever_does_not_fit_is_listed_and_refused():
    model, weights = make_model("segments"), official_weights(decoder=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights["head.weight"] = torch.zeros(10, 192)
    weights["norm.weight"] = torch.zeros(7)
    del weights["blocks.3.attn.qkv.bias"]
    with pytest.raises(ValueError, match="does not fit") as caught:
        start_from_official(model, weights)
    for part in (
        "head.weight is not part",
        "norm.weight is (7,)",
        "blocks.3.attn.qkv.bias is missing",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_file_that_is_no_mae_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a checkpoint of a ViT encoder"):
        read_vit_weights(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read"):
        read_vit_weights(tmp_path / "text.pth")


def test_the_printed_line_makes_the_exported_encoder_in_timm(tmp_path, monkeypatch):
    """With this image size, these pixels, and the features of the pretrained model."""
    monkeypatch.setitem(VIT_SIZES, "nano", VitSize(width=48, depth=2, heads=4))
    for config in (
        ModelConfig(**{**vars(TINY), "image_size": 96}),
        ModelConfig(**{**vars(TINY), "model": "nano", "image_size": 32, "patch_size": 8}),
    ):
        checkpoint, out = tmp_path / "checkpoint-3.pth", tmp_path / "encoder.safetensors"
        save_run(make_model("four_channels", config), "four_channels", checkpoint, **vars(config))
        for file in (out, out.with_suffix(".pth")):
            encoder = eval(export_encoder(checkpoint, file), {"timm": timm}).eval()
            images = torch.randn(2, 3, config.image_size, config.image_size)
            with torch.no_grad():
                expected = load_encoder(checkpoint).forward_features(images)
                assert torch.equal(encoder.forward_features(images), expected)
            found = timm.data.resolve_model_data_config(encoder)
            assert (found["mean"], found["std"]) == (IMAGE_MEAN, IMAGE_STD)
            assert found["input_size"] == (3, config.image_size, config.image_size)


def test_a_run_starts_from_the_files_that_people_have(tmp_path):
    """Flat or wrapped, DINOv2's LayerScale and transformers' names: as far as they fit."""
    import transformers

    vit = timm.create_model("vit_tiny_patch16_224", img_size=224, init_values=0.1)  # with a classifier
    torch.save({"teacher": {f"backbone.{n}": w for n, w in vit.state_dict().items()}}, tmp_path / "dino.pth")
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    of_hf = transformers.ViTModel(transformers.ViTConfig(**sizes))
    of_hf.save_pretrained(tmp_path)
    kernels = vit.patch_embed.proj.weight, of_hf.embeddings.patch_embeddings.projection.weight
    for path, kernel in zip((tmp_path / "dino.pth", tmp_path / "model.safetensors"), kernels, strict=True):
        model = make_model("segments", seed=1)
        fresh = start_from_official(model, read_vit_weights(path, ignored=CLASSIFIERS))
        assert "blocks" not in fresh
        assert torch.equal(model.patch_embed.proj.weight, kernel)
    with_registers = timm.create_model("vit_tiny_patch16_224", num_classes=0, reg_tokens=4)
    torch.save(with_registers.state_dict(), tmp_path / "registers.pth")
    with pytest.raises(ValueError, match=r"does not fit.*reg_token is not part of the model"):
        start_from_official(make_model("segments"), read_vit_weights(tmp_path / "registers.pth"))
