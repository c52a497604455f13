"""A small world of real input, to be damaged by a case, and the commands called in this process.

A case is clear if it ends with the promised exit code, with an error of at most four lines that
says what is meant, without a traceback, and, where it is refused, with nothing written or changed.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.step_files import LOCK
from tests.mae.conftest import pack_segments, write_image, write_segments
from tests.segmenter.boxes import write_dataset

NANO = """
from engine.vit import VIT_SIZES, VitSize
VIT_SIZES.setdefault("vit_speck", VitSize(width=16, depth=1, heads=2))
"""
PRETRAIN = {
    "model": "vit_speck", "image_size": 32, "patch_size": 16, "decoder_width": 16,
    "decoder_depth": 1, "decoder_heads": 2, "epochs": 2, "effective_batch_size": 4,
    "batch_size": 4, "workers": 0, "device": "cpu", "mask_method": "four_channels",
    "log_with": "none",
}  # fmt: skip
FINETUNE = {
    "model": "vit_speck", "recipe": "fast", "epochs": 1, "batch_size": 3, "image_size": 32,
    "crop_size": 32, "window_size": 32, "window_stride": 32, "workers": 0, "device": "cpu",
    "log_with": "none", "init": "random",
}  # fmt: skip
INSPECT = "segments inspect {w}/in1k/masks --processes 1 --out {w}/out"
REPORT = "benchmark report {w}/run"
MOST_LINES = 4


@dataclass(frozen=True)
class Case:
    """arguments: of `python -m mae`, segments, segmenter, or benchmark.py, which comes first; {w}
    stands for the world. prepare: what is done to the world before. says: parts of the error."""

    name: str
    arguments: str | list[str]
    says: str | tuple[str, ...] = ()
    code: int = 2
    prepare: Callable[[Path], Any] | None = None


def words_of(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def pretrain_words(world: Path, out: str = "new") -> list[str]:
    """A pretraining that would run."""
    paths = {"plugin": world / "nano.py", "in1k_dir": world / "in1k", "output_dir": world / out}
    return ["mae", "pretrain", *words_of({**PRETRAIN, **paths})]


def train_words(world: Path, out: str = "new") -> list[str]:
    """A finetuning that would run."""
    paths = {
        "plugin": world / "nano.py", "dataset": world / "data/dataset.yml",
        "output_dir": world / out,
    }  # fmt: skip
    return ["segmenter", "train", *words_of({**FINETUNE, **paths})]


def probe_words(world: Path, out: str = "new", init: str = "random") -> list[str]:
    """A probe that would run."""
    paths = {
        "plugin": world / "nano.py", "dataset": world / "data/dataset.yml",
        "output_dir": world / out,
    }  # fmt: skip
    shared = ("model", "recipe", "image_size", "crop_size", "window_size", "window_stride",
              "workers", "device")  # fmt: skip
    options = {name: FINETUNE[name] for name in shared}
    return ["segmenter", "probe", init, *words_of({**options, **paths})]


def benchmark_words(world: Path, out: str = "new") -> list[str]:
    """A plan that would run."""
    paths = {
        "plugin": world / "nano.py", "in1k_dir": world / "in1k", "output_dir": world / out,
        "eval_dataset": world / "data/dataset.yml", "num_gpus": 0, "pretrain_epochs": 2,
        "eval_freq": 1, "model": "vit_speck", "recipe": "fast",
    }  # fmt: skip
    small = [f"--pretrain={n}={PRETRAIN[n]}" for n in (
        "image_size", "patch_size", "decoder_width", "decoder_depth", "decoder_heads",
        "effective_batch_size", "batch_size", "workers")]  # fmt: skip
    return ["benchmark", *words_of(paths), *small]


def call(words: Iterable[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, here."""
    program, *arguments = map(str, words)
    capsys.readouterr()
    logging.getLogger().handlers = [
        handler for handler in logging.getLogger().handlers if "LogCapture" in str(type(handler))
    ]
    with pytest.raises(SystemExit) as end:
        _main(program)(arguments)
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def _main(program: str) -> Callable[[list[str]], Any]:
    if program == "mae":
        from mae.cli import main as mae

        return mae
    if program == "segments":
        from segments.cli import main as segments

        return segments
    if program == "segmenter":
        from segmenter.cli import main as segmenter

        return segmenter
    import benchmark
    from common.console import run_program

    return lambda arguments: run_program(benchmark.main, "benchmark.py", arguments)


def check(case: Case, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a case, and assert that it is clear."""
    if case.prepare is not None:
        case.prepare(world)
    before = snapshot(world)
    words = case.arguments.split() if isinstance(case.arguments, str) else case.arguments
    code, _, err = call([word.replace("{w}", str(world)) for word in words], capsys)
    assert "Traceback" not in err, err
    assert code == case.code, err
    if code:
        assert_clear(err, case.says)
    if code == 2:
        assert snapshot(world) == before


def assert_clear(err: str, says: str | tuple[str, ...]) -> None:
    """One error of a few lines, which says these things."""
    assert "Traceback" not in err, err
    message = err[err.rindex("Error: ") :] if "Error: " in err else ""
    assert message, err
    assert len(message.splitlines()) <= MOST_LINES, message
    assert max(map(len, message.splitlines())) < 1000, message
    for part in (says,) if isinstance(says, str) else says:
        assert re.search(part, err), err


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below with a digest of what it is."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = f"link {path.readlink()}"
        elif path.name == LOCK:  # it says who had it last
            found[str(path)] = "lock"
        elif path.is_file():
            found[str(path)] = hashlib.md5(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = oct(path.stat().st_mode)
    return found


def build(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """in1k/, data/, pre/ (a pretraining after one of two epochs), fine/ (a finetuning), photos/."""
    folder.mkdir()
    (folder / "nano.py").write_text(NANO)
    rng = np.random.default_rng(0)
    for number in range(8):
        name = f"class{number % 2}/image_{number}"
        write_image(folder / f"in1k/train/{name}.jpg", rng)
        write_segments(folder / f"in1k/masks/{name}.json", rng)
        write_segments(folder / f"loose/{name}.json", rng)
    for number in range(2):
        write_image(folder / f"in1k/val/held_out_{number}.jpg", rng)
        write_image(folder / f"photos/photo_{number}.png", rng)
    pack_segments(folder / "in1k/masks")
    for path in (folder / "in1k/masks").glob("class*"):
        shutil.rmtree(path)
    write_dataset(folder / "data")
    assert call([*pretrain_words(folder, "pre"), "--stop-after", "1"], capsys)[0] == 0
    assert call(train_words(folder, "fine"), capsys)[0] == 0
