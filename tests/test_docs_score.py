"""docs/score.md: each of its commands does what the page says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from tests.segmenter.boxes import call, write_dataset

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/score.md").read_text()
COMMANDS = [block.strip() for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]
LEAVES = ("scores/report.html", "own/result.json", "", "capi/result.json", "features.png")
# So small that each takes seconds: sizes that the page leaves to the recipe or the preset.
SIZES = ["image_size=64", "crop_size=64", "window_size=64", "window_stride=48"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the commands are about."""
    folder = tmp_path_factory.mktemp("score")
    (folder / "data").mkdir()
    write_dataset(folder / "data", train=11, val=12)
    shutil.copytree(folder / "data/images/validation", folder / "photos")
    for number, path in enumerate(sorted((folder / "photos").iterdir())):
        path.rename(path.with_name(f"{number:03d}.jpg"))
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64)
    torch.save({"state_dict": vit.state_dict()}, folder / "encoder.pth")
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56}
    dinov2 = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **small)
    save_for_hf(dinov2, str(folder / "dinov2_small"), model_args=small, safe_serialization=True)
    (folder / "own.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    return folder


def test_the_page_has_the_commands_that_are_run_here():
    assert len(COMMANDS) == len(LEAVES)
    assert all(command.startswith("python ") and "\n" not in command for command in COMMANDS)


@pytest.mark.parametrize(("command", "leaves"), list(zip(COMMANDS, LEAVES, strict=True))[1:])
def test_a_command_of_the_page_runs(folder, command, leaves, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    _, _, room, *words = shlex.split(command)
    assert room == "segmenter"
    if words[0] == "probe":
        words += ["--workers", "0", *(part for size in SIZES for part in f"--{size}".split("="))]
    words += [] if words[0] == "prepare" else ["--device", "cpu"]
    words += ["--model", "vit_tiny"] if words[0] == "draw-features" else []
    outcome = call(*words, capsys=capsys)
    assert outcome.code == 0, outcome.err
    assert (folder / leaves).exists()
    if words[0] == "prepare":
        assert "all sound" in outcome.out
    if leaves == "capi/result.json":
        assert {"capi_knn", "capi_logreg"} <= set(json.loads((folder / leaves).read_text()))


@pytest.mark.slow
def test_the_encoders_of_the_page_are_scored(folder):
    words = [str(ROOT / "benchmark.py"), *shlex.split(COMMANDS[0])[2:], "--num-gpus", "0"]
    words += ["--model", "vit_tiny", *(word for size in SIZES for word in ("--probe", size))]
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / LEAVES[0]).exists()
    made = {path.name for path in (folder / "scores/probe_output").iterdir()}
    assert made == {"mine_0", "dinov2_0", "scratch_0"}
    assert all(name in done.stdout for name in ("by the frozen linear probe", "mine", "GFLOPs an image"))


def test_what_the_page_says_of_presets_and_datasets_is_there():
    presets = {path.stem for path in (ROOT / "segmenter/presets").glob("*.yml")}
    assert presets == set(re.findall(r"^\| `([\w-]+)` \| ", PAGE, re.MULTILINE)) & presets
    assert len(list((ROOT / "segmenter/datasets").glob("*.yml"))) == 6
