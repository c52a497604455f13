from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import layout
from pipeline.layout import Layout, RunName


@pytest.mark.parametrize(
    "run",
    [
        RunName(method="patches"),
        RunName(method="four_channels", coverage_ratio=12.5),
        RunName(method="segments", coverage_ratio=15, seed=3),
        RunName(method="scratch", seed=0),
    ],
)
def test_names_are_parsed_back(run: RunName) -> None:
    paths = Layout(Path("/out"))
    assert RunName.parse(str(run)) == run
    assert layout.parse_eval_name(paths.eval_dir(run, 5).name) == (run, 5)
    assert layout.checkpoint_epochs(paths.checkpoint(run, 40)) == 40
    assert layout.reconstructions_epochs(paths.reconstructions(run, 40)) == 40


def test_names_as_the_design_has_them() -> None:
    paths = Layout(Path("/out"))
    run = RunName(method="four_channels", coverage_ratio=15, seed=0)
    assert str(run) == "four_channels-cov15-seed0"
    assert paths.eval_dir(RunName(method="scratch"), 0) == Path("/out/eval_output/scratch_0")


@pytest.mark.parametrize("name", ["", "patches", "-cov15_3", "patches_x"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        layout.parse_eval_name(name)


@pytest.mark.parametrize("name", ["last.pth", "checkpoint-5.pth.tmp", "checkpoint-.pth"])
def test_other_files_are_no_checkpoints(name: str) -> None:
    assert layout.checkpoint_epochs(Path(name)) is None
