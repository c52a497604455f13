"""Pictures of what a checkpoint reconstructs."""

import numpy as np
import pytest
import torch
from PIL import Image

from mae.config import MethodConfig, ModelConfig, make_method
from mae.masking import patchify, unpatchify
from mae.model import MaskedAutoencoder
from mae.pretrain import pretrain
from mae.reconstruct import load_model, reconstruct_files
from mae.weights import export_encoder, load_checkpoint
from tests.mae.conftest import make_config, write_image


@pytest.fixture(scope="module")
def checkpoint(in1k_dir, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run")
    assert pretrain(make_config(in1k_dir, output_dir, epochs=1, norm_pix_loss=True))
    return output_dir / "checkpoint-1.pth"


def is_a_picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L")).std() > 5


def test_a_round_draws_its_fixed_set(checkpoint):
    assert is_a_picture(checkpoint.with_name("reconstructions-1.png"))
    fixed_set = load_checkpoint(checkpoint)["fixed_set"]
    assert fixed_set["images"].shape == (8, 3, 32, 32)
    assert fixed_set["images"].dtype == torch.uint8


def test_the_fixed_set_travels_in_the_checkpoint(checkpoint, tmp_path):
    reconstruct_files(checkpoint, [], out=tmp_path / "out.png", masks_dir=None)
    earlier = checkpoint.with_name("reconstructions-1.png")
    with Image.open(tmp_path / "out.png") as ours, Image.open(earlier) as theirs:
        assert ours.size == theirs.size
    assert is_a_picture(tmp_path / "out.png")


@pytest.mark.parametrize("own_segments", [False, True])
def test_given_images_are_drawn(checkpoint, in1k_dir, tmp_path, own_segments):
    images = sorted((in1k_dir / "train/class0").glob("*.jpg"))[:2]
    masks_dir = in1k_dir / "masks" if own_segments else None
    reconstruct_files(checkpoint, images, out=tmp_path / "out.png", masks_dir=masks_dir)
    assert is_a_picture(tmp_path / "out.png")


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_gives_the_image_back(norm_pix_loss):
    config = ModelConfig(
        model="vit_tiny", image_size=32, decoder_width=32, decoder_depth=1, decoder_heads=4,
        norm_pix_loss=norm_pix_loss,
    )  # fmt: skip
    model = MaskedAutoencoder(config, make_method(MethodConfig(mask_method="segments"), config))
    images, visible = torch.randn(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.uint8)
    visible[:, 3:20, 7:30] = 0
    model.decode = lambda encoded, view: model.target(images)
    assert torch.allclose(model.reconstruct(images, visible), images, atol=1e-4)
    assert torch.equal(unpatchify(patchify(images, 16), 16), images)


def test_encoder_only_files_are_refused(checkpoint, tmp_path):
    for name in ("encoder.safetensors", "encoder.pth"):
        export_encoder(checkpoint, tmp_path / name)
        with pytest.raises(ValueError, match="is not a checkpoint of `python -m mae pretrain`"):
            reconstruct_files(tmp_path / name, [], out=tmp_path / "out.png", masks_dir=None)
    assert not (tmp_path / "out.png").exists()


def test_bad_inputs_are_named(checkpoint, in1k_dir, tmp_path):
    out = tmp_path / "out.png"
    (tmp_path / "bad.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"bad\.jpg: it is no image"):
        reconstruct_files(checkpoint, [tmp_path / "bad.jpg"], out=out, masks_dir=None)
    write_image(tmp_path / "unknown.jpg", np.random.default_rng(0))
    with pytest.raises(ValueError, match="no segment"):
        reconstruct_files(checkpoint, [tmp_path / "unknown.jpg"], out=out, masks_dir=in1k_dir / "masks")
    with pytest.raises(ValueError, match="not a folder"):
        reconstruct_files(checkpoint, [], out=tmp_path / "none/out.png", masks_dir=None)


def test_a_checkpoint_gives_the_model_back(checkpoint):
    model = load_model(load_checkpoint(checkpoint), checkpoint)
    assert model.config.norm_pix_loss
    assert model.method.name == "four_channels"
