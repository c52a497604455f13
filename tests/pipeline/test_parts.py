"""What the real parts answer to the pipeline's questions."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.plan.layout import Layout
from pipeline.plan.parts import Facts, ask, ask_facts
from pipeline.plan.sample import SampleSize, write_sample
from pipeline.plan.settings import Settings
from tests.pipeline.programs import FACTS


@pytest.fixture(scope="module")
def facts() -> Facts:
    return ask_facts()


def test_methods_and_recipes_are_those_of_the_stand_in(facts: Facts) -> None:
    assert facts.methods == FACTS.methods
    assert list(facts.methods) == list(FACTS.methods)
    for name, values in FACTS.recipes.items():
        assert values.items() <= facts.recipes[name].items()


@pytest.mark.parametrize("kind", ["pretrain", "evaluate"])
def test_options_are_those_of_the_stand_in(facts: Facts, kind: str) -> None:
    real = facts.options[kind]
    for name, fact in FACTS.options[kind].items():
        assert real[name]["neutral"] == fact["neutral"], name
        if name not in ("device", "compile", "resume", "log_with", "recipe"):
            assert real[name]["default"] == fact["default"], name


def test_each_reason_of_parts_that_refuse_is_said_once() -> None:
    refuses = [sys.executable, "-c", "import sys; sys.exit('Error: no')"]
    with pytest.raises(ValueError, match=r"^no$"):
        ask([refuses, refuses])


def test_a_folder_of_files_has_to_be_packed_into_itself(tmp_path: Path) -> None:
    size = SampleSize(train=4, val=1, segmentation_train=1, segmentation_val=1)
    write_sample(tmp_path, size)
    masks = tmp_path / "in1k/masks"
    [mae] = ask([[sys.executable, "-m", "mae", "methods", "--in1k-dir", str(tmp_path / "in1k")]])
    assert mae["segments"] == {
        "path": str(masks), "form": "RLE JSON", "needs_packing": True,
        "needs_making": False,
        "store": str(masks / "masks.sqlite"),
    }  # fmt: skip


def test_where_there_are_no_segments_they_are_to_be_made(
    settings: Callable[..., Settings], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings("--pretrain-epochs 1")
    shutil.rmtree(data / "in1k/masks")
    found = ask_facts(chosen)
    assert (found.packing, found.val_dir) == (None, None)
    assert found.making == data / "in1k/masks/masks.sqlite"
    (data / "in1k/val").mkdir()
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != data / "in1k")
    found = ask_facts(chosen)
    assert found.making == Layout(chosen.data.output_dir).segments
    assert found.val_dir == data / "in1k/val"
