"""One real optimizer step of the trainer, however it is split: its loss and its gradients.

AdamW's first moment after one step is a tenth of the gradient, so the checkpoint tells it.
"""

import pytest
import torch

from common.interruption import Interruption
from engine.devices import make_accelerator
from engine.trainer import build
from mae.data import collate
from mae.masking import patchify
from mae.pretrain import BETAS, Pretraining, make_optimizer
from tests.mae.conftest import make_config, read_epochs
from tests.mae.test_against_transformers import _theirs, _translated

ONE_STEP = {"patch_size": 8, "effective_batch_size": 16, "epochs": 2, "stop_after": 1}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SPLITS = [(16, 1), (8, 1), (4, 1), (8, 2), (4, 2)]  # images per forward pass, processes


def built(config):
    """The run as training starts with it."""
    return build(Pretraining(config), make_accelerator(config.run), Interruption())[0]


def first_step(in1k_dir, folder, **options):
    """A model as training starts with, and the normalised images and patterns of its step 0."""
    run = built(make_config(in1k_dir, folder, **ONE_STEP, **options))
    order = run.plan.order(0)[:16].tolist()
    images, pattern = collate([run.task.images[0, index] for index in order]).inputs
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return run.model, (images / 255 - mean) / deviation, pattern


def trained(processes, in1k_dir, folder, split, **options):
    """Loss of log.txt and gradients by name, of a run of one step."""
    batch_size, count = split
    config = make_config(in1k_dir, folder, **ONE_STEP, batch_size=batch_size, **options)
    assert processes.run(config, processes=count) == [0] * count
    run = built(make_config(in1k_dir, folder / "fresh", **ONE_STEP, **options))
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    state = torch.load(folder / "last.pth", weights_only=True)["optimizer"]["state"]
    groups = make_optimizer(run.model, config.optimisation).param_groups
    ordered = [names[parameter] for group in groups for parameter in group["params"]]
    gradients = {name: state[at]["exp_avg"] / (1 - BETAS[0]) for at, name in enumerate(ordered)}
    return read_epochs(folder)[0]["train_loss"], gradients


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-5), name
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_of_patches_is_that_of_transformers(processes, in1k_dir, tmp_path, split):
    model, images, noise = first_step(in1k_dir, tmp_path / "reference", mask_method="patches")
    theirs = _theirs(model.config)
    theirs.load_state_dict(_translated(model.state_dict().items()))
    expected = theirs(images, noise=noise).loss
    expected.backward()
    loss, gradients = trained(processes, in1k_dir, tmp_path / "run", split, mask_method="patches")
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    references = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert_close(_translated(gradients.items()), references)


@pytest.mark.parametrize("split", SPLITS[1::3])
def test_every_hidden_pixel_of_a_step_counts_the_same(processes, in1k_dir, tmp_path, split):
    """Images that hide more weigh more: the mean is over the pixels of the whole batch."""
    model, images, visible = first_step(in1k_dir, tmp_path / "reference")
    hidden = 1 - visible.unsqueeze(1).float()
    assert hidden.sum(dim=(1, 2, 3)).std() > 10
    view = model.method.view(images, visible)
    error = (model.decode(model.encode(view), view) - patchify(images, 8)).square()
    weight = patchify(hidden.expand(-1, 3, -1, -1), 8)
    expected = (error * weight).sum() / weight.sum()
    expected.backward()
    loss, gradients = trained(processes, in1k_dir, tmp_path / "run", split)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    references = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close({name: gradients[name] for name in references}, references)


def test_recomputed_activations_change_nothing(processes, in1k_dir, tmp_path):
    """On two processes, which accumulate."""
    plain = trained(processes, in1k_dir, tmp_path / "plain", (4, 2))
    options = {"activation_checkpointing": True}
    loss, gradients = trained(processes, in1k_dir, tmp_path / "run", (4, 2), **options)
    assert loss == plain[0]
    assert all(torch.equal(gradients[name], plain[1][name]) for name in plain[1])


def test_without_a_gpu_to_measure_auto_is_the_default(processes, in1k_dir, tmp_path):
    loss, _ = trained(processes, in1k_dir, tmp_path / "auto", ("auto", 1))
    assert loss == trained(processes, in1k_dir, tmp_path / "all", (16, 1))[0]
