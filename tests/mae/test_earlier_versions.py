"""What an earlier version left is continued, whatever settings came later."""

import dataclasses
from pathlib import Path

import pytest
import torch

from common.options import make, option
from mae import config as config_module
from mae.config import MethodConfig, ModelConfig, OptimisationConfig, parse_group
from mae.model import MaskedAutoencoder
from mae.pretrain import make_optimizer, pretrain
from mae.weights import load_checkpoint
from tests.mae.conftest import make_config, read_epochs

EARLIER = Path(__file__).resolve().parents[1] / "fixtures/earlier_run/run"


def without(path, *names):
    """The checkpoint as a version that did not know these settings would have written it."""
    content = torch.load(path, weights_only=True)
    for name in names:
        del content["config"][name]
    torch.save(content, path)


def test_a_checkpoint_without_a_later_setting_is_continued_at_its_older_value(in1k_dir, tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert pretrain(make_config(in1k_dir, whole, epochs=2))
    assert pretrain(make_config(in1k_dir, split, epochs=2, stop_after=1))
    without(split / "last.pth", "hide", "val_images")
    assert pretrain(make_config(in1k_dir, split, epochs=2))
    assert read_epochs(whole) == read_epochs(split)


def test_a_later_setting_at_another_value_is_refused_by_name(in1k_dir, tmp_path):
    assert pretrain(make_config(in1k_dir, tmp_path, epochs=2, stop_after=1))
    without(tmp_path / "last.pth", "hide")
    with pytest.raises(ValueError, match="hide: segment -> background"):
        pretrain(make_config(in1k_dir, tmp_path, epochs=2, hide="background"))


def test_a_checkpoint_without_a_later_setting_of_the_model_can_be_drawn(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(ModelConfig):
        drop_path: float = option("Came later.", 0.1, at_least=0, older=0.0)

    stored = torch.load(EARLIER / "pretrain_output/four_channels/last.pth", weights_only=True)
    from engine.vit import VIT_SIZES, VitSize

    nano = VitSize(width=16, depth=2, heads=2, patch_size=8)
    monkeypatch.setitem(VIT_SIZES, "vit_nano", nano)
    assert parse_group(Later, stored["config"], Path("a.pth")).drop_path == 0.0


def test_the_optimizer_of_an_earlier_version_fits(monkeypatch):
    """Groups and their order are part of a checkpoint: matrices first, then biases and norms."""
    from engine.vit import VIT_SIZES, VitSize

    monkeypatch.setitem(VIT_SIZES, "vit_nano", VitSize(width=16, depth=2, heads=2, patch_size=8))
    stored = load_checkpoint(EARLIER / "pretrain_output/four_channels/last.pth")
    method, model_config = (
        parse_group(group, stored["config"], Path("a.pth")) for group in (MethodConfig, ModelConfig)
    )
    model = MaskedAutoencoder(model_config, config_module.make_method(method, model_config))
    optimizer = make_optimizer(model, make(OptimisationConfig, {}))
    optimizer.load_state_dict(stored["optimizer"])
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_matrices_decay_and_vectors_do_not(weight_decay):
    method, config = MethodConfig(), ModelConfig(model="vit_tiny")
    with torch.device("meta"):
        model = MaskedAutoencoder(config, config_module.make_method(method, config))
    decayed, kept = make_optimizer(
        model, make(OptimisationConfig, {"weight_decay": weight_decay})
    ).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (weight_decay, 0.0)
    assert decayed["betas"] == (0.9, 0.95)
    assert not model.pos_embed.requires_grad
    assert {p.ndim for p in kept["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in decayed["params"]] == [id(p) for p in trained if p.ndim > 1]
