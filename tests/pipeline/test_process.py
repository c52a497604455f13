"""Stopping steps of several processes: torchrun and its workers."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable

import pytest

from pipeline.launch.local import LocalLauncher, marked
from pipeline.plan.layout import Layout
from pipeline.plan.settings import Settings
from pipeline.plan.steps import make_plan
from tests.pipeline.programs import standin

Make = Callable[..., Settings]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("save_seconds", "at_most"),
    [(0.2, 25.0), pytest.param(40.0, 100.0, marks=pytest.mark.slow)],
)
def test_the_workers_of_torchrun_have_the_whole_grace_to_save(
    settings: Make, save_seconds: float, at_most: float
) -> None:
    """torchrun alone would end them after 30 s."""
    chosen = settings("--pretrain-epochs 100 --eval-freq 100 --num-processes 2")
    step = standin(make_plan(chosen)[0], seconds=save_seconds)
    paths = Layout(chosen.data.output_dir)
    launcher = LocalLauncher(paths, overlaps=False, output=io.BytesIO())
    launcher.start(step)
    while step.console_log.read_text().count("started") < 2:
        assert launcher.poll() == []
        time.sleep(0.1)
    asked, ended = time.monotonic(), []
    while not ended:
        launcher.stop()
        time.sleep(0.1)
        ended = launcher.poll()
    assert [end.state for end in ended] == ["stopped"]
    assert time.monotonic() - asked < at_most
    assert marked(f"{paths.root}:{step.name}") == []
