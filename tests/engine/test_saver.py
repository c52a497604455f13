"""Checkpoints that are written while training goes on."""

import signal
import subprocess
import sys
import threading

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import Saver


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until it is opened."""
    opened, save = threading.Event(), torch.save

    def wait_and_save(content, file):
        assert opened.wait(120)
        save(content, file)

    monkeypatch.setattr(checkpoint.torch, "save", wait_and_save)
    return opened


def read(path):
    return torch.load(path, weights_only=True)


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(tmp_path, gate):
    weight, told = torch.zeros(3), []
    content = {"model": {"w": weight}, "groups": [{"lr": 0.1, "params": [0]}], "steps": 1}
    with Saver(None) as saver:
        saver.save(content, tmp_path / "a", also=tmp_path / "b", afterwards=lambda: told.append(1))
        weight += 1  # training goes on
        content["groups"][0]["lr"] = 0.2
        saver.settle(wait=False)
        assert (told, list(tmp_path.glob("[ab]"))) == ([], [])
        gate.set()
        saver.settle(wait=True)
        assert told == [1]
        saver.settle(wait=True)
        assert told == [1]
    for name in ("a", "b"):
        kept = read(tmp_path / name)
        assert torch.equal(kept["model"]["w"], torch.zeros(3))
        assert kept["groups"] == [{"lr": 0.1, "params": [0]}]


def test_the_next_save_waits_for_the_one_before(tmp_path, gate):
    order = []
    with Saver(None) as saver:
        saver.save({"n": 1}, tmp_path / "last", afterwards=lambda: order.append("first told"))
        threading.Timer(0.2, lambda: (order.append("opened"), gate.set())).start()
        saver.save({"n": 2}, tmp_path / "last")
        assert order == ["opened", "first told"]
    assert read(tmp_path / "last")["n"] == 2  # leaving the context waits, too


def test_what_cannot_be_written_is_told_by_the_next_call_and_replaces_nothing(tmp_path):
    with Saver(None) as saver:
        saver.save({"w": torch.ones(1)}, tmp_path / "last")
        saver.save({"w": torch.tensor([float("nan")])}, tmp_path / "last")
        with pytest.raises(RuntimeError, match=r"w is not finite; .*last was not saved"):
            saver.settle(wait=True)
        saver.save({"w": torch.ones(1)}, tmp_path / "missing/last")
        with pytest.raises(RuntimeError, match="missing/last cannot be written"):
            saver.save({"w": torch.ones(1)}, tmp_path / "last")
    assert torch.equal(read(tmp_path / "last")["w"], torch.ones(1))


def test_a_save_is_due_by_the_clock(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    with Saver(2.0) as saver, Saver(None) as never:
        for seconds, due in ((0, False), (119, False), (120, True), (500, True)):
            now[0] = seconds
            assert (saver.is_due, never.is_due) == (due, False)
        saver.save({}, tmp_path / "last")
        assert not saver.is_due


KILLED = """
import os, signal, sys, torch
from engine import checkpoint
with checkpoint.Saver(None) as saver:
    saver.save({"n": 1}, checkpoint.Path(sys.argv[1]))
    saver.settle(wait=True)
    checkpoint.torch.save = lambda content, file: (file.write(b"half"), file.flush(),
                                                  os.kill(os.getpid(), signal.SIGKILL))
    saver.save({"n": 2}, checkpoint.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_kill_while_it_writes_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.pth"
    done = subprocess.run([sys.executable, "-c", KILLED, path], timeout=240)
    assert done.returncode == -signal.SIGKILL
    assert read(path)["n"] == 1
    assert len(list(tmp_path.iterdir())) == 2  # and what the next save replaces
