import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from engine.config import batches_ahead
from engine.memory import largest_micro_batch, measure
from engine.vit import VIT_SIZES, VitSize
from mae.config import MethodConfig, ModelConfig, make_method
from mae.model import MaskedAutoencoder

GIB = 2**30


@pytest.mark.slow
def test_the_peak_of_a_large_batch_is_what_torchs_tracker_says(monkeypatch):
    """Real passes of the real model over fake tensors, in mixed precision."""
    monkeypatch.setitem(VIT_SIZES, "two_blocks", VitSize(width=384, depth=2, heads=6))
    config = ModelConfig(model="two_blocks", decoder_depth=1)
    method = make_method(MethodConfig(mask_method="patches"), config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = MaskedAutoencoder(config, method).requires_grad_()  # as the tracker wants it

        def peak_of(count):
            tracker = MemTracker()
            tracker.track_external(model)
            with tracker:
                images = torch.zeros(count, 3, 224, 224, dtype=torch.uint8)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(images, torch.zeros(count, 196)).sum()
                loss.backward()
            (of_device,) = tracker.get_tracker_snapshot("peak").values()
            return of_device["Total"]

        base, per_image = measure(peak_of)
        tracked = peak_of(48)
    predicted = base + 48 * per_image
    assert predicted == pytest.approx(tracked, rel=0.02)
    assert 48 * per_image > 0.8 * predicted  # it is the images that fill the memory


class Card:
    """Stands for torch.cuda: a pass needs 3 GiB and half a GiB per image."""

    def __init__(self, monkeypatch, total):
        self.passes, cuda = [], torch.cuda
        monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(cuda, "mem_get_info", lambda device: (total - GIB, total))
        monkeypatch.setattr(cuda, "memory_reserved", lambda device: GIB)

    @property
    def peak(self):
        return 3 * GIB + self.passes[-1] * GIB // 2


@pytest.mark.parametrize(
    ("gib", "share", "others_most", "goes_on", "expected"),
    [
        (20, 64, 99, False, 16),  # 29 fit: (0.9 * 20 - 3) * 2, were it not for the moments
        (20, 58, 99, False, 29),
        (20, 60, 99, True, 30),  # the moments of a checkpoint are in the memory that was measured
        (20, 60, 11, False, 10),  # another process has room for 11
        (80, 24, 99, False, 24),  # all of them
        (20, 31, 99, False, 1),
        (2, 64, 99, False, 1),  # none fits: the error that follows says what to lower
    ],
)
def test_the_largest_part_that_divides_the_share_and_fits_everywhere(
    monkeypatch, gib, share, others_most, goes_on, expected, processes=1, model=None
):
    card, model = Card(monkeypatch, gib * GIB), model or torch.nn.Linear(1, 1)
    accelerator = SimpleNamespace(
        num_processes=processes, device=torch.device("cpu"), autocast=contextlib.nullcontext,
        gather=lambda most: torch.cat([most, torch.tensor([others_most])]),
    )  # fmt: skip

    def example(images):
        card.passes.append(images)
        return (torch.ones(images, 1),)

    optimizer = torch.optim.AdamW(model.parameters())
    if goes_on:
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = largest_micro_batch(accelerator, model, optimizer, example, share=share)
    assert found == expected
    assert max(card.passes) <= 4
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("processes", "expected"), [(1, 24), (2, 22)])
def test_several_processes_keep_the_gradients_twice(monkeypatch, processes, expected):
    model = torch.nn.Linear(1, 1)
    model.other = torch.nn.Parameter(torch.empty(GIB // 4))  # with two moments of a GiB each: 3 + 2 of 18
    test = test_the_largest_part_that_divides_the_share_and_fits_everywhere
    test(monkeypatch, 20, 264, 999, False, expected, processes, model)


def test_loaders_hold_no_more_ahead_than_memory_lets_them():
    mib = 2**20
    assert batches_ahead(12, 10 * mib) == 4
    assert batches_ahead(12, 50 * mib) == 3  # four are 2,400 MiB
    assert batches_ahead(12, 500 * mib) == 1  # less is none
