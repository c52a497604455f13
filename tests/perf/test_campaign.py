"""Rows, resuming and verdicts; and the whole campaign on a tiny model, in real processes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from perf.campaign import Results, Row, Table
from perf.correctness import _steps
from perf.rehearsal import Rehearsal

ROOT = Path(__file__).resolve().parents[2]
CARD = {"card": "H100", "torch": "2.14"}
FOREVER = float("inf")


def table_of(**work):
    """A table of verdicts whose rows call these functions."""
    rows = [Row(work=name, measure=measure, predicted="1-2") for name, measure in work.items()]
    return Table(title="speed", columns=("images/s", "passes"), rows=rows)


def gives(measured, name, **figures):
    """A row's work, which notes that it was done."""
    measured.append(name)
    return figures


def test_a_kill_loses_one_row_and_what_is_there_is_not_measured_again(tmp_path):
    measured, path = [], tmp_path / "out/gpu.json"

    def killed():
        raise KeyboardInterrupt

    first = partial(gives, measured, "first", **{"images/s": 12.345678})
    with pytest.raises(KeyboardInterrupt):
        Results(path, CARD).measure([table_of(first=first, second=killed)], until=FOREVER)
    (row,) = json.loads(path.read_text())
    assert (row["work"], row["figures"], row["card"]) == ("first", {"images/s": 12.345678}, "H100")

    again = table_of(first=first, second=partial(gives, measured, "second"))
    results = Results(path, CARD)
    assert results.exit_code([again]) == 75
    results.measure([again], until=FOREVER)
    assert measured == ["first", "second"]
    assert Results(path, CARD).exit_code([again]) == 0
    assert "| first | 12.35 |  | 1-2 |" in results.markdown([again])


def test_rows_of_another_card_stay_and_do_not_count(tmp_path):
    measured, path = [], tmp_path / "gpu.json"
    table = table_of(first=partial(gives, measured, "first"))
    Results(path, CARD).measure([table], until=FOREVER)
    Results(path, {**CARD, "card": "A100"}).measure([table], until=FOREVER)
    assert measured == ["first", "first"]
    assert [row["card"] for row in json.loads(path.read_text())] == ["H100", "A100"]


def test_no_row_begins_when_the_time_is_up_or_it_is_not_wanted(tmp_path):
    measured, results = [], Results(tmp_path / "gpu.json", CARD)
    table = table_of(first=partial(gives, measured, "first"))
    results.measure([table], until=0.0)
    results.measure([table], until=FOREVER, wanted="speed: second")
    assert measured == []
    assert "| first |  |  | 1-2 |" in results.markdown([table])


def test_an_error_is_the_rows_answer_and_is_tried_again(tmp_path):
    tried, results = [], Results(tmp_path / "gpu.json", CARD)

    def too_large():
        tried.append(1)
        raise RuntimeError("CUDA out of memory.\nmore")

    table = table_of(first=too_large, second=partial(gives, [], "second", passes=True))
    for _ in range(2):
        results.measure([table], until=FOREVER)
    assert len(tried) == 2
    assert "| first | CUDA out of memory. |  | 1-2 |" in results.markdown([table])
    assert results.exit_code([table]) == 1


@pytest.mark.parametrize(
    ("shown", "passes"),
    [
        ({"losses": [1.009]}, True),
        ({"losses": [1.011]}, False),
        ({"losses": [float("nan")]}, False),
        ({"losses": [1.0], "graphs": 1}, True),
        ({"losses": [1.0], "graphs": 2}, False),
        ({"losses": [1.0], "graphs": 1, "breaks": 1}, False),
        ({"losses": [1.0], "waits": ["training.py:1"]}, False),
    ],
)
def test_steps_pass_by_their_losses_graphs_and_waits(shown, passes):
    known = {"bf16": Rehearsal(**shown), "fp32": Rehearsal(losses=[1.0])}
    assert _steps(lambda method, precision: known[precision], "patches", "bf16")["passes"] is passes


def run_campaign(out):
    command = [sys.executable, "-m", "perf.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--out", out], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_the_tiny_campaign_runs_on_a_cpu(tmp_path):
    printed = run_campaign(tmp_path)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert len({(row["table"], row["work"]) for row in rows}) == len(rows) >= 75
    for row in rows:
        assert row["card"].startswith("CPU") and row["torch"] and row["tiny"]
        # A CPU has no such kernel; torchao need not be there.
        assert "figures" in row or "cudnn" in row["work"] or "float8" in row["work"], row
        assert row.get("figures", {}).get("passes", True)
    found = (tmp_path / "gpu.md").read_text()
    assert found in printed and all(f"| {row['work']} |" in found for row in rows)
    steps = [row["figures"] for row in rows if "images/s" in row.get("figures", {})]
    assert len(steps) >= 20 and all(figures["images/s"] > 0 for figures in steps)
