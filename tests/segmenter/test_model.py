import dataclasses

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

from common.formats import parsed_plain
from segmenter.config import ModelConfig
from segmenter.dataset import quiet_imports
from segmenter.decoder import LinearDecoder, MaskTransformer
from segmenter.encoder import EncoderShape
from segmenter.model import Segmenter, SegmenterShape, segmentation_loss

SHAPE = SegmenterShape(
    encoder=EncoderShape(model="vit_tiny", patch_size=16, in_channels=3, grid=4),
    decoder="mask_transformer",
    decoder_layers=2,
    num_classes=5,
    normalization="imagenet",
)


def make_model(**changes):
    torch.manual_seed(0)
    encoder = dataclasses.replace(SHAPE.encoder, **changes.pop("encoder", {}))
    return Segmenter(dataclasses.replace(SHAPE, encoder=encoder, **changes)).eval()


def images(height, width, number=2):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(
        0, 256, (number, 3, height, width), dtype=torch.uint8, generator=generator
    )  # fmt: skip


# Where each of our weights is in mmsegmentation's head.
NAMES = {
    "norm1.": "ln1.", "norm2.": "ln2.",
    "attn.qkv.weight": "attn.attn.in_proj_weight", "attn.qkv.bias": "attn.attn.in_proj_bias",
    "attn.proj.": "attn.attn.out_proj.", "mlp.fc1.": "ffn.layers.0.0.", "mlp.fc2.": "ffn.layers.1.",
    "blocks.": "layers.", "proj_dec.": "dec_proj.",
}  # fmt: skip
TRANSPOSED = {"proj_patch": "patch_proj.weight", "proj_classes": "classes_proj.weight"}


def as_mmseg(weights):
    translated = {}
    for name, weight in weights.items():
        if name in TRANSPOSED:
            translated[TRANSPOSED[name]] = weight.T
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        translated[name] = weight
    return translated


@torch.no_grad()
def test_the_mask_transformer_equals_mmsegmentations():
    with quiet_imports():
        from mmseg.models.decode_heads.segmenter_mask_head import SegmenterMaskTransformerHead
    torch.manual_seed(3)
    ours = MaskTransformer(192, 7, layers=2).eval()
    for parameter in ours.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs = SegmenterMaskTransformerHead(
        in_channels=192, channels=192, num_classes=7, num_layers=2, num_heads=3, embed_dims=192,
        dropout_ratio=0.0,
    ).eval()  # fmt: skip
    theirs.load_state_dict(as_mmseg(ours.state_dict()))
    tokens = torch.randn(2, 30, 192)
    expected = theirs([tokens.transpose(1, 2).unflatten(2, (5, 6))])
    actual = ours(tokens).transpose(1, 2).unflatten(2, (5, 6))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_linear_decoder_is_one_layer():
    decoder = LinearDecoder(192, 7)
    assert [tuple(weight.shape) for weight in decoder.parameters()] == [(7, 192), (7,)]


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (16, 16), (7, 33)])
@torch.no_grad()
def test_any_size_gives_logits_of_that_size(size):
    assert make_model()(images(*size)).shape == (2, 5, *size)


@torch.no_grad()
def test_a_size_that_is_no_multiple_of_the_patch_equals_padding_by_hand():
    model, picture = make_model(), images(50, 70)
    padded = F.pad(model.normalise(picture), (0, 10, 0, 14))
    by_hand = model.upsample(model.patch_logits(padded), 64, 80)[..., :50, :70]
    torch.testing.assert_close(model(picture), by_hand)


@torch.no_grad()
def test_padding_counts_as_the_mean_whatever_its_pixels():
    model, picture = make_model(), images(64, 64)
    other = picture.clone()
    other[0, :, 40:] = 7
    other[0, :, :, 50:] = 200
    sizes = torch.tensor([[40, 50], [64, 64]])
    torch.testing.assert_close(model(picture, sizes), model(other, sizes))
    assert not torch.allclose(model(picture), model(other))


@torch.no_grad()
def test_one_image_and_a_batch_agree():
    model, pictures = make_model(), images(48, 64, 3)
    single = torch.cat([model(picture[None]) for picture in pictures])
    torch.testing.assert_close(model(pictures), single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
@torch.no_grad()
def test_the_fourth_channel_is_1_so_that_it_folds_into_the_bias(size):
    four = make_model(encoder={"in_channels": 4})
    three = make_model()
    weights = four.state_dict()
    embedding = "encoder.patch_embed.proj"
    fourth = weights[f"{embedding}.weight"][:, 3:]
    assert fourth.abs().max() > 0
    weights[f"{embedding}.bias"] = weights[f"{embedding}.bias"] + fourth.sum((1, 2, 3))
    weights[f"{embedding}.weight"] = weights[f"{embedding}.weight"][:, :3]
    three.load_state_dict(weights)
    # The padding of the last patches and of crops has a fourth channel of 1 too.
    sizes = torch.tensor([[30, 41], list(size)])
    picture = images(*size)
    torch.testing.assert_close(four(picture, sizes), three(picture, sizes), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_position_embeddings_of_the_stored_grid_are_used_as_they_are():
    model = make_model()
    seen = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = model.normalise(images(64, 64))
    model.patch_logits(pixels)
    patches = model.encoder.patch_embed(pixels).flatten(1, 2)
    torch.testing.assert_close(seen[0][:, 1:], patches + model.encoder.pos_embed[:, 1:])


def test_the_loss_is_0_where_no_pixel_counts():
    logits = torch.randn(2, 5, 8, 8, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 8, 8), 11, dtype=torch.uint8), 11)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_the_loss_sums_over_the_pixels_that_count():
    logits = torch.randn(1, 5, 2, 2)
    labels = torch.tensor([[[0, 4], [5, 2]]], dtype=torch.uint8)
    picked = -torch.log_softmax(logits, 1)
    expected = picked[0, 0, 0, 0] + picked[0, 4, 0, 1] + picked[0, 2, 1, 1]
    torch.testing.assert_close(segmentation_loss(logits, labels, 5), expected)


@pytest.mark.parametrize("decoder", ["mask_transformer", "upernet"])
def test_every_rate_of_dropout_and_drop_path_reaches_its_layers(decoder):
    rates = {"drop_path": 0.3, "dropout": 0.1, "decoder_drop_path": 0.2, "decoder_dropout": 0.4}
    config = ModelConfig(model="vit_tiny", decoder=decoder, decoder_layers=2, **rates)
    model = Segmenter(dataclasses.replace(SHAPE, decoder=decoder), config)
    depth = len(model.encoder.blocks)
    for number, block in enumerate(model.encoder.blocks):  # rising from 0 to the rate
        expected = pytest.approx(0.3 * number / (depth - 1))
        assert getattr(block.drop_path1, "drop_prob", 0.0) == expected
        assert block.mlp.drop1.p == 0.1
    if decoder == "upernet":  # whole maps, before the classifiers
        for head in (model.decoder.decode_head, model.decoder.auxiliary_head):
            assert head.dropout.p == 0.4
    else:
        assert [block.mlp.drop1.p for block in model.decoder.blocks] == [0.4, 0.4]
        assert getattr(model.decoder.blocks[0].drop_path1, "drop_prob", 0.0) == 0
        assert model.decoder.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_a_shape_survives_its_plain_form():
    assert parsed_plain(SegmenterShape, dataclasses.asdict(SHAPE), "a.pth") == SHAPE


def test_upsampling_with_gradients_is_interpolation():
    """As two products: values, and the gradients that F.interpolate has."""
    torch.manual_seed(0)
    model = make_model(encoder={"patch_size": 4})
    logits = torch.randn(2, 5, 7, 9, requires_grad=True)
    weights = torch.randn(2, 5, 27, 35)
    found = model.upsample(logits, 27, 35)
    expected = F.interpolate(logits, (28, 36), mode="bilinear", align_corners=False)[..., :27, :35]
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad((one * weights).sum(), logits)[0] for one in (found, expected)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():  # scores are those of interpolation itself
        assert torch.equal(model.upsample(logits, 27, 35), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.upsample(logits, 27, 35), found)


def test_the_compiled_loss_adds_no_gradient_place_by_place():
    """Inductor's graphs: index_put is many small additions on a CPU, atomic ones on a GPU."""
    model = make_model(encoder={"patch_size": 4})
    used = set()

    def look(graph, inputs):
        used.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, decompositions=select_decomp_table())
    labels = torch.zeros(2, 28, 36, dtype=torch.long)

    def loss(logits):
        return segmentation_loss(model.upsample(logits, 28, 36), labels, 255)

    torch.compile(loss, backend=backend)(torch.randn(2, 5, 7, 9, requires_grad=True)).backward()
    assert any("bmm" in name or "mm" in name for name in used)
    assert not any("index_put" in name or "upsample" in name for name in used), used
