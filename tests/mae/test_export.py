"""Exports are loaded by the libraries they are for, and compute what the checkpoint computes."""

import base64
import http.server
import json
import threading

import numpy as np
import pytest
import timm
import torch
from PIL.Image import Resampling
from transformers import ViTImageProcessor, ViTMAEForPreTraining, ViTModel

from common.areas import draw_images
from engine.vit import IMAGE_MEAN, IMAGE_STD, VISIBLE, VIT_SIZES, VitSize
from engine.weights import read_vit_weights
from mae.config import METHODS, ModelConfig
from mae.export import export_folder
from mae.weights import load_encoder
from tests.mae.test_weights import make_model, save_run

SMALL = {
    "model": "export_test",
    "image_size": 64,
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 4,
}
EXACTLY = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    """As a plugin's: no model is larger than it has to be."""
    monkeypatch.setitem(VIT_SIZES, "export_test", VitSize(width=48, depth=2, heads=3))


def saved(method, folder, **options):
    """A run's checkpoint of a model with random weights, biases and norms among them."""
    model = make_model(method, ModelConfig(**{**SMALL, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    save_run(model, method, folder / "checkpoint-3.pth", **{**SMALL, **options})
    return model, folder / "checkpoint-3.pth"


def images(side=64):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
def test_timm_loads_the_folder_at_any_image_size(tmp_path, method):
    model, checkpoint = saved(method, tmp_path)
    line = export_folder(checkpoint, "timm", tmp_path / "out")
    made = {}
    exec(line, made)
    plain = made["model"].eval()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    with torch.no_grad():
        tokens = plain.forward_features(images())
        assert torch.allclose(tokens, load_encoder(checkpoint).forward_features(images()), **EXACTLY)
        if model.method.extra_channels:  # the constant channel is in the bias
            shown = torch.full((2, 64, 64), VISIBLE, dtype=torch.uint8)
            assert torch.allclose(tokens, model.encode(model.method.view(images(), shown)), **EXACTLY)
        larger = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=96).eval()
        assert larger.forward_features(images(96)).shape == (2, 1 + 36, 48)
        assert torch.equal(larger.blocks[1].attn.qkv.weight, plain.blocks[1].attn.qkv.weight)
    prepared = timm.data.resolve_data_config({}, model=plain)
    assert prepared["interpolation"] == "bilinear"  # as segmenter scales images for the checkpoint itself
    assert [tuple(prepared[key]) for key in ("mean", "std", "input_size")] == [
        IMAGE_MEAN,
        IMAGE_STD,
        (3, 64, 64),
    ]


@pytest.mark.parametrize("method", ["patches", "four_channels"])
def test_transformers_loads_the_encoder_and_of_patches_the_whole(tmp_path, method):
    model, checkpoint = saved(method, tmp_path, norm_pix_loss=True)
    export_folder(checkpoint, "transformers", tmp_path / "out")
    plain, about = ViTModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
    with torch.no_grad():
        tokens = plain.eval()(images()).last_hidden_state
        assert torch.allclose(tokens, load_encoder(checkpoint).forward_features(images()), **EXACTLY)
    processor = ViTImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.resample == Resampling.BILINEAR
    pixels = processor(np.full((64, 64, 3), 255, np.uint8), return_tensors="pt")["pixel_values"]
    white = (1 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    assert torch.allclose(pixels[0, :, 5, 5], white, atol=1e-4)
    if method != "patches":
        assert not (tmp_path / "out/mae").exists()
        return
    whole, about = ViTMAEForPreTraining.from_pretrained(
        tmp_path / "out", subfolder="mae", output_loading_info=True
    )
    assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
    assert (whole.config.norm_pix_loss, whole.config.mask_ratio) == (True, 0.75)
    noise = torch.rand(2, 16)
    with torch.no_grad():
        theirs = whole.eval()(images(), noise=noise)
        view = model.method.view(images(), noise)
        own = model.decode(model.encode(view), view)
    assert torch.allclose(theirs.logits, own, **EXACTLY)


@pytest.mark.filterwarnings("ignore")  # of mmcv, on parts that nothing here uses
def test_mmseg_loads_its_backbone(tmp_path):
    from mmseg.registry import MODELS

    _, checkpoint = saved("patches", tmp_path)
    line = export_folder(checkpoint, "mmseg", tmp_path / "out")
    made = {}
    exec(line, made)

    def load(**more):
        backbone = MODELS.build({**made["backbone"], **more})
        backbone.init_weights()
        backbone.eval()  # which returns nothing here
        return backbone

    encoder = load_encoder(checkpoint)
    with torch.no_grad():
        found = load(out_indices=[0, 1])(images())
        expected = encoder.forward_intermediates(
            images(), indices=[0, 1], norm=False, intermediates_only=True
        )
        assert load(img_size=96)(images(96))[0].shape == (2, 48, 6, 6)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, **EXACTLY)
    # With the scale that BEiT has by default, too, which MAE has not.
    with torch.no_grad():
        assert torch.allclose(load(init_values=0.1, out_indices=[1])(images())[0], expected[1], **EXACTLY)


def leave_scores(root):
    """What a run leaves of the checkpoint: a finetuning and a probe, of 12 images and 3 classes."""
    rng = np.random.default_rng(0)
    for folder, areas in (
        ("eval_output/patches_3", "areas.npz"),
        ("probe_output/patches_3", "areas-linear.npz"),
    ):
        (root / folder).mkdir(parents=True)
        label = rng.integers(50, 99, (12, 3))
        hit = (label * rng.random((12, 3))).astype(int)
        np.savez(
            root / folder / areas,
            images=np.array([f"i{n}" for n in range(12)]),
            areas=np.stack([hit, label, label], 1),
        )
    scores = {"pixel_accuracy": 50.0, "mean_accuracy": 50.0, "mean_iou": 41.25, "class_iou": {}}
    about = {"format_version": 1, "seed": 7, "settings": {"dataset": "camvid"}}
    finetuned = {**scores, **about, "epochs": 2, "recipe": {"name": "mae"}}
    (root / "eval_output/patches_3/result.json").write_text(json.dumps(finetuned))
    (root / "probe_output/patches_3/result.json").write_text(
        json.dumps({**about, "linear": scores, "seconds": {}})
    )
    (root / "eval_output/patches_31").mkdir()  # of another checkpoint
    (root / "eval_output/patches_31/result.json").write_text("{}")


def test_the_card_says_how_it_was_made_and_how_it_scores(tmp_path):
    from huggingface_hub import ModelCard

    _, checkpoint = saved("patches", tmp_path / "run/pretrain_output/patches")
    leave_scores(tmp_path / "run")
    export_folder(checkpoint, "timm", tmp_path / "out", licence="mit")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    by_name = {result.metric_name: result for result in card.data.eval_results}
    finetuned = by_name["mean IoU, finetuned, recipe mae, seed 7"]
    low, high = np.percentile(draw_images(tmp_path / "run/eval_output/patches_3/areas.npz"), [2.5, 97.5])
    assert finetuned.metric_value == 41.25 and finetuned.dataset_name == "camvid"
    assert finetuned.metric_args["interval_95"] == pytest.approx([low, high], abs=1e-3)
    assert low < high and len(by_name) == 2
    assert (
        f"| camvid | mean IoU, finetuned, recipe mae, seed 7 | 41.25 (95% interval {low:.2f} to {high:.2f}) |"
        in card.text
    )
    for said in (
        "Masking method `patches`: ",
        "mask_ratio",
        "0.75",
        "base_lr",
        f"torch {torch.__version__}",
        "\nmit ",
    ):
        assert said in card.text
    # Again, over what it made itself, without scores, and of no licence.
    _, bare = saved("segments", tmp_path)
    export_folder(bare, "mmseg", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license is None and "Not stated" in card.text and "None that is known." in card.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"backbone.pth", "README.md"}


@pytest.mark.parametrize("there", ["a file", "a folder of others", "below a file"])
def test_nothing_of_others_is_replaced(tmp_path, there):
    _, checkpoint = saved("patches", tmp_path)
    out = tmp_path / "out"
    if there == "a folder of others":
        out.mkdir()
        (out / "README.md").write_text("mine")
    else:
        out.write_text("mine")
    out = out / "more" if there == "below a file" else out
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="--out"):
        export_folder(checkpoint, "timm", out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub answers to an upload: the repository is made, files come in one commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path.endswith("/validate-yaml"):  # of the card
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/repos/create"):
            told = json.loads(body)
            return self.answer(
                {"url": f"{self.server.url}/{told.get('organization') or 'me'}/{told['name']}"}
            )
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in body.decode().splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                self.server.files[told["value"]["path"]] = base64.b64decode(told["value"]["content"])
        return self.answer(
            {"commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/x/commit/{'0' * 40}", "success": True}
        )

    def do_GET(self):
        self.server.asked.append((self.path, None))
        self.answer({"id": "me/x", "siblings": [], "sha": "0" * 40})

    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """On loopback."""
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.asked = f"http://127.0.0.1:{server.server_port}", {}, []
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_folder_is_pushed_only_when_it_is_asked_for(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    _, checkpoint = saved("patches", tmp_path)
    export_folder(checkpoint, "timm", tmp_path / "out")
    assert not hub.asked
    export_folder(checkpoint, "timm", tmp_path / "out", push="me/segmae")
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(hub.files) == 3
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RuntimeError, match=r"--push me/segmae: .*; .*out is written\. `hf auth login`"):
        export_folder(checkpoint, "timm", tmp_path / "out", push="me/segmae")
    assert (tmp_path / "out/config.json").is_file()
    with pytest.raises(ValueError, match=r"--push not a/name/at all: give OWNER/NAME"):
        export_folder(checkpoint, "timm", tmp_path / "none", push="not a/name/at all")
    assert not (tmp_path / "none").exists()


def test_the_command_prints_what_loads_the_folder(tmp_path):
    from click.testing import CliRunner

    from mae.cli import cli

    _, checkpoint = saved("patches", tmp_path, model="vit_tiny")  # by its name in timm
    words = ["export", str(checkpoint), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*words, "--to", "timm"])
    assert done.exit_code == 0 and f'timm.create_model("local-dir:{tmp_path / "out"}"' in done.output
    refused = CliRunner().invoke(cli, [*words, "--push", "me/segmae"])
    assert "--push and --license are about a folder: say for which library by --to" in str(refused.exception)


def test_what_is_exported_for_mmseg_is_read_as_an_encoder_again(tmp_path):
    _, checkpoint = saved("patches", tmp_path)
    export_folder(checkpoint, "mmseg", tmp_path / "out")
    found = read_vit_weights(tmp_path / "out/backbone.pth")
    expected = load_encoder(checkpoint).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(weight, expected[name], atol=1e-6) for name, weight in found.items())
