"""A tiny dataset of coloured boxes, and the command line called here or in real processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from common.options import Layer, make_all
from segmenter.config import GROUPS, TrainConfig
from tests import processes as processes_of
from tests import toy

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ["ground", "box", "sky"]
IGNORE = 3
SIZES = [(40, 56), (48, 48), (56, 40)]  # height and width; no multiples of a window of 32


def write_pair(folder: Path, split: str, number: int) -> None:
    rng = np.random.default_rng(number)
    height, width = SIZES[number % len(SIZES)]
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[: height // 3] = 2
    top, left = rng.integers(8, 20, 2)
    labels[top : top + 16, left : left + 16] = 1
    labels[:2] = IGNORE
    colours = np.array([[90, 60, 30], [200, 30, 40], [90, 160, 220], [0, 0, 0]])
    image = colours[labels] + rng.integers(-20, 20, (height, width, 3))
    for kind, array, suffix in (
        ("images", image.clip(0, 255).astype(np.uint8), ".jpg"),
        ("annotations", labels, ".png"),
    ):
        path = folder / kind / split / f"{number:03d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def write_dataset(folder: Path, train: int = 7, val: int = 3, **changes: object) -> Path:
    """A dataset of three classes; returns its YAML file."""
    for number in range(train):
        write_pair(folder, "training", number)
    for number in range(100, 100 + val):
        write_pair(folder, "validation", number)
    description = {
        "name": "boxes",
        "images": {"train": "images/training", "val": "images/validation"},
        "annotations": {"train": "annotations/training", "val": "annotations/validation"},
        "classes": CLASSES,
        "ignore_index": IGNORE,
        **changes,
    }
    path = folder / "dataset.yml"
    path.write_text(yaml.safe_dump(description))
    return path


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def call(*arguments: object, capsys: pytest.CaptureFixture[str] | None = None) -> Outcome:
    """`python -m segmenter ...` in this process."""
    from segmenter.cli import main

    if capsys is not None:
        capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        captured = capsys.readouterr() if capsys is not None else None
        return Outcome(
            int(error.code or 0), captured.out if captured else "", captured.err if captured else ""
        )
    raise AssertionError("main returned")


def train_arguments(dataset: Path, output_dir: Path, /, **changes: object) -> list[str]:
    """Two epochs of two steps of a vit_toy with dropout and drop path."""
    options: dict[str, object] = {
        "dataset": dataset,
        "output_dir": output_dir,
        "init": "random",
        "plugin": toy.PLUGIN,
        "model": "vit_toy",
        "recipe": "fast",
        "decoder": "mask_transformer",
        "epochs": 2,
        "batch_size": 3,
        "lr": 1e-3,
        "drop_path": 0.1,
        "decoder_dropout": 0.1,
        "image_size": 40,
        "crop_size": 32,
        "window_size": 32,
        "window_stride": 24,
        "eval_every": 1,
        "eval_batch_size": 1,
        "device": "cpu",
        "workers": 0,
        **changes,
    }
    arguments = ["train"]
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name}", str(value)]
    return arguments


def config_of(arguments: list[str]) -> TrainConfig:
    """What the command makes of them."""
    names = [name.lstrip("-").replace("-", "_") for name in arguments[1::2]]
    given = dict(zip(names, arguments[2::2], strict=True))
    return TrainConfig(**make_all(GROUPS, [Layer(given)]))


def run(
    arguments: list[str],
    output: Path,
    processes: int = 1,
    sabotage: Callable[[], None] | None = None,
    code: int = 0,
) -> None:
    """`python -m segmenter ...` in one process or several, which print into a file.

    sabotage: called in each before; code: with which each has to end.
    """
    work = partial(_command, [str(argument) for argument in arguments], sabotage)
    codes = processes_of.ended(processes_of.start(work, processes, output))
    assert codes == [code] * processes, output.read_text()


def _command(arguments: list[str], sabotage: Callable[[], None] | None, rank: int) -> int:
    if sabotage is not None:
        sabotage()
    return call(*arguments).code
