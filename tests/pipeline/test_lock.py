from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.lock import LockedError, hold
from pipeline.process import start_ticks


def test_a_second_run_is_refused_naming_the_first(tmp_path: Path) -> None:
    path = tmp_path / "out/.segmae/lock"
    with hold(path):
        with pytest.raises(LockedError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            hold(path).__enter__()
        assert path.exists()
    assert not path.exists()


def _write_lock(path: Path, **other: object) -> None:
    pid = os.getpid()
    holder = {"host": socket.gethostname(), "pid": pid, "pid_started": start_ticks(pid)}
    path.write_text(json.dumps({**holder, "since": "then", **other}))


def test_a_dead_process_leaves_a_lock_that_is_taken_over(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _write_lock(tmp_path / "lock", pid=gone.pid, pid_started=1)
    with hold(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="start times are read from /proc")
def test_a_process_that_got_the_number_of_a_dead_one_is_not_the_holder(tmp_path: Path) -> None:
    _write_lock(tmp_path / "lock", pid_started=1)
    with hold(tmp_path / "lock"):
        pass


def test_another_host_counts_as_living(tmp_path: Path) -> None:
    _write_lock(tmp_path / "lock", host="elsewhere")
    with pytest.raises(LockedError, match="on elsewhere"):
        hold(tmp_path / "lock").__enter__()


def test_a_slurm_job_that_was_started_again_elsewhere_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_lock(tmp_path / "lock", host="elsewhere", job="7", restart="")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(LockedError, match="on elsewhere"):  # another process of the same start
        hold(tmp_path / "lock").__enter__()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with hold(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text())["restart"] == "1"


def test_a_file_that_is_no_lock_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("what")
    with pytest.raises(LockedError, match="is not a lock"):
        hold(tmp_path / "lock").__enter__()


def test_nothing_is_left_aside(tmp_path: Path) -> None:
    with hold(tmp_path / "lock"):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []
