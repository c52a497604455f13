"""A training step on a GPU: the host never waits for it, and the processes talk once."""

import json
from functools import partial
from itertools import islice

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.interruption import Interruption
from engine.devices import make_accelerator
from engine.task import load
from engine.trainer import EpochTrainer, build
from engine.update import GuardedUpdate
from mae.masking import METHODS
from mae.model import MaskedAutoencoder
from mae.pretrain import Pretraining, make_optimizer
from tests.mae.conftest import make_config
from tests.waits import Waits, fill_gradients

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "scales_loss"), [*((method, False) for method in METHODS), ("four_channels", True)]
)
def test_a_step_does_not_wait_for_the_device(in1k_dir, tmp_path, monkeypatch, method, scales_loss):
    """On fake CUDA tensors, which have no values to wait for."""
    config = make_config(in1k_dir, tmp_path, mask_method=method, batch_size=4, clip_grad=1.0)
    run, state = build(Pretraining(config), make_accelerator(config.run), Interruption())
    loaded = list(islice(load(run, (0, 0), 4), 2))
    assert run.plan.accumulation_steps == 2
    pinned, make = [], torch.tensor

    def make_without_page_locked_memory(values, pin_memory=False, **named):
        pinned.append(pin_memory)
        return make(values, **named)

    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = MaskedAutoencoder(config.model, run.task.images.method)
        run.accelerator.state.device, run.prepared = torch.device("cuda"), model
        optimizer = make_optimizer(model, config.optimisation)
        # The engine of autograd asks CUDA for its streams, which even fake tensors do not have.
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: fill_gradients(optimizer))
        run.update = GuardedUpdate(optimizer, 1.0, scales_loss=scales_loss)
        trainer = EpochTrainer(run)
        monkeypatch.setattr(torch, "tensor", make_without_page_locked_memory)
        with Waits() as waits:
            trainer.step(state, iter(loaded))
            trainer.step(state, iter(loaded))
    assert waits.copies == 10  # two steps: images and patterns of two micro-batches, and the counts
    assert waits.found == []
    assert pinned == [True, True]


def _count_collectives(folder, rank):
    """Notes each call of torch.distributed; DDP's own of the gradients are made in C++."""
    import torch.distributed as dist

    from engine.trainer import EpochTrainer

    counts = {"step": 0, "all": 0}
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier"):
        setattr(dist, name, partial(_counted, counts, getattr(dist, name)))
    step = EpochTrainer.step

    def counting(self, state, batches):
        before = counts["all"]
        step(self, state, batches)
        counts["step"] += counts["all"] - before
        (folder / f"{rank}.json").write_text(json.dumps(counts))

    EpochTrainer.step = counting


def _counted(counts, function, *arguments, **named):
    counts["all"] += 1
    return function(*arguments, **named)


def test_the_processes_talk_once_per_step_beside_the_gradients(in1k_dir, tmp_path, processes):
    config = make_config(in1k_dir, tmp_path / "run", batch_size=2)
    sabotage = partial(_count_collectives, tmp_path)
    assert processes.run(config, processes=2, sabotage=sabotage) == [0, 0]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text())["step"] == 12  # of as many steps
