"""From photographs alone to a report: one call that begins with making the segments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from common.formats import read_log
from segments.store import PackedStore
from tests.pipeline.programs import run_benchmark
from tests.pipeline.whole_run import scores, write_inputs

CALL = ("--make-segments", "felzenszwalb", "--pretrain-epochs", "1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the sample without its masks."""
    made = write_inputs(tmp_path_factory.mktemp("photographs"))
    shutil.rmtree(made.parent / "in1k/masks")
    return made


def test_what_is_planned_is_shown_and_nothing_is_made(config: Path, tmp_path: Path) -> None:
    call = (*CALL, "--segment-shards", "2", "--mask-method", "patches,segments", "--dry-run")
    done = run_benchmark("--config", config, "--output-dir", tmp_path / "out", *call)
    assert done.returncode == 0, done.stderr
    for text in ("generate_segments_0-of-2", "make segments by felzenszwalb", "join the 2 parts"):
        assert text in done.stdout
    assert "pretraining: 12 images (0 left out), 4 held out (0 left out)" in done.stdout
    assert not (tmp_path / "out").exists()
    assert not (config.parent / "in1k/masks").exists()


@pytest.mark.slow
def test_photographs_alone_end_in_a_report_and_the_same_call_goes_on(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = ("--config", config, "--output-dir", out, *CALL)
    done = run_benchmark(*call)
    assert done.returncode == 0, done.stderr
    assert [row["method"] for row in scores(out)] == ["four_channels"]
    store = PackedStore(config.parent / "in1k/masks/masks.sqlite")
    known = store.images() | store.listed_empty()
    assert len(known) == 12 + 4
    assert sum(key.startswith("val/") for key in known) == 4
    [epoch] = read_log(out / "pretrain_output/four_channels/log.txt")
    assert epoch["val_loss"] > 0
    assert run_benchmark("status", out).stdout.startswith("3 steps: 3 done")
    assert "generate, hours" in (out / "report.html").read_text()

    again = run_benchmark(*call)
    assert again.returncode == 0, again.stderr
    names = [step["name"] for step in json.loads((out / ".segmae/plan.json").read_text())]
    assert "generate_segments" not in names
    assert "==" not in again.stdout, "no step was run"
