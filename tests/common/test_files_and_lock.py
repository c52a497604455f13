"""Files are there whole or not at all; a lock has one holder, and a dead one lets go."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import files
from common.files import also_save_as, beside, hold, replacing, write_json, write_text
from common.formats import read_log
from common.step_files import checkpoint_path, epochs_of, find_resumable, reconstructions_path

ROOT = Path(__file__).resolve().parents[2]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as unfinished:
        unfinished.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"a.txt cannot be written: No space left.*Make room"):
        write_text(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_never_written(tmp_path):
    write_json(tmp_path / "a.json", {"mean_iou": 1.0})
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "a.json", {"mean_iou": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"mean_iou": 1.0}


def test_a_second_name_is_a_link_that_later_writes_do_not_touch(tmp_path):
    write_text(tmp_path / "a", "one")
    also_save_as(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")
    also_save_as(tmp_path / "a", tmp_path / "b")  # again
    with replacing(tmp_path / "a") as unfinished:
        unfinished.write_text("two")
    assert (tmp_path / "b").read_text() == "one"


def test_many_processes_may_replace_one_small_file(tmp_path):
    path = tmp_path / "deep/er/a.json"
    program = (
        "import sys; from pathlib import Path; from common.files import write_json\n"
        "for n in range(200): write_json(Path(sys.argv[1]), {'n': list(range(n))})"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, path], cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(json.loads(path.read_text())["n"]) == 199
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_names_are_built_and_parsed_in_one_place(tmp_path):
    for build in (checkpoint_path, reconstructions_path):
        assert epochs_of(build(tmp_path, 12)) == 12
    for name in (
        "checkpoint-x.pth",
        "checkpoint-1.pth.segmae-part",
        "last.pth",
        "xcheckpoint-1.pth",
    ):
        assert epochs_of(tmp_path / name) is None
    assert find_resumable(tmp_path) is None
    for epochs in (9, 10):
        checkpoint_path(tmp_path, epochs).touch()
    assert find_resumable(tmp_path) == checkpoint_path(tmp_path, 10)
    (tmp_path / "last.pth").touch()
    assert find_resumable(tmp_path) == tmp_path / "last.pth"


HOLDER = (
    "import sys, time; from pathlib import Path; from common.files import hold\n"
    "with hold(Path(sys.argv[1]) / '.lock', Path(sys.argv[1])):\n"
    "    print('held', flush=True); time.sleep(60)"
)


def start_holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_holder_is_refused_by_name_and_a_killed_one_lets_go(tmp_path):
    process = start_holder(tmp_path)
    try:
        refused = pytest.raises(ValueError, match=f"process {process.pid} on .*already works in")
        with refused, hold(tmp_path / ".lock", tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with hold(tmp_path / ".lock", tmp_path):
        pass


def test_the_lock_file_stays_so_that_nobody_holds_a_name_that_is_gone(tmp_path):
    """Unlinked, it would be held by one process while another makes, and holds, a new one."""
    with hold(tmp_path / ".lock", tmp_path):
        inode = (tmp_path / ".lock").stat().st_ino
        opened_by_a_waiter = os.open(tmp_path / ".lock", os.O_RDWR)
    try:
        process = start_holder(tmp_path)
        try:
            assert (tmp_path / ".lock").stat().st_ino == inode == os.fstat(opened_by_a_waiter).st_ino
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(opened_by_a_waiter)


def test_children_that_were_forked_do_not_keep_the_lock_of_a_killed_process(tmp_path):
    program = (
        "import os, sys, time; from pathlib import Path; from common.files import hold\n"
        "with hold(Path(sys.argv[1]) / '.lock', Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if not child: print(os.getpid(), flush=True); time.sleep(30); os._exit(0)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        with hold(tmp_path / ".lock", tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_log_line_that_a_kill_cut_is_dropped(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert read_log(tmp_path / "log.txt") == [{"epoch": 1}, {"epoch": 2}]
    assert read_log(tmp_path / "none.txt") == []


def test_json_is_written_beside_and_renamed(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1]}
    assert beside(tmp_path / "a.json").name == "a.json.segmae-part"
