from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.progress import duration, progress_text
from common.step_files import PROGRESS
from pipeline.launch import status
from pipeline.launch.local import MARK, LocalLauncher, marked, shortage
from pipeline.launch.slurm import follow
from pipeline.launch.status import read_status, status_text
from pipeline.launch.time_left import time_left_text
from pipeline.plan import machine
from pipeline.plan.layout import Layout
from pipeline.plan.records import (
    Record,
    differences,
    read_plan,
    read_progress,
    read_record,
    write_record,
    write_run_files,
)
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from segmenter.check import ScoringFacts
from tests.pipeline.programs import fake_program, run_benchmark

Make = Callable[..., Settings]


@pytest.fixture
def started(settings: Make) -> Layout:
    """A plan of two rounds, of which nothing has run yet."""
    chosen = settings("--pretrain-epochs 2 --eval-freq 1")
    paths = Layout(chosen.data.output_dir)
    write_run_files(chosen, make_plan(chosen), paths)
    return paths


def record(paths: Layout, name: str, state: str, **more: object) -> None:
    empty = Record(name=name, state="running", run="x", kind="pretrain", fingerprint={})
    import socket

    host = socket.gethostname()
    write_record(paths, replace(empty, **{"state": state, "host": host, **more}))


def made(step: Step, paths: Layout, state: str = "done") -> None:
    """The step's record and folder."""
    record(paths, step.name, state, run=step.run, kind=step.kind, fingerprint=step.settings)
    step.folder.mkdir(parents=True, exist_ok=True)


def all_made(chosen: Settings) -> Layout:
    """Every step's record and folder."""
    paths = Layout(chosen.data.output_dir)
    for step in make_plan(chosen):
        made(step, paths)
    return paths


def states(paths: Layout) -> list[str]:
    return [step.state for step in read_status(paths)]


def test_a_run_that_has_not_begun_waits(started: Layout) -> None:
    assert states(started) == ["waiting"] * 4


def test_each_state_is_shown(started: Layout) -> None:
    record(started, "pretrain_four_channels_1", "done", seconds=100.0)
    record(started, "evaluate_four_channels_1", "failed", exit_code=3)
    record(started, "pretrain_four_channels_2", "running", host="elsewhere")
    assert states(started) == ["done", "failed", "running", "waiting"]
    details = [step.detail for step in read_status(started)]
    assert details[0] == "took 1 min 40 s"
    assert "exit code 3" in details[1]
    assert "console.log" in details[1]


def test_a_step_whose_processes_are_gone_was_interrupted(started: Layout) -> None:
    record(started, "pretrain_four_channels_1", "running")
    assert states(started)[0] == "interrupted"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_running_step_shows_epoch_rate_and_time_left(started: Layout) -> None:
    name = "pretrain_four_channels_1"
    record(started, name, "running")
    folder = started.pretrain_output / "four_channels"
    folder.mkdir(parents=True)
    now = {"epoch": 0.5, "epochs_total": 1, "images_per_second": 210.4, "seconds_left": 754}
    (folder / PROGRESS).write_text(json.dumps(now))
    process = subprocess.Popen(["sleep", "60"], env={MARK: f"{started.root}:{name}"})
    try:
        while not marked(f"{started.root}:{name}"):  # Linux shows it a moment after the start
            assert process.poll() is None
        step = read_status(started)[0]
    finally:
        process.kill()
        process.wait()
    assert (step.state, step.detail) == ("running", "epoch 0.50 of 1, 210.4 images/s, 13 min left")


def record_job(paths: Layout, name: str, job: str, state: str, **more: object) -> None:
    record(paths, name, state, job_id=job, host="node7", **more)
    paths.slurm.mkdir(parents=True, exist_ok=True)
    (paths.slurm / f"{job}_submitted.pkl").touch()


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what squeue does."""
    monkeypatch.setenv("PATH", str(tmp_path / "programs"), prepend=os.pathsep)
    monkeypatch.setattr(status, "_RETRY_SECONDS", 0.0)
    return lambda script: fake_program(tmp_path / "programs", "squeue", script)


@pytest.mark.parametrize(
    ("recorded", "in_queue", "shown"),
    [
        ("submitted", "PENDING", "submitted"),
        ("submitted", "RUNNING", "submitted"),  # it has just begun
        ("submitted", "CANCELLED", "cancelled"),
        ("submitted", "TIMEOUT", "cancelled"),
        ("submitted", "", "cancelled"),
        ("running", "RUNNING", "running"),
        ("running", "COMPLETING", "running"),
        ("running", "PENDING", "submitted"),
        ("running", "FAILED", "interrupted"),
        ("running", "", "interrupted"),
        ("stopped", "COMPLETING", "submitted"),  # about to be queued up again
        ("stopped", "CANCELLED", "stopped"),
        ("failed", "COMPLETING", "failed"),
        ("done", "", "done"),
    ],
)
def test_a_jobs_state_is_that_of_its_record_and_the_queue(
    started: Layout, squeue: Callable[[str], None], recorded: str, in_queue: str, shown: str
) -> None:
    squeue(f"echo '7 {in_queue}'" if in_queue else "")
    record_job(started, "pretrain_four_channels_1", "7", recorded)
    step = read_status(started)[0]
    assert step.state == shown
    if shown == "cancelled":
        assert step.detail == "the same command submits it again, job 7"


def test_a_job_that_ends_while_the_queue_is_asked_is_done(
    started: Layout, squeue: Callable[[str], None]
) -> None:
    name = "pretrain_four_channels_1"
    record_job(started, name, "7", "done")
    done = started.record(name).read_text()
    record_job(started, name, "7", "running")
    (started.root / "done.json").write_text(done)
    squeue(f"cp {started.root / 'done.json'} {started.record(name)}")
    assert states(started)[0] == "done"


@pytest.mark.parametrize("script", ["echo 'Socket timed out' >&2; exit 1", None])
def test_without_an_answer_of_the_queue_the_records_are_shown(
    started: Layout,
    squeue: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    script: str | None,
) -> None:
    if script is None:
        monkeypatch.setenv("PATH", str(started.root))
    else:
        squeue(script)
    record_job(started, "pretrain_four_channels_1", "7", "running")
    record_job(started, "evaluate_four_channels_1", "8", "submitted")
    assert states(started)[:2] == ["running", "submitted"]
    assert all("queue cannot be asked" in step.detail for step in read_status(started)[:2])


def test_an_allocation_around_a_local_run_says_nothing_about_it(
    started: Layout, squeue: Callable[[str], None]
) -> None:
    squeue("echo '7 RUNNING'")
    record(started, "pretrain_four_channels_1", "stopped", job_id="7")
    assert states(started)[0] == "stopped"
    record(started, "pretrain_four_channels_1", "running", job_id="7")
    assert states(started)[0] == "interrupted"


def test_following_ends_when_the_jobs_were_cancelled(
    started: Layout, squeue: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    squeue("echo '7 CANCELLED'")
    for step in read_plan(started):
        record_job(started, step["name"], "7", "submitted")
    assert follow(started) == 1
    assert capsys.readouterr().out.count("cancelled") == 4


def test_the_status_command_works_while_another_run_holds_the_lock(started: Layout) -> None:
    started.lock.write_text("{}")
    shown = run_benchmark("status", started.root)
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[0] == "4 steps: 4 waiting"


def test_status_begins_with_the_summary_and_counts_what_is_done(started: Layout) -> None:
    record(started, "pretrain_four_channels_1", "done", seconds=600.0)
    record(started, "evaluate_four_channels_1", "failed", exit_code=3)
    first, _, *rows = status_text(started).splitlines()
    # The second round is as long as the first; a finetuning has told nothing yet.
    assert first == "4 steps: 2 waiting, 1 done, 1 failed; more than 10 min left"
    assert [row.split()[1] for row in rows] == [
        "evaluate_four_channels_1", "pretrain_four_channels_2", "evaluate_four_channels_2",
    ]  # fmt: skip
    record(started, "evaluate_four_channels_1", "done", seconds=300.0)
    assert status_text(started).splitlines()[0] == "4 steps: 2 done, 2 waiting; about 15 min left"
    for name in ("pretrain_four_channels_2", "evaluate_four_channels_2"):
        record(started, name, "done")
    assert status_text(started) == "4 steps: 4 done"


def test_the_time_left_of_a_running_round_is_its_share_of_the_pretraining(started: Layout) -> None:
    folder = started.pretrain_output / "four_channels"
    folder.mkdir(parents=True)
    now = {"epoch": 0.5, "epochs_total": 2, "seconds_left": 1800.0}  # 20 minutes an epoch
    (folder / PROGRESS).write_text(json.dumps(now))
    record(started, "pretrain_four_channels_1", "running", host="elsewhere")
    # Half of this round and the next one; of two finetunings nothing is known.
    assert time_left_text(started, ["pretrain_four_channels_1"]) == "more than 30 min left"


def test_scoring_is_told_from_training(tmp_path: Path) -> None:
    (tmp_path / PROGRESS).write_text(json.dumps({"epoch": 2.0, "stage": "evaluate"}))
    assert progress_text(read_progress(tmp_path)) == "scoring after epoch 2.0"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (48, "48 s"),
        (125, "2 min 5 s"),
        (754, "13 min"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_other_settings_are_named_with_both_values(settings: Make) -> None:
    before, now = settings("--pretrain-epochs 2 --seed 0"), settings("--pretrain-epochs 3 --seed 1")
    paths = all_made(before)
    assert differences(make_plan(before), paths) == []
    assert differences(make_plan(now), paths) == ["four_channels-seed1: epochs: 2 -> 3 (of four_channels)"]


def test_methods_of_one_directory_have_to_be_made_alike(settings: Make) -> None:
    first = settings("--pretrain-epochs 2 --pretrain base_lr=0.1 --finetune epochs=3")
    paths = all_made(first)
    other = "--mask-method patches --pretrain-epochs 2 --pretrain base_lr=0.1"
    assert differences(make_plan(settings(f"{other} --finetune epochs=3")), paths) == []
    assert differences(make_plan(settings(f"{other} --finetune epochs=4")), paths) == [
        "patches: epochs: 3 -> 4 (of four_channels)"
    ]
    assert differences(make_plan(settings("--mask-method patches --pretrain-epochs 2")), paths) == [
        "patches: base_lr: 0.1 -> 0.00015 (of four_channels)",
        "patches: epochs: 3 -> 64 (of four_channels)",
    ]


def test_what_came_to_nothing_or_was_removed_binds_nobody(settings: Make) -> None:
    first = settings("--pretrain-epochs 1 --finetune epochs=3")
    paths = Layout(first.data.output_dir)
    pretrain, evaluate = make_plan(first)
    made(pretrain, paths)
    made(evaluate, paths, state="failed")
    clipped = make_plan(settings("--pretrain-epochs 1 --finetune epochs=3 --finetune clip_grad=1"))
    assert differences(clipped, paths) == []
    made(evaluate, paths)
    assert differences(clipped, paths) == ["four_channels: clip_grad: None -> 1.0"]
    shutil.rmtree(paths.eval_output)
    assert differences(clipped, paths) == []


def test_a_removed_pretraining_binds_while_its_scores_are_there(settings: Make) -> None:
    first = settings("--pretrain-epochs 1 --pretrain base_lr=0.1")
    paths = all_made(first)
    other = make_plan(settings("--pretrain-epochs 1 --pretrain base_lr=0.9"))
    shutil.rmtree(paths.pretrain_output)
    assert differences(other, paths) == ["four_channels: base_lr: 0.1 -> 0.9"]
    shutil.rmtree(paths.eval_output)
    assert differences(other, paths) == []


def test_smaller_device_batches_are_no_other_settings(settings: Make) -> None:
    first = settings("--pretrain-epochs 1")
    paths = all_made(first)
    words = "--pretrain-epochs 1 --finetune device_batch_size=2 --finetune eval_batch_size=1"
    steps = make_plan(settings(f"{words} --pretrain batch_size=8"))
    assert differences(steps, paths) == []


def test_a_run_that_is_there_is_gone_on_with_when_seeds_or_ratios_are_added(settings: Make) -> None:
    call = "--pretrain-epochs 1 --eval-epochs 0,1 --baselines scratch"
    paths = all_made(settings(call))
    more = settings(f"{call} --seed 0,1 --coverage-ratio 15,30")
    assert differences(make_plan(more), paths) == []
    runs = {step.run for step in make_plan(more)}
    assert runs == {
        "scratch", "scratch-seed1", "four_channels", "four_channels-seed1",
        "four_channels-cov30", "four_channels-cov30-seed1",
    }  # fmt: skip


def test_what_an_earlier_version_recorded_of_it_counts(settings: Make) -> None:
    """It wrote what was given, as text; the rest is the recipe's and the options'."""
    call = "--pretrain-epochs 1 --eval-epochs 1 --baselines scratch --recipe fast --finetune lr="
    chosen, later = settings(f"{call}0.1"), settings(f"{call}0.2")
    paths = Layout(chosen.data.output_dir)
    known = {"mask_method", "coverage_ratio", "seed", "model", "in1k_dir", "epochs", "lr", "init"}
    for step in make_plan(chosen):
        given = {n: str(v) for n, v in step.settings.items() if n in {*known, "recipe", "dataset"}}
        made(replace(step, settings=given), paths)
    assert differences(make_plan(chosen), paths) == []
    assert differences(make_plan(later), paths) == [
        "scratch: lr: 0.1 -> 0.2", "four_channels: lr: 0.1 -> 0.2",
    ]  # fmt: skip


def test_a_name_stands_for_one_ratio(settings: Make) -> None:
    chosen = settings("--pretrain-epochs 1")
    paths = Layout(chosen.data.output_dir)
    step = make_plan(chosen)[0]
    made(replace(step, settings={**step.settings, "coverage_ratio": 25.0}), paths)
    assert differences([step], paths) == ["four_channels: coverage_ratio: 25.0 -> 15.0"]


def test_finetuning_seeds_added_later_disturb_no_pretraining(settings: Make) -> None:
    first = settings("--pretrain-epochs 1 --eval-epochs 0,1")
    paths = Layout(first.data.output_dir)
    more = settings("--pretrain-epochs 1 --eval-epochs 0,1 --eval-seeds 2 --seed 0,1")
    for step in make_plan(more):
        made(step, paths)
    assert differences(make_plan(first), paths) == []


def test_more_evaluation_points_are_no_other_settings(settings: Make) -> None:
    before = settings("--pretrain-epochs 4 --eval-freq 4")
    paths = Layout(before.data.output_dir)
    step = make_plan(before)[0]
    made(step, paths)
    assert differences(make_plan(settings("--pretrain-epochs 4 --eval-freq 2")), paths) == []


def test_a_nearly_full_disk_stops_a_step_before_it_starts(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings("--pretrain-epochs 1 --model vit_huge")
    step = replace(make_plan(chosen)[0], facts=ScoringFacts(train=1, val=1, checkpoint_bytes=8 * 10**9))
    paths = Layout(chosen.data.output_dir)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 10**9)
    refused = LocalLauncher(paths, overlaps=False).start(step)
    assert refused.state == "failed"
    assert "make room" in refused.message
    assert read_record(paths, step.name) is None


def test_a_step_needs_room_for_the_checkpoint_it_has_and_its_successors(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = replace(
        make_plan(settings("--pretrain-epochs 1"))[0],
        facts=ScoringFacts(train=1, val=1, checkpoint_bytes=10**9),
    )
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 3 * 10**9)
    assert "needs about" in shortage(step)
    step.folder.mkdir(parents=True)
    (step.folder / "last.pth").write_bytes(b"x" * 1000)
    assert shortage(step) == ""
