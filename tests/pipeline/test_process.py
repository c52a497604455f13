"""Stopping steps of several processes: torchrun and its workers."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from pipeline.launch import local
from pipeline.launch.local import LocalLauncher, environment, marked
from pipeline.plan.layout import Layout
from pipeline.plan.settings import Settings
from pipeline.plan.steps import make_plan
from tests.pipeline.programs import standin
from tests.processes import until

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("save_seconds", "grace_seconds", "state"), [(0.2, 120.0, "stopped"), (20.0, 1.0, "failed")]
)
def test_the_workers_of_torchrun_have_the_whole_grace_to_save_and_no_more(
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    save_seconds: float,
    grace_seconds: float,
    state: str,
) -> None:
    """By itself torchrun ends them after 30 s: too early, or here so late that they save."""
    chosen = settings("--pretrain-epochs 100 --eval-freq 100 --num-processes 2")
    step = standin(make_plan(chosen)[0], seconds=60, save_seconds=save_seconds)
    paths, ended = Layout(chosen.data.output_dir), []
    assert environment(step)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "120"
    monkeypatch.setattr(local, "GRACE_SECONDS", grace_seconds)
    launcher = LocalLauncher(paths, overlaps=False, output=io.BytesIO())
    launcher.start(step)
    until(lambda: launcher.poll() or step.console_log.read_text().count("started") == 2)
    launcher.stop()
    until(lambda: ended.extend(launcher.poll()) or ended)
    assert [end.state for end in ended] == [state]
    assert marked(f"{paths.root}:{step.name}") == []
