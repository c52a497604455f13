from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from pipeline import options
from pipeline.settings import Settings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The smallest folders that pass the pipeline's own checks."""
    folder = tmp_path / "data"
    (folder / "in1k/train/disc").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "in1k/train/disc/disc_0.JPEG")
    (folder / "in1k/masks/disc").mkdir(parents=True)
    (folder / "in1k/masks/disc/disc_0.json").write_text("[]")
    (folder / "dataset.yml").write_text("name: x\n")
    return folder


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings as the command line makes them, from words such as "--seed 1,2"."""

    def make(words: str = "", output_dir: Path = tmp_path / "out") -> Settings:
        given: dict[str, Any] = {}

        @click.command(context_settings={"token_normalize_func": options.normalize})
        @options.run_options
        def command(**values: Any) -> None:
            given.update(values)

        base = f"--in1k-dir {data / 'in1k'} --eval-dataset {data / 'dataset.yml'} --num-gpus 0"
        line = [*base.split(), "--output-dir", str(output_dir), *words.split()]
        command.main(line, standalone_mode=False)
        return options.settings_from(given)

    return make
