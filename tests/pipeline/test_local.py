from __future__ import annotations

import http.server
import io
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import benchmark
from common.environment import PROGRESS_FILE
from common.progress import Counter, progress_text
from common.step_files import PROGRESS
from pipeline.launch.local import LocalLauncher, end_marked, failure_message, marked
from pipeline.plan.layout import Layout
from pipeline.plan.records import Record, is_done, read_progress, read_record, write_record
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from tests.pipeline.programs import REPO_ROOT, standin
from tests.processes import until

Make = Callable[..., Settings]


def alternate(steps: list[Step], paths: Layout, *, overlaps: bool = False, **how: bool) -> int:
    launcher = LocalLauncher(paths, overlaps=overlaps, output=io.BytesIO())
    return benchmark.alternate(steps, launcher, keep_going=how.get("keep_going", True))


def plan(settings: Settings, **behaviour: object) -> tuple[list[Step], Layout]:
    steps = [standin(step, **behaviour) for step in make_plan(settings)]
    return steps, Layout(settings.data.output_dir)


def test_steps_run_in_order_and_count_as_done(settings: Make) -> None:
    steps, paths = plan(settings("--pretrain-epochs 2 --eval-freq 1"))
    assert alternate(steps, paths) == 0
    assert all(is_done(step, paths) for step in steps)
    started = [read_record(paths, step.name).started for step in steps]
    assert started == sorted(started)
    assert "started" in steps[0].console_log.read_text()


class _Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_line_has_the_whole_plans_time_and_is_erased_when_a_step_ends(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, paths = plan(settings("--pretrain-epochs 1"), seconds=0.3)
    monkeypatch.setattr("pipeline.launch.local.time_left_text", lambda *_: "about 3 h left")
    screen = _Terminal()
    assert (
        benchmark.alternate(steps, LocalLauncher(paths, overlaps=False, output=screen), keep_going=True) == 0
    )
    *drawn, last = screen.getvalue().split(b"\r\x1b[2K")
    assert any(line.startswith(b"[about 3 h left in all]   pretrain_") for line in drawn)
    assert last == b"", "what was drawn last is about a step that has ended"


def test_a_second_run_starts_nothing(settings: Make) -> None:
    steps, paths = plan(settings("--pretrain-epochs 1"))
    alternate(steps, paths)
    assert alternate(steps, paths) == 0
    assert [read_record(paths, step.name).attempts for step in steps] == [1, 1]


def test_the_official_checkpoint_is_fetched_into_an_empty_output_directory(
    settings: Make, tmp_path: Path
) -> None:
    (tmp_path / "release.pth").write_bytes(b"9747179")  # its MD5 starts as the release's does
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        chosen = settings("--stack --model vit_base --pretrain-epochs 1")
        fetch, paths = make_plan(chosen)[0], Layout(chosen.data.output_dir)
        url = f"http://127.0.0.1:{server.server_port}/release.pth"
        words = (*fetch.words, "--url", url)
        assert alternate([replace(fetch, words=words)], paths) == 0
        server.shutdown()
        thread.join()
    assert fetch.outputs[0].read_bytes() == b"9747179"


def test_the_reason_is_found_above_torchruns_own_lines(settings: Make) -> None:
    step = make_plan(settings("--pretrain-epochs 1"))[0]
    step.folder.mkdir(parents=True)
    step.console_log.write_text("process 1: Error: the reason\n" + "torchrun's frame\n" * 30)
    assert "reason: process 1: Error: the reason\n" in failure_message(step, "ended")


def test_an_output_of_another_size_is_made_again(settings: Make) -> None:
    steps, paths = plan(settings("--pretrain-epochs 1"))
    alternate(steps, paths)
    steps[0].outputs[0].write_text("cut")
    assert not is_done(steps[0], paths)
    assert alternate(steps, paths) == 0
    assert read_record(paths, steps[0].name).attempts == 2


def test_failed_step_says_what_where_and_why_and_others_go_on(
    settings: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, paths = plan(settings("--pretrain-epochs 1 --mask-method patches,segments"))
    steps[0] = standin(steps[0], behaviour="fail")
    assert alternate(steps, paths) == 1
    assert [is_done(step, paths) for step in steps] == [False, False, True, True]
    said = capsys.readouterr().err
    for part in ("pretrain_patches_1", "exit code 3", "console.log", "the reason", "standin"):
        assert part in said


def test_fail_fast_starts_nothing_more(settings: Make) -> None:
    steps, paths = plan(settings("--pretrain-epochs 1 --mask-method patches,segments"))
    steps[0] = standin(steps[0], behaviour="fail")
    assert alternate(steps, paths, keep_going=False) == 1
    assert read_record(paths, steps[2].name) is None


def test_a_moved_output_folder_ends_the_run(
    settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To make it again would end with exit code 0, without what was done before."""
    steps, paths = plan(settings("--pretrain-epochs 1 --mask-method patches,segments"))
    paths.root.mkdir()
    launcher = LocalLauncher(paths, overlaps=False, output=io.BytesIO())
    start = launcher.start

    def moving(step: Step) -> Record:
        if step is steps[2]:
            paths.root.rename(tmp_path / "moved")
            paths.root.mkdir()  # as a step that is still running may do
        return start(step)

    launcher.start = moving  # type: ignore[method-assign]
    assert benchmark.alternate(steps, launcher, keep_going=True) == 1
    assert "is not what it was when the run began: put it back" in capsys.readouterr().err
    assert not any(paths.root.iterdir())
    assert is_done(steps[1], Layout(paths.root)) is False
    paths.root.rmdir()
    (tmp_path / "moved").rename(paths.root)
    assert alternate(steps, paths) == 0


def test_exit_code_0_without_its_files_is_a_failure(
    settings: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, paths = plan(settings("--pretrain-epochs 1"), behaviour="leaves-nothing")
    assert alternate(steps, paths) == 1
    assert "did not leave" in capsys.readouterr().err


def test_overlapping_evaluations_run_beside_the_next_round(settings: Make) -> None:
    steps, paths = plan(settings("--pretrain-epochs 2 --eval-freq 1"))
    steps[1] = standin(steps[1], until=paths.record("pretrain_four_channels_2"))  # it has begun
    assert alternate(steps, paths, overlaps=True) == 0


def test_descendants_with_their_own_session_are_ended_with_the_step(settings: Make) -> None:
    steps, paths = plan(settings("--pretrain-epochs 1"), behaviour="with-orphan")
    assert alternate(steps, paths) == 1
    assert marked(f"{paths.root}:{steps[0].name}") == []


def _start_elsewhere(
    root: Path, name: str, seconds: float, behaviour: str = "", save_seconds: float = 0
) -> subprocess.Popen:
    """A benchmark.py-like parent, in a process of its own, with one long step."""
    program = f"""
import benchmark, io, signal, sys
from pathlib import Path
from pipeline.launch import local
from pipeline.plan import steps as plan
from pipeline.plan.layout import Layout
root = Path({str(root)!r})
step = plan.Step(name={name!r}, kind="pretrain", what="nothing", run="patches", epochs=100,
    program=("tests.pipeline.standin",), folder=root / "x", device="cpu",
    words=("--output-dir", str(root / "x"), "--stop-after", "100", "--seconds", "{seconds}",
        "--behaviour", {behaviour!r}, "--save-seconds", "{save_seconds}"),
    outputs=(root / "x/checkpoint-100.pth",))
launcher = local.LocalLauncher(Layout(root), overlaps=False, output=io.BytesIO())
sys.exit(benchmark.alternate([step], launcher, keep_going=True))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPO_ROOT)
    log = root / "x/console.log"
    until(lambda: parent.poll() is not None or (log.exists() and "started" in log.read_text()))
    assert parent.poll() is None, "the parent ended before its step had started"
    return parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_save_and_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    parent = _start_elsewhere(tmp_path, "long", seconds=0.1)
    parent.send_signal(number)
    assert parent.wait(240) == 75
    assert read_record(Layout(tmp_path), "long").state == "stopped"
    assert marked(f"{tmp_path}:long") == []


@pytest.mark.slow
def test_a_second_signal_ends_a_step_that_does_not_listen(tmp_path: Path) -> None:
    parent = _start_elsewhere(tmp_path, "long", seconds=0.1, behaviour="stubborn")
    for wait in (0.1, 1.2):  # a terminal and torchrun pass one request on twice
        parent.send_signal(signal.SIGINT)
        time.sleep(wait)
        assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    assert parent.wait(240) == 75
    assert marked(f"{tmp_path}:long") == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_killed_parent_takes_its_step_along(tmp_path: Path) -> None:
    parent = _start_elsewhere(tmp_path, "long", seconds=0.1)
    parent.kill()
    parent.wait(240)
    until(lambda: not marked(f"{tmp_path}:long"))
    assert len((tmp_path / "x/log.txt").read_text().splitlines()) < 100


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_an_orphan_that_saves_is_waited_for_before_its_step_restarts(tmp_path: Path) -> None:
    parent = _start_elsewhere(tmp_path, "long", seconds=0.1, save_seconds=1)
    parent.kill()
    parent.wait(240)
    again = Step(
        name="long", kind="pretrain", what="nothing", run="patches", epochs=100,
        program=("tests.pipeline.standin",), folder=tmp_path / "x", device="cpu",
        words=("--output-dir", str(tmp_path / "x")), outputs=(tmp_path / "x/checkpoint-1.pth",),
    )  # fmt: skip
    assert alternate([again], Layout(tmp_path)) == 0
    assert re.fullmatch(r"started (\d+)\nsaved\nstarted (?!\1)\d+\n", again.console_log.read_text())


def test_an_orphan_that_does_not_end_is_ended_before_its_step_restarts(tmp_path: Path) -> None:
    parent = _start_elsewhere(tmp_path, "long", seconds=0.1, behaviour="stubborn")
    parent.kill()
    parent.wait(240)
    assert marked(f"{tmp_path}:long")
    end_marked(f"{tmp_path}:long", grace_seconds=0.2)
    assert marked(f"{tmp_path}:long") == []


def test_a_damaged_record_is_named(settings: Make) -> None:
    steps, paths = plan(settings("--pretrain-epochs 1"))
    paths.records.mkdir(parents=True)
    paths.record(steps[0].name).write_text("{")
    with pytest.raises(ValueError, match=r"json is damaged: .*; remove it"):
        is_done(steps[0], paths)


def test_a_record_names_the_process_while_it_runs(tmp_path: Path) -> None:
    parent = _start_elsewhere(tmp_path, "long", seconds=0.1)
    record = read_record(Layout(tmp_path), "long")
    assert record.state == "running"
    assert Path(f"/proc/{record.pid}").exists() or sys.platform != "linux"
    write_record(Layout(tmp_path), record)
    parent.terminate()
    assert parent.wait(240) == 75


def test_a_step_that_counts_tells_its_launcher_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / PROGRESS).write_text('{"done": 1, "total": 2}')  # of another version, perhaps
    assert progress_text(read_progress(tmp_path)) == "starting"
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / PROGRESS))
    counter = Counter("generate", total=96, done=3)
    counter.display.seconds_per_line = 0.0
    with caplog.at_level("INFO"):
        counter.advance(2)
    [line] = caplog.messages
    assert line.startswith("generate: 5 of 96 images, ")
    assert progress_text(read_progress(tmp_path)) == line
    counter.advance(2)  # at once: whoever watches is told every two seconds
    assert progress_text(read_progress(tmp_path)) == line


def test_of_several_processes_the_first_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / PROGRESS))
    monkeypatch.setenv("RANK", "1")
    Counter("knn", total=96).advance()
    assert progress_text(read_progress(tmp_path)) == "starting"
