"""A masking method from outside: one class in one file, also one with weights of its own."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.mae.conftest import SMALL_RUN

REPOSITORY = Path(__file__).resolve().parents[2]
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


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mae", *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip


def test_a_method_in_a_file_is_listed_trained_drawn_and_exported(in1k_dir, tmp_path):
    plugin, out = tmp_path / "stripes.py", tmp_path / "out"
    plugin.write_text(STRIPES)
    listed = json.loads(run("methods", "--plugin", plugin).stdout)["methods"]
    assert listed["stripes"] == {
        "uses_segments": False, "all_segments": False, "settings": [],
    }  # fmt: skip
    assert list(listed)[-1] == "stripes"

    options = {**SMALL_RUN, "in1k_dir": str(in1k_dir), "mask_method": "stripes", "epochs": 1}
    config = tmp_path / "config.yml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    command = ("pretrain", "--config", config, "--output-dir", out)
    assert "choose one of" in run(*command).stderr
    done = run(*command, "--plugin", plugin)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "log.txt").read_text())
    assert record["coverage_percent_mean"] == 50
    weights = torch.load(out / "checkpoint-1.pth", weights_only=True)["model"]
    assert weights["preencoder.weight"].shape == (3, 3, 1, 1)

    drawn = run("reconstruct", out / "checkpoint-1.pth", "--out", tmp_path / "a.png",
                "--plugin", plugin)  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    exported = run("export", out / "checkpoint-1.pth", "--out", tmp_path / "a.pth")
    assert exported.returncode == 0
    assert exported.stdout.startswith("timm.create_model(")
    encoder = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert "preencoder.weight" not in encoder


def test_a_plugin_that_fails_is_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_like_this")
    for name, message in (("broken.py", "No module named"), ("none.py", "No such file"),
                          ("data.txt", "give a Python file")):  # fmt: skip
        done = run("methods", "--plugin", tmp_path / name)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert message in done.stderr
