from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from PIL import Image

import benchmark
from common.command import command
from pipeline.plan import machine
from pipeline.plan.machine import Gpu
from pipeline.plan.settings import GROUPS, Settings

# In the place of NVIDIA's library.
PYNVML = """
class NVMLError(Exception): pass
CARDS = {cards}
def nvmlInit():
    if not CARDS: raise NVMLError("Driver Not Loaded")
def nvmlShutdown(): pass
def nvmlSystemGetDriverVersion(): return "{driver}.65.06"
def nvmlDeviceGetCount(): return len(CARDS)
def nvmlDeviceGetHandleByIndex(index): return CARDS[index]
def nvmlDeviceGetName(card): return card[0]
def nvmlDeviceGetCudaComputeCapability(card): return card[2]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The smallest folders that a plan can be about."""
    folder = tmp_path / "data"
    (folder / "in1k/train/disc").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "in1k/train/disc/disc_0.JPEG")
    (folder / "in1k/masks/disc").mkdir(parents=True)
    (folder / "in1k/masks/disc/disc_0.json").write_text("[]")
    (folder / "dataset.yml").write_text("name: x\n")
    return folder


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings as the command line makes them, from words such as "--seed 1,2".

    Without reference lines and probes where the words do not ask for them: most plans are read here
    for their rounds.
    """

    def make(words: str = "", output_dir: Path = tmp_path / "out") -> Settings:
        made: list[Settings] = []
        group = click.Group()

        @command(group, "run", **GROUPS)
        def run(**groups: object) -> None:
            made.append(benchmark._settings(groups))

        base = f"run --in1k-dir {data / 'in1k'} --num-gpus 0 --output-dir {output_dir}"
        dataset = "" if "--ade20k-dir" in words else f" --eval-dataset {data / 'dataset.yml'}"
        for flag, off in (("--baselines", "none"), ("--probe-freq", "0")):
            base += "" if flag in words else f" {flag} {off}"
        group.main([*(base + dataset).split(), *words.split()], standalone_mode=False)
        return made[0]

    return make


@pytest.fixture
def cards_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives this machine these GPUs, for the processes that are started, too."""

    def make(*cards: Gpu) -> None:
        path = tmp_path / "nvml/pynvml.py"
        path.parent.mkdir(exist_ok=True)
        driver = cards[0].driver if cards else 0
        path.write_text(PYNVML.format(cards=[tuple(card) for card in cards], driver=driver))
        monkeypatch.setattr(machine, "pynvml", SimpleNamespace(**runpy.run_path(str(path))))
        monkeypatch.setenv("PYTHONPATH", str(path.parent), prepend=os.pathsep)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make
