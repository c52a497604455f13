"""What an optimizer step does with gradients that are too large, not finite, or overflow."""

import math

import pytest
import torch

from engine import update as update_module
from engine.update import FIRST_SCALE, GuardedUpdate

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
}
ONE = torch.tensor(1.0)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def step(layer, update, *, factor=1.0, loss=0.5, divisor=ONE):
    """One step with gradients of `factor`, as the scale multiplies them; the weights after it."""
    (layer(torch.ones(1, 3)).sum() * update.scale * factor).backward()
    update.step(torch.tensor(loss), divisor, 0.1)
    return layer.weight.detach().clone()


@pytest.mark.parametrize("scales_loss", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", ["loss", "both", "gradient"])
def test_nothing_is_updated_from_the_first_bad_step_on(layer, optimizer, bad, scales_loss):
    update = GuardedUpdate(OPTIMIZERS[optimizer](layer.parameters()), None, scales_loss=scales_loss)
    if scales_loss and bad == "gradient":
        update.scale.fill_(1.0)  # at which nothing overflows for the scale's sake
    before = layer.weight.detach().clone()
    good = step(layer, update)
    assert not torch.equal(good, before)
    assert update.failed == 0
    nan = math.nan
    bad_step = {"factor": 1.0 if bad == "loss" else nan, "loss": 0.5 if bad == "gradient" else nan}
    assert torch.equal(step(layer, update, **bad_step), good)
    assert torch.equal(step(layer, update), good)
    assert update.failed == 1
    state = update.optimizer.state_dict()["state"]
    assert all(torch.isfinite(value).all() for entry in state.values() for value in entry.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
def test_an_overflow_is_skipped_and_halves_the_scale(layer, optimizer, first):
    """Also in the first step, of which torch's fused SGD would keep an unwritten momentum."""
    update = GuardedUpdate(OPTIMIZERS[optimizer](layer.parameters()), None, scales_loss=True)
    torch.manual_seed(0)
    twin = torch.nn.Linear(3, 2)
    plain = GuardedUpdate(OPTIMIZERS[optimizer](twin.parameters()), None, scales_loss=False)
    if not first:
        assert torch.equal(step(layer, update), step(twin, plain))
    weight = layer.weight.detach().clone()
    assert torch.equal(step(layer, update, factor=math.inf), weight)
    assert (update.scale, update.skipped_steps, update.failed) == (FIRST_SCALE / 2, 1, 0)
    for _ in range(3):  # as if that step had not been
        assert torch.equal(step(layer, update), step(twin, plain))
    assert update.loss_scaling() == {"scale": 2**15, "clean_steps": 3, "skipped_steps": 1}


def test_the_scale_doubles_after_many_clean_steps_as_gradscaler_does(layer, monkeypatch):
    """Its own arithmetic, on the same overflows; after 2000 steps, which are 20 here."""
    assert torch.amp.GradScaler("cpu").get_growth_interval() == update_module.GROWTH_INTERVAL
    monkeypatch.setattr(update_module, "GROWTH_INTERVAL", 20)
    update = GuardedUpdate(OPTIMIZERS["adamw"](layer.parameters()), None, scales_loss=True)
    theirs = torch.amp.GradScaler("cpu", growth_interval=20)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs.scale(weight.sum())
    for number in range(60):
        factor = math.inf if number in (0, 1, 30) else 1.0
        step(layer, update, factor=factor)
        weight.grad = torch.full((1,), factor)
        theirs.step(optimizer)
        theirs.update()
    assert update.scale == theirs.get_scale() == FIRST_SCALE / 4 * 2 / 2 * 2
    assert update.skipped_steps == 3


def test_gradients_are_divided_and_then_clipped_to_their_norm(layer):
    layer.bias = None
    for clip, expected in ((None, 5.0), (0.5, 0.5), (10.0, 5.0)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
        update = GuardedUpdate(optimizer, clip, scales_loss=True)
        before = layer.weight.detach().clone()
        factor = 5.0 / math.sqrt(6) * 100  # six equal gradients
        (layer(torch.ones(1, 3)).sum() * update.scale * factor).backward()
        update.step(ONE, torch.tensor(100.0), 1.0)
        assert (before - layer.weight).norm().item() == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_brings_the_scale_back(layer):
    update = GuardedUpdate(OPTIMIZERS["adamw"](layer.parameters()), None, scales_loss=True)
    step(layer, update, factor=math.inf)
    step(layer, update)
    other = GuardedUpdate(OPTIMIZERS["adamw"](layer.parameters()), None, scales_loss=True)
    other.continue_from(update.loss_scaling())
    assert other.loss_scaling() == update.loss_scaling()
