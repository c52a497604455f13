import copy

import pytest
import torch
from torch import nn

from engine.layers import PatchEmbedding, lower_precision, recompute_activations
from mae.config import MethodConfig, make_method
from mae.config import ModelConfig as MaeConfig
from mae.model import MaskedAutoencoder
from segmenter.config import ModelConfig, recipe_values
from segmenter.encoder import EncoderShape
from segmenter.model import Segmenter, SegmenterShape, segmentation_loss


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kept", [None, 3])
def test_the_patch_embedding_is_the_convolution_with_its_weights(dtype, error, kept):
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 24, 16, stride=16, dtype=torch.float64)
    embedding = PatchEmbedding(64, 16, 4, 24)
    embedding.to(dtype).proj.load_state_dict(convolution.state_dict())
    images = torch.randn(2, 4, 48, 80, dtype=torch.float64, requires_grad=True)  # not square
    same = images.detach().to(dtype).requires_grad_()
    expected = convolution(images).flatten(2).transpose(1, 2)
    ids_keep = None
    if kept:
        ids_keep = torch.stack([torch.randperm(15)[:kept] for _ in range(2)])
        expected = torch.stack([row[ids] for row, ids in zip(expected, ids_keep, strict=True)])
    found = embedding(same, ids_keep)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight.to(dtype)).sum().backward()
    for one, other in (
        (found, expected), (same.grad, images.grad),
        (embedding.proj.weight.grad, convolution.weight.grad),
        (embedding.proj.bias.grad, convolution.bias.grad),
    ):  # fmt: skip
        assert one.shape == other.shape
        assert (one - other).norm() <= error * other.norm()


def pretraining(method):
    """A model, and its loss of two images."""
    config = MaeConfig(model="vit_tiny", image_size=32, decoder_width=32, decoder_depth=2,
                       decoder_heads=4)  # fmt: skip
    model = MaskedAutoencoder(config, make_method(MethodConfig(mask_method=method), config))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pattern = torch.rand(2, 4) if method == "patches" else torch.randint(0, 2, (2, 32, 32))
    return model, lambda model: model(images, pattern).sum()


def finetuning(decoder):
    """The same, with dropout and stochastic depth."""
    rates = {"drop_path": 0.3, "dropout": 0.2, "decoder_drop_path": 0.3, "decoder_dropout": 0.2}
    values = {**recipe_values("segmenter"), **rates, "decoder": decoder, "model": "vit_tiny"}
    shape = SegmenterShape(
        encoder=EncoderShape(model="vit_tiny", patch_size=16, in_channels=3, grid=2),
        decoder=decoder, decoder_layers=2, num_classes=3, normalization="imagenet",
    )  # fmt: skip
    names = ModelConfig.__dataclass_fields__
    config = ModelConfig(**{name: value for name, value in values.items() if name in names})
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 3, (2, 32, 32))
    return Segmenter(shape, config), lambda m: segmentation_loss(m(images), labels, 255)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (pretraining, "patches"), (pretraining, "four_channels"),
        (finetuning, "mask_transformer"), (finetuning, "upernet"),
    ],
)  # fmt: skip
def test_recomputed_activations_give_the_same_gradients_and_keep_less(make, what):
    torch.manual_seed(0)
    model, loss_of = make(what)
    model.train()
    gradients, kept_bytes = [], []
    for recomputes in (False, True):
        own = copy.deepcopy(model)
        if recomputes:
            recompute_activations(own)
        kept = {}
        torch.manual_seed(1)  # the same dropout
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: (kept.update({tensor.data_ptr(): tensor.nbytes}), tensor)[1],
            lambda tensor: tensor,
        ):
            loss = loss_of(own)
        kept_bytes.append(sum(kept.values()))
        loss.backward()
        gradients.append({n: p.grad for n, p in own.named_parameters() if p.grad is not None})
        assert own.state_dict().keys() == model.state_dict().keys()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept_bytes[1] < 0.8 * kept_bytes[0]


def test_between_the_blocks_tokens_are_bf16_and_the_loss_is_that_of_bf16():
    config = MaeConfig(model="vit_tiny", decoder_depth=1, decoder_width=32, decoder_heads=4, image_size=32)
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, make_method(MethodConfig(mask_method="patches"), config))
    images, pattern = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.rand(2, 4)
    found, between = [], []
    for stack in (model.blocks, model.decoder_blocks):
        stack[0].register_forward_hook(lambda block, inputs, output: between.append(output.dtype))
    for precision in ("bf16", "bf16-residual"):
        lower_precision(model, precision)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(images, pattern))
    assert between == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert torch.allclose(found[0], found[1], rtol=0.01) and not torch.equal(found[0], found[1])


def test_float8_is_in_the_encoders_blocks_alone():
    pytest.importorskip("torchao")
    config = MaeConfig(model="vit_tiny", decoder_depth=1, decoder_width=32, decoder_heads=4, image_size=32)
    model = MaskedAutoencoder(config, make_method(MethodConfig(mask_method="patches"), config))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    lower_precision(model, "float8")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    lower = [name for name, module in model.named_modules() if "Float8" in type(module).__name__]
    assert len(lower) == 12 * 4 and all(name.startswith("blocks.") for name in lower)
