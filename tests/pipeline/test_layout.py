from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.plan.layout import Layout, RunId, parse_eval_name

RATIOS = [0.0, 15.0, 25.0, 12.5, 1e-5, 1.5e-7, 12.3456789, 99.99999999999999, 100.0, 0.1 + 0.2]
RATIOS += [random.Random(0).uniform(0, 100) for _ in range(50)]


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("source", ["own", "borrowed"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_names_are_parsed_back_whatever_the_ratio(ratio: float, source: str, seed: int) -> None:
    run = RunId(method="four_channels", coverage_ratio=ratio, segments_from=source, seed=seed)
    assert RunId.parse(run.name) == run
    for eval_seed in (0, 2):
        folder = Layout(Path("/out")).eval_dir(run.name, 5, eval_seed)
        assert parse_eval_name(folder.name) == (run, 5, eval_seed)


def test_names_as_the_design_has_them() -> None:
    paths = Layout(Path("/out"))
    assert RunId(method="four_channels").name == "four_channels"
    assert RunId(method="four_channels", coverage_ratio=25.0, seed=1).name == ("four_channels-cov25-seed1")
    run = RunId(method="four_channels", coverage_ratio=25.0, segments_from="blob", seed=1)
    assert run.name == "four_channels-cov25-blob-seed1"
    assert paths.probe_dir(run.name, 5) == Path("/out/probe_output") / f"{run.name}_5"
    assert paths.eval_dir("scratch", 0) == Path("/out/eval_output/scratch_0")
    assert paths.eval_dir("patches", 5, 1).name == "patches_5-evalseed1"


def test_a_method_of_ones_own_may_have_any_name() -> None:
    run = RunId(method="Blocks_v2_5", coverage_ratio=30.0)
    assert RunId.parse(run.name) == run
    assert parse_eval_name("Blocks_v2_5-cov30_10")[0] == run


@pytest.mark.parametrize(
    "name",
    [
        "",
        "patches",
        "old-patches_3",
        "patches-copy_3",
        "-cov15_3",
        "patches_x",
        "patches_5-evalseed",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse_eval_name(name)
