"""Does a probe order the lines as finetuning does?"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from pipeline.report.agreement import _agreement, agreements, sentence
from pipeline.report.page import write_all
from pipeline.report.scores import MEASURES, make_lines
from tests.pipeline.finished_run import write_run
from tests.pipeline.test_report import text_of

FIVE = ("patches", "segments", "four_channels", "preencoder", "segment_patches")


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_scipys_and_the_share_is_counted_by_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.integers(0, 6, 9).astype(float), rng.integers(0, 6, 9).astype(float)
    found = _agreement(one, two)
    assert found is not None
    tau, alike = found
    assert tau.value == pytest.approx(kendalltau(one, two).statistic)
    signs = [(one[i] - one[j]) * (two[i] - two[j]) for i, j in combinations(range(9), 2)]
    assert alike.value == pytest.approx(sum(s > 0 for s in signs) / sum(s != 0 for s in signs))
    assert -1 <= tau.low <= tau.value <= tau.high <= 1
    assert 0 <= alike.low <= alike.value <= alike.high <= 1


def test_scores_that_order_nothing_have_no_tau() -> None:
    assert _agreement(np.ones(5), np.arange(5.0)) is None


def test_the_interval_gets_narrower_with_more_lines() -> None:
    def width(lines: int) -> float:
        rng = np.random.default_rng(0)
        dear = rng.normal(size=lines)
        found = _agreement(dear + rng.normal(size=lines), dear)
        assert found is not None
        return found[0].high - found[0].low

    assert width(80) < width(20) < width(6)


def test_each_probe_is_compared_at_each_epoch_and_the_report_says_it(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", FIVE, seeds=(0, 1), probes=True, chance=0.01)
    found = agreements(make_lines([paths]))
    assert [(one.measure, one.point) for one in found if one.measure is not MEASURES["rankme"]] == [
        (MEASURES[name], epochs) for name in ("linear", "knn", "knn_raw") for epochs in (10, 5)
    ]
    assert {one.lines for one in found} == {5}
    first = found[0]
    assert (first.tau.value, first.alike.value) == (pytest.approx(1), 1)
    write_all(paths)
    words = text_of(paths.report_html)
    assert (
        "Does the cheap score predict the dear one? Over 5 lines the frozen linear probe orders 100%" in words
    )


def test_of_few_lines_and_without_finetunings_nothing_is_said(tmp_path: Path) -> None:
    few = write_run(tmp_path / "few", FIVE[:4], probes=True)
    probed = write_run(tmp_path / "probed", FIVE, probes=True, finetuned=False)
    for paths in (few, probed):
        assert agreements(make_lines([paths])) == []
    assert sentence([]) == ""
