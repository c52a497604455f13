"""Scoring on a GPU: the host never waits for it but to fetch what was asked for."""

import contextlib
import dataclasses
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data._utils.pin_memory import pin_memory

from engine import trainer
from engine.task import load
from engine.update import GuardedUpdate
from segmenter import data, evaluate
from segmenter.config import ScoringConfig
from segmenter.encoder import EncoderShape
from segmenter.finetune import make_optimizer
from segmenter.model import Segmenter, SegmenterShape, TrainingLoss
from tests.segmenter.boxes import call, train_arguments
from tests.segmenter.test_inference import PROTOCOL
from tests.waits import Waits, fill_gradients

pytestmark = pytest.mark.slow

GPU = torch.device("cuda", 0)


def on_a_fake_gpu(model, trained=False):
    """Its weights as fake tensors there; to be called within FakeTensorMode."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                held[name] = torch.nn.Parameter(torch.empty(tensor.shape, device=GPU), requires_grad=trained)
    return model


class Images:
    """Five test images of two sizes; windows overlap in some of them."""

    def __init__(self, protocol):
        self.protocol, self.description = protocol, SimpleNamespace(ignored=255)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        height, width = [(50, 77), (30, 32)][index % 2]
        scaled = [torch.zeros(3, height, width, dtype=torch.uint8) for _ in self.protocol.scales]
        return data.TestImage(scaled=scaled, labels=torch.zeros(100, 125, dtype=torch.uint8))


def waits_of_scoring(monkeypatch, multi_scale, **more):
    def loaded(images, sampler, **_):
        return [images[index] for index in sampler]

    def reduce(tensor, reduction):
        return tensor if tensor.dim() else SimpleNamespace(item=lambda: 0.0)

    monkeypatch.setattr(evaluate, "DataLoader", loaded)
    accelerator = SimpleNamespace(
        device=GPU, num_processes=1, process_index=0, autocast=contextlib.nullcontext, reduce=reduce
    )
    images = Images(dataclasses.replace(PROTOCOL, multi_scale=multi_scale))
    scoring = ScoringConfig(eval_batch_size=2)
    shape = SegmenterShape(
        encoder=EncoderShape(model="vit_tiny", patch_size=16, in_channels=4, grid=2),
        decoder="mask_transformer", decoder_layers=1, num_classes=4, normalization="imagenet",
    )  # fmt: skip
    model = Segmenter(shape)
    with FakeTensorMode(), Waits() as waits:
        evaluate.evaluate_model(accelerator, on_a_fake_gpu(model), images, scoring, **more)
    return waits.found


@pytest.mark.parametrize("multi_scale", [False, True])
def test_scoring_does_not_wait_for_the_device(monkeypatch, multi_scale):
    # Both at the end: how many images were unreadable goes out, the areas come back.
    assert waits_of_scoring(monkeypatch, multi_scale) == [("cpu", "cuda"), ("cuda", "cpu")]


def test_predictions_are_fetched_once_per_group(monkeypatch):
    shapes = {}
    waits = waits_of_scoring(
        monkeypatch, False,
        on_prediction=lambda index, predicted: shapes.update({index: predicted.shape}),
    )  # fmt: skip
    assert waits.count(("cuda", "cpu")) == 3 + 1  # groups, areas
    assert shapes == dict.fromkeys(range(5), (100, 125))


def test_the_loader_pins_every_tensor_of_a_test_image(monkeypatch):
    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor.shape) or tensor.clone()
    )
    sample = pin_memory(Images(dataclasses.replace(PROTOCOL, multi_scale=True))[0])
    assert isinstance(sample, data.TestImage)
    assert sample.unreadable == ""
    assert pinned == [(3, 50, 77)] * 6 + [(100, 125)]


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
def test_a_step_of_finetuning_does_not_wait_for_the_device(dataset, tmp_path, monkeypatch, decoder):
    """The segmenter's own run, its model and update on the fake GPU."""
    runs = []
    monkeypatch.setattr(trainer, "fit", lambda run, state: runs.append((run, state)) or True)
    arguments = train_arguments(dataset, tmp_path, decoder=decoder, batch_size=4, device_batch_size=2)
    assert call(*arguments).code == 0
    ((run, state),) = runs
    loaded = list(islice(load(run, (0, 0), 1), 2))
    assert run.plan.accumulation_steps == 2
    monkeypatch.setattr(torch, "tensor", partial(_unpinned, torch.tensor))
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = TrainingLoss(on_a_fake_gpu(run.model, trained=True), 255)
        run.accelerator.state.device, run.prepared = GPU, loss
        optimizer = make_optimizer(loss.model, run.task.config.optimisation)
        run.update = GuardedUpdate(optimizer, 1.0, scales_loss=True)
        # The engine of autograd asks CUDA for its streams, which even fake tensors do not have.
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: fill_gradients(optimizer))
        with Waits() as waits:
            trainer.EpochTrainer(run).step(state, iter(loaded))
    assert waits.copies == 7  # images, labels and sizes of two micro-batches, and the counts
    assert waits.found == []


def _unpinned(make, values, pin_memory=False, **named):
    """There is no page-locked memory without CUDA."""
    return make(values, **named)
