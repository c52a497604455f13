"""The masking methods, held to their definition (DESIGN section 4)."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.vit import VISIBLE
from mae.config import MethodConfig, ModelConfig, make_method
from mae.masking import METHODS, patchify, unpatchify
from mae.model import MaskedAutoencoder

SMALL = ModelConfig(
    model="vit_tiny",
    image_size=32,
    patch_size=8,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=4,
)
PIXEL_METHODS = [name for name, m in METHODS.items() if m.uses_segments and not m.removes_tokens]


def make_model(name, **settings):
    torch.manual_seed(0)
    method = make_method(MethodConfig(mask_method=name, **settings), SMALL)
    model = MaskedAutoencoder(SMALL, method).eval()
    if name == "preencoder":  # away from its start, where the fourth channel has no say
        torch.nn.init.normal_(model.preencoder[1].weight, std=0.1)
    return model


def a_visible_map():
    """[1, 32, 32] with a hidden box that cuts through patches: rows 5 to 17, columns 11 to 20."""
    visible = torch.ones(1, 32, 32, dtype=torch.uint8)
    visible[0, 5:18, 11:21] = 0
    return visible


def a_segment(method):
    """What hides that box, as the method gets it: [H, W], or a stack of one at fewer points."""
    middle = (np.arange(method.segment_side) + 0.5) * 32 / method.segment_side
    inside = 1 - a_visible_map()[0].numpy()[np.ix_(middle.astype(int), middle.astype(int))]
    return inside[None] if method.all_segments else inside


def predict(model, images, pattern):
    view = model.method.view(images, pattern)
    return model.decode(model.encode(view), view)


@pytest.mark.parametrize("name", PIXEL_METHODS)
def test_loss_is_the_squared_error_of_the_hidden_pixels_alone(name):
    model, images, visible = make_model(name), torch.randn(1, 3, 32, 32), a_visible_map()
    predicted = unpatchify(predict(model, images, visible), 8)
    by_hand = 0.0
    for row in range(5, 18):
        for column in range(11, 21):
            for channel in range(3):
                by_hand += (predicted[0, channel, row, column] - images[0, channel, row, column]).item() ** 2
    assert model.squared_error(images, visible).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("name", PIXEL_METHODS)
def test_hidden_pixels_reach_the_loss_but_not_the_encoder(name):
    model, visible = make_model(name), a_visible_map()
    images = torch.randn(1, 3, 32, 32)
    changed = torch.where(visible.bool(), images, images + 1)
    assert torch.equal(predict(model, images, visible), predict(model, changed, visible))
    assert model.squared_error(images, visible) != model.squared_error(changed, visible)


@pytest.mark.parametrize("name", PIXEL_METHODS)
def test_visible_pixels_are_no_target(name):
    model, visible = make_model(name), a_visible_map()
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    predicted = predict(model, images.detach(), visible)
    error = (predicted - model.target(images)).square().unflatten(-1, (-1, 3))
    (error * model.method.view(images, visible).hidden.unsqueeze(-1)).sum().backward()
    reached = images.grad.abs().amax(dim=1) > 0
    assert torch.equal(reached, visible == 0)


@pytest.mark.parametrize("name", PIXEL_METHODS)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_nothing_hidden_gives_loss_0_and_finite_gradients(name, norm_pix_loss):
    config = ModelConfig(**{**vars(SMALL), "norm_pix_loss": norm_pix_loss})
    model = MaskedAutoencoder(config, make_method(MethodConfig(mask_method=name), config))
    constant = torch.zeros(2, 3, 32, 32)  # and no spread inside a patch
    loss = model.squared_error(constant, torch.ones(2, 32, 32, dtype=torch.uint8)).sum()
    loss.backward()
    assert loss.item() == 0
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_segments_shows_the_image_times_the_visible_map():
    images, visible = torch.randn(1, 3, 32, 32), a_visible_map()
    seen = make_model("segments").method.view(images, visible).encoder_input
    assert torch.equal(seen, images * visible[:, None])


@pytest.mark.parametrize("name", ["four_channels", "preencoder"])
def test_the_fourth_channel_is_1_where_the_image_is_shown(name):
    images, visible = torch.randn(1, 3, 32, 32), a_visible_map()
    seen = make_model(name).method.view(images, visible).encoder_input
    assert torch.equal(seen[:, :3], images * visible[:, None])
    assert torch.equal(seen[:, 3], visible.float())
    assert seen[0, 3, 0, 0] == VISIBLE == 1


def test_preencoder_is_a_same_convolution_that_starts_as_the_identity():
    model = MaskedAutoencoder(SMALL, make_method(MethodConfig(mask_method="preencoder"), SMALL))
    four = torch.randn(2, 4, 32, 32)
    assert torch.allclose(model.preencoder(four), four[:, :3])
    convolution = model.preencoder[1]
    torch.nn.init.normal_(convolution.weight)
    expected = F.conv2d(four, convolution.weight, convolution.bias, padding="same")
    assert torch.allclose(model.preencoder(four), expected, atol=1e-4)


def test_on_a_cpu_the_preencoder_is_computed_in_fp32_even_in_bf16():
    """oneDNN is wrong by its own size there, on processors with AMX."""
    model, visible = make_model("preencoder"), a_visible_map()
    view = model.method.view(torch.randn(1, 3, 32, 32), visible)
    seen, embed = [], model.patch_embed.forward
    model.patch_embed.forward = lambda pixels, ids_keep: seen.append(pixels) or embed(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        model.encode(view)
    assert torch.equal(seen[0], model.preencoder(view.encoder_input))


@pytest.mark.parametrize(
    ("name", "tokens"), [("patches", 1 + 4), ("segment_patches", 1 + 4), ("segments", 1 + 16)]
)
def test_only_methods_that_remove_patches_drop_tokens(name, tokens):
    model = make_model(name)
    pattern = model.method.pattern(np.random.default_rng(0), a_segment(model.method))
    view = model.method.view(torch.randn(1, 3, 32, 32), torch.from_numpy(pattern)[None])
    assert model.encode(view).shape == (1, tokens, 192)


def test_patches_encoder_never_sees_removed_patches():
    model, noise = make_model("patches"), torch.rand(1, 16)
    images = torch.randn(1, 3, 32, 32)
    visible = model.method.visible_map(noise)
    changed = torch.where(visible.bool(), images, torch.full_like(images, 9.0))
    assert visible.sum() == 4 * 64
    assert torch.equal(predict(model, images, noise), predict(model, changed, noise))


@pytest.mark.parametrize("name", METHODS)
def test_hidden_pixels_counts_what_the_loss_looks_at(name):
    method = make_method(MethodConfig(mask_method=name), SMALL)
    pattern = method.pattern(np.random.default_rng(0), a_segment(method))
    batch = torch.from_numpy(pattern)[None]
    hidden = method.view(torch.randn(1, 3, 32, 32), batch).hidden.expand(1, 16, 64).sum()
    assert method.hidden_pixels(pattern) == hidden == (1 - method.visible_map(batch)).sum()


def test_hide_background_turns_the_map_round():
    segment = np.zeros((32, 32), np.uint8)
    segment[3:9, 4:7] = 1
    hidden = make_method(MethodConfig(mask_method="segments", hide="segment"), SMALL)
    shown = make_method(MethodConfig(mask_method="segments", hide="background"), SMALL)
    rng = np.random.default_rng(0)
    assert np.array_equal(hidden.pattern(rng, segment), 1 - segment)
    assert np.array_equal(shown.pattern(rng, segment), segment)


def test_unpatchify_is_the_inverse_of_patchify():
    for channels in (1, 3, 4):
        images = torch.randn(2, channels, 32, 32)
        assert torch.equal(unpatchify(patchify(images, 8), 8), images)


def test_norm_pix_loss_has_targets_of_mean_0_and_deviation_1():
    config = ModelConfig(**{**vars(SMALL), "norm_pix_loss": True})
    model = MaskedAutoencoder(config, make_method(MethodConfig(mask_method="segments"), config))
    target = model.target(torch.randn(2, 3, 32, 32) * 7 + 3)
    assert torch.allclose(target.mean(dim=-1), torch.zeros(2, 16), atol=1e-5)
    assert torch.allclose(target.std(dim=-1), torch.ones(2, 16), atol=1e-4)


def test_pretraining_starts_from_the_weights_of_the_official_release():
    """Xavier's for matrices, the patch embedding's among them as one; what gains are counted from."""
    model = make_model("patches")
    matrices = {n: p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1}
    for name, weight in matrices.items():
        fan_out, fan_in = len(weight), weight[0].numel()
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound, name
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
    assert model.cls_token.detach().std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_parameter_gets_a_gradient(name):
    """DDP is used without a search for unused parameters."""
    model = make_model(name).train()
    pattern = model.method.pattern(np.random.default_rng(0), a_segment(model.method))
    model.squared_error(torch.randn(1, 3, 32, 32), torch.from_numpy(pattern)[None]).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
