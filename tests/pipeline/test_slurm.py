"""Jobs on a real Slurm with stand-ins for the parts; tests/test_benchmark.py has the real ones."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.launch import slurm
from pipeline.launch.status import read_status
from pipeline.plan.layout import Layout
from pipeline.plan.machine import REPO_ROOT
from pipeline.plan.records import read_record, write_record, write_run_files
from pipeline.plan.segments import MAKING, with_segments
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from segments.store import PackedStore
from tests.pipeline.programs import standin
from tests.pipeline.slurm_cluster import SlurmCluster, running_slurm
from tests.processes import until

pytestmark = pytest.mark.slow

Make = Callable[..., Settings]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with running_slurm(tmp_path_factory.mktemp("slurm") / "it") as slurm_cluster:
        yield slurm_cluster


def submit(settings: Settings, **behaviour: object) -> tuple[list[Step], Layout]:
    steps = [standin(step, **behaviour) for step in make_plan(settings)]
    paths = Layout(settings.data.output_dir)
    write_run_files(settings, steps, paths)
    assert slurm.submit(settings, steps, paths) == len(steps)
    return steps, paths


def test_a_job_told_that_its_time_is_up_saves_queues_up_again_and_continues(
    settings: Make, cluster: SlurmCluster
) -> None:
    call = "--launcher slurm --pretrain-epochs 8 --sbatch cpus-per-task=1"
    steps, paths = submit(settings(call + " --eval-freq 8"), seconds=0.5)
    job = read_record(paths, steps[0].name).job_id
    log = steps[0].folder / "log.txt"
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 2)
    cluster.query("scancel", "--signal=USR2", job)
    until(lambda: read_record(paths, steps[0].name).state == "stopped")
    assert 2 <= len(log.read_text().splitlines()) < 8
    cluster.start_requeued(job)
    until(lambda: [step.state for step in read_status(paths)] == ["done", "done"])
    assert read_record(paths, steps[0].name).attempts == 2
    assert len(log.read_text().splitlines()) == 8


def test_what_needs_a_failed_job_is_not_run_and_can_be_submitted_again(
    settings: Make, cluster: SlurmCluster
) -> None:
    chosen = settings("--launcher slurm --pretrain-epochs 1 --sbatch cpus-per-task=1")
    paths = submit(chosen, behaviour="fail")[1]
    until(lambda: not cluster.query("squeue", "-h", "-o", "%i").split())
    first, second = read_status(paths)
    assert first.state == "failed"
    assert second.state == "cancelled"
    assert slurm.follow(paths) == 1  # with --wait; it ends
    again = [standin(step) for step in make_plan(chosen)]
    for step in again:  # the same settings, mended
        record = read_record(paths, step.name)
        assert record.state != "done"
    assert slurm.submit(chosen, again, paths) == 2
    until(lambda: [step.state for step in read_status(paths)] == ["done", "done"])


def test_status_shows_jobs_of_which_none_has_started(settings: Make, cluster: SlurmCluster) -> None:
    chosen = settings("--launcher slurm --pretrain-epochs 1 --sbatch begin=now+1hour")
    steps, paths = submit(chosen)
    assert [step.state for step in read_status(paths)] == ["submitted", "submitted"]
    assert "pending" in read_status(paths)[0].detail
    assert slurm.submit(chosen, steps, paths) == 0
    cluster.query("scancel", *(read_record(paths, step.name).job_id for step in steps))
    until(lambda: [step.state for step in read_status(paths)] == ["cancelled", "cancelled"])
    assert slurm.submit(chosen, steps, paths) == 2
    cluster.query("scancel", *(read_record(paths, step.name).job_id for step in steps))


def test_several_processes_have_a_core_each(settings: Make, cluster: SlurmCluster) -> None:
    chosen = settings("--launcher slurm --pretrain-epochs 1 --num-processes 2 --eval 0")
    steps, paths = submit(chosen, seconds=1)
    job = read_record(paths, steps[0].name).job_id
    until(lambda: read_record(paths, steps[0].name).state == "running")
    assert "CPUs=2" in cluster.query("scontrol", "show", "step", f"{job}.0")
    until(lambda: read_status(paths)[0].state == "done")


def test_a_job_that_was_replaced_leaves_the_step_alone(settings: Make, cluster: SlurmCluster) -> None:
    chosen = settings("--launcher slurm --pretrain-epochs 1 --sbatch begin=now+1hour")
    steps, paths = submit(chosen)
    record = read_record(paths, steps[0].name)
    write_record(paths, replace(record, job_id="99999"))
    cluster.query("scontrol", "update", f"JobId={record.job_id}", "StartTime=now")
    log = paths.slurm / f"{record.job_id}_0_log.out"
    until(lambda: log.exists() and "does nothing" in log.read_text())
    assert not steps[0].folder.exists()
    until(lambda: read_status(paths)[1].state == "cancelled")  # what it was needed for


def test_output_of_the_step_is_in_its_console_log(settings: Make, cluster: SlurmCluster) -> None:
    steps, paths = submit(settings("--launcher slurm --pretrain-epochs 1 --sbatch cpus-per-task=1"))
    until(lambda: read_record(paths, steps[0].name).state == "done")
    assert "started" in Path(steps[0].console_log).read_text()


def test_a_shard_killed_on_the_way_is_gone_on_with_and_the_parts_make_the_whole(
    settings: Make, cluster: SlurmCluster, data: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for number in range(18):
        path = data / "in1k" / ("val" if number % 6 == 0 else "train") / f"disc/noise_{number}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(rng.integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(path)
    shutil.rmtree(data / "in1k/masks")
    words = "--launcher slurm --pretrain-epochs 1 --make-segments felzenszwalb --segment-shards 3"
    chosen = settings(words + " --mask-method patches,segments --sbatch cpus-per-task=1")
    paths, store = Layout(chosen.data.output_dir), data / "in1k/masks/masks.sqlite"
    steps = [
        step if step.kind in MAKING else standin(step) for step in with_segments(make_plan(chosen), chosen)
    ]
    whole = with_segments(steps[4:], settings("--make-segments felzenszwalb"))[0]
    write_run_files(chosen, steps, paths)
    assert slurm.submit(chosen, steps, paths) == len(steps) == 8
    victim, merge = steps[1], steps[3]
    log = victim.console_log
    until(lambda: log.exists() and "segments of" in log.read_text())
    os.kill(read_record(paths, victim.name).pid, signal.SIGKILL)
    until(lambda: not cluster.query("squeue", "-h", "-o", "%i").split(), seconds=120)
    states = {step.name: step.state for step in read_status(paths)}
    assert states.pop(victim.name) == "failed"
    assert not victim.outputs[0].exists()
    cancelled = (merge.name, "pretrain_segments_1", "evaluate_segments_1")
    assert states == {name: "cancelled" if name in cancelled else "done" for name in states}
    assert slurm.submit(chosen, steps, paths) == 4
    until(lambda: {step.state for step in read_status(paths)} == {"done"}, seconds=120)
    assert read_record(paths, victim.name).attempts == 2

    command = [word.replace(str(store), str(tmp_path / "one.sqlite")) for word in whole.command]
    subprocess.run(command, cwd=REPO_ROOT, check=True, capture_output=True)
    merged, one = (PackedStore(path) for path in (store, tmp_path / "one.sqlite"))
    keys = merged.images() | merged.listed_empty()
    assert keys == one.images() | one.listed_empty()
    assert len([key for key in keys if key.startswith("val/disc/")]) == 3
    assert all(merged.segments(key) == one.segments(key) for key in keys)
    assert len(merged.images()) >= 18
