"""A masking method from outside: one class in one file, also one with weights of its own."""

import json
import re

import pytest
import torch
import yaml

from engine.vit import VIT_SIZES
from mae.cli import main
from mae.masking import METHODS
from tests.mae.conftest import SMALL_RUN

STRIPES = '''
print("a plugin may say what it likes")
import numpy as np
from mae.masking import MaskingMethod


class Stripes(MaskingMethod):
    """Every other column of pixels is hidden, and a layer of its own looks at the rest."""

    name = "stripes"
    uses_segments = False
    settings = ()

    def pattern(self, rng, segment):
        visible = np.ones((self.image_size, self.image_size), np.uint8)
        visible[:, :: 2] = 0
        return visible

    def preencoder(self, image_channels):
        import torch

        return torch.nn.Conv2d(image_channels, image_channels, 1)
'''


@pytest.fixture
def run(capsys):
    """`python -m mae ...` in this process: exit code, and what it prints and logs."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    yield call
    METHODS.pop("stripes", None)


def test_a_method_in_a_file_is_listed_trained_drawn_and_exported(in1k_dir, tmp_path, run):
    plugin, out = tmp_path / "stripes.py", tmp_path / "out"
    plugin.write_text(STRIPES)
    options = {**SMALL_RUN, "in1k_dir": str(in1k_dir), "mask_method": "stripes", "epochs": 1}
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump({**options, "model": "vit_tiny"}))  # that timm has, too
    command = ("pretrain", "--config", config, "--output-dir", out)
    assert "choose one of" in run(*command)[2]
    code, listed, errors = run("methods", "--plugin", plugin)
    assert (code, "a plugin may say what it likes" in errors) == (0, True)
    assert re.search(r"^stripes +- +all +3$", listed, re.M)

    code, _, errors = run(*command, "--plugin", plugin)
    assert code == 0, errors
    record = json.loads((out / "log.txt").read_text())
    assert record["coverage_percent_mean"] == 50
    weights = torch.load(out / "checkpoint-1.pth", weights_only=True)["model"]
    assert weights["preencoder.weight"].shape == (3, 3, 1, 1)

    drawn = ("reconstruct", out / "checkpoint-1.pth", "--out", tmp_path / "a.png")
    assert run(*drawn, "--plugin", plugin)[0] == 0
    code, printed, _ = run("export", out / "checkpoint-1.pth", "--out", tmp_path / "a.pth")
    assert (code, printed.startswith("timm.create_model(")) == (0, True)
    encoder = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert "preencoder.weight" not in encoder


def test_a_plugin_that_fails_is_one_line(tmp_path, run):
    (tmp_path / "broken.py").write_text("import nothing_like_this")
    for name, message in (("broken.py", "No module named"), ("none.py", "No such file"),
                          ("data.txt", "give a Python file")):  # fmt: skip
        code, printed, errors = run("methods", "--plugin", tmp_path / name)
        assert (code, printed) == (2, "")
        assert len(errors.splitlines()) == 1
        assert message in errors


def test_a_model_of_a_plugin_is_a_vit_size(tmp_path, run, monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "vit_odd", VIT_SIZES["vit_tiny"])  # is taken out again
    plugin = tmp_path / "odd.py"
    plugin.write_text("from engine.vit import VIT_SIZES\nVIT_SIZES['vit_odd'] = (16, 1, 2)")
    code, _, said = run("methods", "--plugin", plugin)
    assert code == 2
    assert said == f"Error: --plugin {plugin}: VIT_SIZES['vit_odd'] is no VitSize\n"


@pytest.mark.parametrize("name", ["patches", "scratch", "mae", "untrained", "../../x", "a b", "", "-x", "é"])
def test_a_method_cannot_take_a_name_that_stands_for_something_else(tmp_path, run, name):
    before = dict(METHODS)
    plugin = tmp_path / "named.py"
    plugin.write_text(STRIPES.replace('"stripes"', repr(name)))
    code, _, said = run("methods", "--plugin", plugin)
    assert code == 2
    assert f"--plugin {plugin}: ValueError: a method cannot be called {name!r}: give a word" in said
    assert before == METHODS
