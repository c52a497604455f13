"""Encoders of timm and transformers: their tokens are the library's own, and they are scored."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache

import pytest
import timm
import torch
import transformers
from timm.models._hub import save_for_hf
from timm.optim import param_groups_layer_decay

from common.options import Layer, make_all
from segmenter.config import GROUPS, TrainConfig
from segmenter.finetune import make_optimizer, start_model
from segmenter.libraries import freeze_unused, make_encoder
from tests.segmenter.boxes import train_arguments

VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2}
SMALL = {**VIT, "img_size": 64}
TIMM = {
    "vit_tiny_patch16_224": SMALL,
    "vit_base_patch16_224.mae": SMALL,
    "vit_small_patch14_dinov2": {**VIT, "img_size": 56},
    "vit_small_patch14_reg4_dinov2": {**VIT, "img_size": 56},
    "beit_base_patch16_224": SMALL,
    "eva02_tiny_patch14_224": {**VIT, "img_size": 56},
    "vit_base_patch16_siglip_224": SMALL,
    "vit_base_patch16_clip_224": SMALL,
    "deit3_small_patch16_224": SMALL,
    "samvit_base_patch16_224": {**SMALL, "neck_chans": 24},
    "vit_small_patch16_dinov3": SMALL,
    "convnext_atto": {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "img_size": 64, "window_size": 2,
    },
}  # fmt: skip
HF_VIT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
HF = {
    "vit": HF_VIT,
    "vit_mae": HF_VIT,
    "dinov2_with_registers": {**HF_VIT, "image_size": 56, "patch_size": 14},
    "dinov3_vit": HF_VIT,
    "beit": HF_VIT,
    "siglip_vision_model": HF_VIT,
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
    "swin": {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 2},
}
ONE_OF_EACH_KIND = ("beit_base_patch16_224", "convnext_atto", "vit_mae", "swin")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def save_timm(name, folder):
    torch.manual_seed(0)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in TIMM[name].items()}
    model = timm.create_model(name, num_classes=0, **TIMM[name]).eval()
    with torch.no_grad():  # what starts at 0 (registers, positions, LayerScale) would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    save_for_hf(model, str(folder), model_args=plain, safe_serialization=True)
    return model


def save_hf(kind, folder):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **HF[kind])
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    about = {"image_mean": MEAN, "image_std": STD, "resample": 2, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """(init, the library's model) by name; each is made once."""

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp("encoder") / name.replace(".", "_")
        folder.mkdir()
        if name in TIMM:
            return f"timm:{folder}", save_timm(name, folder)
        return f"hf:{folder}", save_hf(name, folder)

    return make


def own_tokens(name, model, images):
    """[B, N, D], or a map, as the library's documentation gets them."""
    height, width = images.shape[-2:]
    if name.startswith("beit_"):
        model.set_input_size(img_size=(height, width))
    elif hasattr(model, "set_input_size"):
        any_size = timm.create_model(name, num_classes=0, dynamic_img_size=True, **TIMM[name]).eval()
        any_size.load_state_dict(model.state_dict())
        model = any_size
    if name in TIMM:
        return model.forward_features(images)
    arguments = {"interpolate_pos_encoding": True}
    if name in ("dinov2_with_registers", "dinov3_vit", "convnext"):
        arguments = {}
    if name == "vit_mae":
        model.config.mask_ratio = 0.0
        arguments["noise"] = torch.arange(height * width // 256).float()[None].expand(len(images), -1)
    return model(images, **arguments).last_hidden_state


@pytest.mark.parametrize("name", [*TIMM, *HF])
def test_tokens_are_the_librarys_own_for_a_square_and_an_oblong_image(saved, name):
    init, model = saved(name)
    encoder, model = make_encoder(init, 64, pyramid=False).eval(), copy.deepcopy(model)
    patch = encoder.shape.patch_size
    for height, width in ((64, 64), (64, 96)):
        images = torch.randn(2, 3, height + -height % patch, width + -width % patch)
        with torch.no_grad():
            tokens, expected = encoder(images), own_tokens(name, model, images)
        if expected.dim() == 4:  # a map, which Swin of timm has last in channels
            is_last = expected.shape[-1] == tokens.shape[-1] and "swin" in name
            expected = expected.flatten(1, 2) if is_last else expected.flatten(2).transpose(1, 2)
        expected = expected[:, expected.shape[1] - tokens.shape[1] :]
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)
    if name in TIMM:
        own = timm.data.resolve_model_data_config(model)
        assert (encoder.shape.mean, encoder.shape.std) == (list(own["mean"]), list(own["std"]))
        assert encoder.shape.interpolation == own["interpolation"]
    else:
        assert (encoder.shape.mean, encoder.shape.std, encoder.shape.interpolation) == (MEAN, STD, "bilinear")


def config_of(init, dataset, out, **changes):
    changes = {"init": init, "plugin": None, "model": None, "decoder": "linear", "epochs": 1, **changes}
    words = train_arguments(dataset, out, **changes)[1:]
    return {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}


def started(init, dataset, out, **changes):
    """A model with the encoder, and its options."""
    options = config_of(init, dataset, out, crop_size=64, window_size=64, image_size=64, **changes)
    config = TrainConfig(**make_all(GROUPS, [Layer(options)]))
    return start_model(config.init, config.model, config.protocol, num_classes=3), config


def groups_of(model, config):
    groups = make_optimizer(model, config.optimisation).param_groups
    return {parameter: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("name", TIMM)
def test_rates_fall_by_layer_as_timms_own_groups_say(saved, name, dataset, tmp_path):
    init, own = saved(name)
    model, config = started(init, dataset, tmp_path / "out", layer_decay=0.5, optimizer="adamw")
    found = {
        p: group for group in make_optimizer(model, config.optimisation).param_groups for p in group["params"]
    }
    wanted, decays = {}, {}
    kept = own.no_weight_decay() if hasattr(own, "no_weight_decay") else ()
    names = {parameter: name for name, parameter in own.named_parameters()}
    for group in param_groups_layer_decay(own, 0.05, kept, layer_decay=0.5):
        wanted |= {names[p]: group["lr_scale"] for p in group["params"]}
        decays |= {names[p]: group["weight_decay"] for p in group["params"]}
    for name, parameter in model.encoder.model.named_parameters():
        # What belongs to no group has the decoder's; of a model without a head, timm counts one less.
        assert found[parameter]["lr_scale"] in (wanted[name], wanted[name] / 2), name
        assert (found[parameter]["weight_decay"] > 0) == (decays[name] > 0), name
    scales = {found[p]["lr_scale"] for p in model.encoder.parameters()}
    assert len(scales) >= 3
    assert found[model.decoder.head.weight]["lr_scale"] == 1


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_rates_of_transformers_fall_from_block_to_block(saved, name, dataset, tmp_path):
    model, config = started(saved(name)[0], dataset, tmp_path / "out", layer_decay=0.5)
    found = {
        p: group for group in make_optimizer(model, config.optimisation).param_groups for p in group["params"]
    }
    scale = {name: found[parameter]["lr_scale"] for name, parameter in model.encoder.model.named_parameters()}
    if name == "vit":  # embeddings, four blocks; final norm and decoder at 1
        for block in range(4):
            rates = {rate for name, rate in scale.items() if name.startswith(f"layers.{block}.")}
            assert rates == {0.5 ** (4 - block)}
        assert scale["embeddings.cls_token"] == scale["embeddings.position_embeddings"] == 0.5**5
        assert scale["layernorm.weight"] == found[model.decoder.head.weight]["lr_scale"] == 1
    else:  # five blocks in four stages
        assert len({rate for name, rate in scale.items() if ".blocks." in name}) == 5
        assert min(scale.values()) == scale["embeddings.patch_embeddings.projection.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TIMM, *HF])
def test_each_is_probed_and_finetuned_for_two_steps(saved, name, dataset, tmp_path, command):
    init, _ = saved(name)
    sizes = {"crop_size": 64, "window_size": 64, "window_stride": 48, "image_size": 64}
    decoder = (
        "upernet" if name in ("swin", "convnext_atto", "vit_small_patch14_reg4_dinov2", "vit") else "linear"
    )
    options = config_of(init, dataset, tmp_path / "out", **sizes, decoder=decoder, batch_size=3)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert command("train", *words).code == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["num_updates"] == 2
    assert result["encoder"]["parameters"] > 0
    assert result["encoder"]["flops_per_image"] > 0
    # The checkpoint is enough to score it again.
    outcome = command("evaluate", tmp_path / "out/checkpoint.pth", "--dataset", dataset, "--device", "cpu",
                      "--workers", 0, "--out", tmp_path / "again.json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["mean_iou"] == pytest.approx(result["mean_iou"], abs=0.2)
    if name not in ONE_OF_EACH_KIND:  # the others load in the same way
        return
    probes = {name: options[name] for name in (*sizes, "dataset", "recipe", "device", "workers")}
    words = [word for name, value in probes.items() for word in (f"--{name}", value)]
    assert command("probe", init, *words, "--probes", "linear", "--output-dir", tmp_path / "probe").code == 0
    assert json.loads((tmp_path / "probe/result.json").read_text())["linear"]["mean_iou"] > 0


def test_what_has_no_part_in_the_tokens_is_frozen(saved, dataset, tmp_path):
    model, config = started(saved("vit_base_patch16_siglip_224")[0], dataset, tmp_path / "out")
    freeze_unused(model.encoder)
    frozen = {name for name, p in model.encoder.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith("attn_pool.") for name in frozen)
    trained = {
        p for group in make_optimizer(model, config.optimisation).param_groups for p in group["params"]
    }
    assert len(trained) == sum(p.requires_grad for p in model.parameters())
    model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).sum().backward()
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder, saved: f"timm:{folder}", "Config file not found"),
        (lambda folder, saved: f"hf:{folder}", "cannot be used"),
        (lambda _, saved: saved("vit")[0].replace("hf:", "timm:"), "has no 'architecture'"),
        (lambda _, saved: saved("convnext_atto")[0].replace("timm:", "hf:"), "it is timm's; give timm:"),
        (lambda folder, saved: without(saved("vit")[0], folder), "its preprocessor_config.json, with"),
        (lambda folder, saved: of_text(folder), "BertModel gives no patch tokens of images"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_encoder_is_one_line_and_writes_nothing(
    saved, dataset, tmp_path, command, make, said
):
    (tmp_path / "folder").mkdir()
    init = make(tmp_path / "folder", saved)
    words = ("--dataset", dataset, "--output-dir", tmp_path / "out", "--device", "cpu", "--recipe", "fast")
    outcome = command("probe", init, *words)
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert len(outcome.err.splitlines()[-1]) < 500
    assert not (tmp_path / "out").exists()


def without(init, folder):
    shutil.copytree(init.partition(":")[2], folder, dirs_exist_ok=True)
    (folder / "preprocessor_config.json").unlink()
    return f"hf:{folder}"


def of_text(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=10, **sizes)).save_pretrained(folder)
    about = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return f"hf:{folder}"


def test_options_of_plain_vits_are_refused_for_others(saved, dataset, tmp_path, command):
    for option, said in (({"patch_size": 8}, "has its own"), ({"dropout": 0.1}, "have --drop-path")):
        options = config_of(saved("vit")[0], dataset, tmp_path / "out", **option)
        outcome = command(
            "train", *(word for name, value in options.items() for word in (f"--{name}", value))
        )
        assert (outcome.code, said in outcome.err) == (2, True), outcome.err
