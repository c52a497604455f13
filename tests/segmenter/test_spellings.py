"""Files in which people have their ViTs: every spelling gives the same tokens."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models._hub import save_for_hf

from engine.vit import IMAGE_MEAN, IMAGE_STD
from engine.weights import HF_NAMES, read_vit_weights, renamed_by
from segmenter.config import EncoderConfig
from segmenter.encoder import IGNORED, Encoder, read_encoder, start_encoder
from tests.segmenter.boxes import train_arguments
from tests.segmenter.test_encoders import config_of

pytestmark = pytest.mark.slow

TINY = EncoderConfig(model="auto")
IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def timm_vit(**more):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, **more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def plain():
    return timm_vit()


def tokens_of(path):
    weights, shape = read_encoder(path, TINY)
    encoder = Encoder(shape).eval()
    assert start_encoder(encoder, weights) == []
    with torch.no_grad():
        return encoder(IMAGES)


def renamed(weights, prefix):
    return OrderedDict((f"{prefix}{name}", weight) for name, weight in weights.items())


WRAPPED = {
    "flat": lambda w: w,
    "model": lambda w: {"model": w, "epoch": 3},
    "state_dict": lambda w: {"state_dict": w},
    "module of DDP": lambda w: renamed(w, "module."),
    "compiled": lambda w: {"model": renamed(w, "_orig_mod.")},
    "backbone": lambda w: {"state_dict": {**renamed(w, "backbone."), "decode_head.weight": torch.zeros(2)}},
    "encoder": lambda w: renamed(w, "encoder."),
    "teacher": lambda w: {"student": renamed(w, "backbone."), "teacher": renamed(w, "backbone.")},
    "teacher of DDP": lambda w: {"teacher": renamed(w, "module.backbone."), "epoch": 1},
    "args": lambda w: {"model": w, "args": argparse.Namespace(lr=1)},
    "several": lambda w: {"state_dict": {"model": renamed(w, "module._orig_mod.")}},
    "head": lambda w: {**w, "head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)},
    "chunks": lambda w: {n.replace("blocks.", "blocks.0."): weight for n, weight in w.items()},
}


@pytest.mark.parametrize("spelling", WRAPPED)
def test_every_wrapping_gives_the_same_tokens(plain, tmp_path, spelling, caplog):
    caplog.set_level("INFO")
    torch.save(WRAPPED[spelling](plain.state_dict()), tmp_path / "vit.pth")
    with torch.no_grad():
        expected = plain.forward_features(IMAGES)[:, 1:]
    torch.testing.assert_close(tokens_of(tmp_path / "vit.pth"), expected, atol=1e-5, rtol=1e-4)
    if spelling in ("compiled", "backbone", "several"):
        assert "weights under" in caplog.text
        assert spelling != "backbone" or "1 of other names are left out" in caplog.text


KINDS = {
    "vit": ("vit.", {}), "vit_mae": ("vit.", {}), "dinov2": ("", {"image_size": 56, "patch_size": 14}),
    "dinov2_with_registers": ("", {"image_size": 56, "patch_size": 14}),
}  # fmt: skip
SIZES = {
    "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768,
    "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_transformers_give_its_tokens(tmp_path, kind):
    prefix, more = KINDS[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **more}, mask_ratio=0.0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        side = config.image_size
        given = {"noise": torch.arange(16.0)[None]} if kind == "vit_mae" else {}
        expected = model(IMAGES[..., :side, :side], **given).last_hidden_state[:, -16:]
    model.save_pretrained(tmp_path)  # by the names of files, which are not those in memory
    weights, shape = read_encoder(tmp_path / "model.safetensors", TINY)
    encoder = Encoder(shape).eval()
    start_encoder(encoder, weights)
    with torch.no_grad():
        torch.testing.assert_close(encoder(IMAGES[..., :side, :side]), expected, atol=2e-5, rtol=1e-4)
    # As names are in memory, too, and below a head.
    torch.save(renamed(model.state_dict(), prefix), tmp_path / "memory.pth")
    other = read_vit_weights(tmp_path / "memory.pth", ignored=IGNORED)
    assert all(torch.equal(other[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    "kind", [{"init_values": 0.1}, {"reg_tokens": 4, "init_values": 0.1}, {"no_embed_class": True}]
)
def test_layer_scale_registers_and_positions_of_patches_alone_compute_what_timm_does(tmp_path, kind):
    model = timm_vit(**kind)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    with torch.no_grad():
        expected = model.forward_features(IMAGES)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(tokens_of(tmp_path / "vit.safetensors"), expected, atol=1e-5, rtol=1e-4)


def test_registers_of_the_official_dinov2_have_no_position(tmp_path):
    """facebookresearch/dinov2: positions of class token and patches, registers put between them."""
    model = timm_vit(reg_tokens=4, init_values=0.1, no_embed_class=True)
    own = model.state_dict()
    stored = {name: weight for name, weight in own.items() if name != "reg_token"}
    stored["register_tokens"], stored["mask_token"] = own["reg_token"], torch.zeros(1, 192)
    class_position = torch.randn(1, 1, 192)
    stored["pos_embed"] = torch.cat([class_position, own["pos_embed"]], dim=1)
    stored["cls_token"] = own["cls_token"] - class_position  # which adding it gives back
    torch.save(stored, tmp_path / "dinov2.pth")
    with torch.no_grad():
        expected = model.forward_features(IMAGES)[:, 5:]
    torch.testing.assert_close(tokens_of(tmp_path / "dinov2.pth"), expected, atol=1e-5, rtol=1e-4)


def test_a_refusal_says_what_was_found_and_what_was_tried(tmp_path):
    content = {"state_dict": {f"stages.{n}.conv.weight": torch.zeros(2) for n in range(9)}}
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a checkpoint of a ViT") as caught:
        read_vit_weights(tmp_path / "other.pth")
    said = str(caught.value)
    assert all(f"stages.{n}.conv.weight" in said for n in range(3))
    assert "stages.3" not in said
    assert all(text in said for text in ("under state_dict", "patch_embed.proj.weight", "embeddings.patch_"))
    assert "timm:FOLDER, hf:FOLDER or FILE.py:FUNCTION" in said
    assert len(said) < 600


def test_two_vits_in_one_file_are_refused_by_their_prefixes(plain, tmp_path):
    both = {**renamed(plain.state_dict(), "module.base_encoder."), **renamed(plain.state_dict(), "ema.")}
    torch.save({"state_dict": both}, tmp_path / "moco.pth")
    with pytest.raises(ValueError, match=r"several ViTs: ema\.\*, module\.base_encoder\.\*"):
        read_vit_weights(tmp_path / "moco.pth")


def test_nothing_in_a_file_runs(plain, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (print, ("the file ran",))

    torch.save({"model": plain.state_dict(), "args": Trap()}, tmp_path / "trap.pth")
    assert tokens_of(tmp_path / "trap.pth").shape == (1, 16, 192)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("timm:no_such_model", "timm has no such model"),
        ("timm:", "give timm:NAME or timm:FOLDER"),
        ("timm:./nowhere", "there is no folder"),
        ("hf:/nowhere", "there is no folder /nowhere"),
        ("jax:vit", "there are no encoders of jax"),
        ("own.py:3", "give FILE.py:FUNCTION"),
        ("nowhere.py:make", "does not exist"),
        ("nowhere.pth", "does not exist"),
    ],
)
def test_what_is_no_encoder_is_one_line_and_writes_nothing(dataset, tmp_path, command, init, said):
    outcome = command(
        "probe", init, "--dataset", dataset, "--output-dir", tmp_path / "out", "--device", "cpu"
    )
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert outcome.err.count("\n") <= 2
    assert not (tmp_path / "out").exists()
    words = train_arguments(dataset, tmp_path / "out", init=init, plugin=None, model=None)
    outcome = command(*words)
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err


@pytest.mark.parametrize("init", ["timm:vit_tiny_patch16_224", "hf:facebook/dinov2-small"])
def test_without_a_network_a_name_is_refused_shortly(dataset, tmp_path, command, monkeypatch, init):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    words = train_arguments(dataset, tmp_path / "out", init=init, plugin=None, model=None)
    outcome = command(*words)
    assert (outcome.code, f"{init} cannot be used" in outcome.err) == (2, True), outcome.err
    assert "give a folder instead of a name" in outcome.err
    assert len(outcome.err.splitlines()[-1]) < 400


OWN = """
import torch
from torch import nn

class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 8, 8)
        self.blocks = nn.ModuleList(nn.Conv2d(12, 12, 1) for _ in range(4))

    def forward(self, images):
        maps = [self.embed(images)]
        for block in self.blocks:
            maps.append(maps[-1] + block(maps[-1]))
        return maps[1:]

class Tokens(Blocks):
    def forward(self, images):
        return super().forward(images)[-1].flatten(2).transpose(1, 2)

def maps():
    return Blocks(), {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "stride": 8}

def tokens():
    return Tokens(), {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "stride": 8}

def silent():
    return Tokens(), {"mean": (0.5, 0.5, 0.5)}

def broken():
    raise RuntimeError("my mistake")

number = 3
"""


def test_a_python_function_brings_an_encoder(dataset, tmp_path, command):
    (tmp_path / "own.py").write_text(OWN)
    for function, decoder in (("tokens", "linear"), ("maps", "upernet")):
        init, out = f"{tmp_path}/own.py:{function}", tmp_path / function
        options = config_of(init, dataset, out, decoder=decoder, layer_decay=0.5)
        assert command("train", *(w for n, v in options.items() for w in (f"--{n}", v))).code == 0
        outcome = command("evaluate", out / "checkpoint.pth", "--dataset", dataset, "--device", "cpu")
        assert outcome.code == 0, outcome.err
    for function, said in (("silent", "does not say std, stride"), ("broken", "my mistake"),
                           ("number", "no function number"), ("missing", "no function missing")):  # fmt: skip
        init = f"{tmp_path}/own.py:{function}"
        options = config_of(init, dataset, tmp_path / "no")
        outcome = command("train", *(w for n, v in options.items() for w in (f"--{n}", v)))
        assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert not (tmp_path / "no").exists()


def test_one_vit_by_file_timm_folder_and_hf_folder_scores_alike(plain, dataset, tmp_path, command):
    pixels = {"mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bilinear"}
    save_file(plain.state_dict(), tmp_path / "vit.safetensors")
    of_timm = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=64, pretrained_cfg_overlay=pixels
    )
    of_timm.load_state_dict(plain.state_dict())
    save_for_hf(of_timm, str(tmp_path / "timm"), model_args={"img_size": 64}, safe_serialization=True)
    config = transformers.ViTConfig(**SIZES)
    of_hf = transformers.ViTModel(config, add_pooling_layer=False)
    weights = {}
    for name, weight in plain.state_dict().items():
        parts = weight.chunk(3) if ".qkv." in name else [weight]
        names = [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]
        weights |= dict(zip(names, parts, strict=True))
    own = {renamed_by(name, HF_NAMES): name for name in of_hf.state_dict()}
    of_hf.load_state_dict({own[name]: weight for name, weight in weights.items()})
    of_hf.save_pretrained(tmp_path / "hf")
    about = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD, "resample": 2}
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(about))
    found = []
    for number, init in enumerate(("vit.safetensors", "timm:timm", "hf:hf")):
        library, _, name = init.rpartition(":")
        init = f"{library}:{tmp_path / name}" if library else tmp_path / name
        out = tmp_path / str(number)
        words = [
            "--dataset", dataset, "--model", "auto", "--image-size", 64, "--crop-size", 64,
            "--window-size", 64, "--window-stride", 48, "--device", "cpu", "--workers", 0,
            "--output-dir", out,
        ]  # fmt: skip
        assert command("probe", init, *words).code == 0
        result = json.loads((out / "result.json").read_text())
        found.append([result["linear"]["mean_iou"], result["knn"]["mean_iou"], result["rankme"]])
        assert result["encoder"]["parameters"] == sum(p.numel() for p in plain.parameters())
        # 12 blocks of four matrices and two products of attention, and the patches: by hand.
        flops = 2 * 17 * 12 * (12 * 192**2 + 2 * 17 * 192) + 2 * 16 * 3 * 16 * 16 * 192
        assert result["encoder"]["flops_per_image"] == pytest.approx(flops, rel=1e-9)
    assert found[1] == pytest.approx(found[0], rel=2e-3)
    assert found[2] == pytest.approx(found[0], rel=2e-3)
