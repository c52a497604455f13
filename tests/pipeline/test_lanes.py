"""Who gets which GPU: stand-ins for the parts on a machine whose GPUs are made up."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import benchmark
from engine.config import DeviceConfig
from pipeline.launch.local import LocalLauncher, environment
from pipeline.plan.layout import Layout
from pipeline.plan.machine import Gpu
from pipeline.plan.records import Record, is_done, read_record
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Step, make_plan
from tests.pipeline.programs import standin
from tests.processes import until

Make = Callable[..., Settings]


class OneProcess(Step):
    """A step whose command is one process, however many GPUs it takes."""

    @property
    def command(self) -> list[str]:
        return Step(**{**vars(self), "processes": 1}).command


@pytest.fixture
def machine_with(cards_here: Callable[..., None]) -> Callable[[int], None]:
    """Gives this machine so many GPUs."""
    return lambda gpus: cards_here(*[Gpu("NVIDIA H100 80GB HBM3", 580, (9, 0))] * gpus)


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    folder = tmp_path / "locks"
    folder.mkdir()
    return folder


def plan(settings: Settings, locks: Path, **behaviour: object) -> list[Step]:
    """The plan, of steps that fail where another has their GPU, and say which they have."""
    made = (OneProcess(**vars(step)) for step in make_plan(settings))
    return [standin(step, gpus=locks, **behaviour) for step in made]


def run(steps: list[Step], settings: Settings) -> tuple[int, dict[str, Record]]:
    paths = Layout(settings.data.output_dir)
    launcher = LocalLauncher(paths, overlaps=settings.compute.overlaps, output=io.BytesIO())
    code = benchmark.alternate(steps, launcher, keep_going=True)
    found = {step.name: read_record(paths, step.name) for step in steps}
    return code, {name: record for name, record in found.items() if record is not None}


def at_once(records: dict[str, Record], *names: str) -> int:
    """The most of these steps that ran at the same time."""
    chosen = [records[name] for name in names]
    ends = [r.started + r.seconds for r in chosen]
    return max(
        sum(r.started <= moment < end for r, end in zip(chosen, ends, strict=True))
        for moment in (r.started for r in chosen)
    )


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_scores_take_one_gpu_each_and_use_all_of_them_when_pretraining_is_over(
    settings: Make, machine_with: Callable[[int], None], locks: Path, gpus: int
) -> None:
    machine_with(gpus)
    call = "--pretrain-epochs 2 --eval-freq 1 --eval-seeds 3 --probe-freq 1 --baselines scratch"
    chosen = settings(f"{call} --num-gpus {gpus}")
    steps = plan(chosen, locks, seconds=0.3)
    code, records = run(steps, chosen)
    assert code == 0
    scores = [step.name for step in steps if step.kind in ("probe", "evaluate")]
    rounds = [step.name for step in steps if step.kind == "pretrain"]
    assert len(scores) == 3 * (1 + 3)
    assert at_once(records, *scores) == gpus
    assert {records[name].devices for name in scores} == {1}
    assert {records[name].devices for name in rounds} == {gpus}
    last_round = max(records[name].started + records[name].seconds for name in rounds)
    assert all(records[name].started >= last_round for name in scores)
    assert list(locks.iterdir()) == []


def test_each_gpu_kept_for_evaluation_is_a_lane_beside_pretraining(
    settings: Make, machine_with: Callable[[int], None], locks: Path
) -> None:
    machine_with(8)
    call = "--pretrain-epochs 2 --eval-freq 1 --eval-seeds 2 --num-gpus 8 --eval-gpus 6,7"
    chosen = settings(call)
    steps = plan(chosen, locks, seconds=0.4)
    code, records = run(steps, chosen)
    assert code == 0
    first = ("evaluate_four_channels_1", "evaluate_four_channels_1-evalseed1")
    assert at_once(records, *first, "pretrain_four_channels_2") == 3
    assert records["pretrain_four_channels_2"].devices == 6


def test_a_score_takes_no_gpu_that_pretraining_waits_for(
    settings: Make, machine_with: Callable[[int], None], locks: Path
) -> None:
    machine_with(2)
    call = "--stack --model vit_base --baselines scratch --pretrain-epochs 1 --eval-epochs 1"
    chosen = settings(f"{call} --num-gpus 2")
    fetch, *steps = plan(chosen, locks)
    folder = fetch.folder
    fetch = replace(
        standin(fetch, output_dir=folder, gpus=None, seconds=0.5), outputs=(folder / "result.json",)
    )
    code, records = run([fetch, *steps], chosen)
    assert code == 0
    pretrain, scratch = records["pretrain_four_channels_1"], records["evaluate_scratch_0"]
    assert pretrain.started >= records[fetch.name].started + records[fetch.name].seconds
    assert scratch.started >= pretrain.started + pretrain.seconds


def test_a_score_may_take_several_gpus(
    settings: Make, machine_with: Callable[[int], None], locks: Path
) -> None:
    machine_with(4)
    chosen = settings("--eval scratch --eval-seeds 4 --num-gpus 4 --gpus-per-eval 2")
    steps = plan(chosen, locks, seconds=0.3)
    code, records = run(steps, chosen)
    assert code == 0
    assert at_once(records, *records) == 2
    assert [record.devices for record in records.values()] == [2] * 4
    step = make_plan(chosen)[0]
    assert "--nproc-per-node=2" in step.command
    assert environment(step)["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_one_gpu_alternates(settings: Make, machine_with: Callable[[int], None], locks: Path) -> None:
    machine_with(1)
    chosen = settings("--pretrain-epochs 2 --eval-freq 1 --num-gpus 1")
    code, records = run(plan(chosen, locks), chosen)
    assert code == 0
    assert sorted(records, key=lambda name: records[name].started) == [
        *("pretrain_four_channels_1", "evaluate_four_channels_1"),
        *("pretrain_four_channels_2", "evaluate_four_channels_2"),
    ]


def test_a_step_that_fails_gives_its_gpu_back(
    settings: Make, machine_with: Callable[[int], None], locks: Path
) -> None:
    machine_with(2)
    chosen = settings("--eval scratch --eval-seeds 5 --num-gpus 2")
    steps = plan(chosen, locks, seconds=0.2)
    steps[0] = standin(steps[0], behaviour="fail")
    code, records = run(steps, chosen)
    assert code == 1
    assert [records[step.name].state for step in steps] == ["failed", *["done"] * 4]


def test_a_stop_reaches_all_that_runs_and_the_same_command_goes_on(
    settings: Make, machine_with: Callable[[int], None], locks: Path
) -> None:
    machine_with(4)
    chosen = settings("--eval scratch --eval-seeds 5 --num-gpus 4")
    steps = plan(chosen, locks, seconds=2, stop_after=3)  # all four start before one ends
    paths = Layout(chosen.data.output_dir)

    def stop_when_four_run() -> None:
        until(lambda: len(list(locks.iterdir())) == 4, seconds=60)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_when_four_run)
    stopper.start()
    code, records = run(steps, chosen)
    stopper.join()
    assert code == 75
    assert [record.state for record in records.values()] == ["stopped"] * 4
    assert list(locks.iterdir()) == []
    code, records = run(steps, chosen)
    assert code == 0
    assert [records[step.name].attempts for step in steps] == [2, 2, 2, 2, 1]
    assert all(is_done(step, paths) for step in steps)


def test_names_of_gpus_are_handed_on_as_they_were_given(
    settings: Make, monkeypatch: pytest.MonkeyPatch, locks: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5e2f, MIG-77aa")
    chosen = settings("--eval scratch --eval-seeds 2 --num-gpus 2")
    steps = plan(chosen, locks, seconds=3)
    launcher = LocalLauncher(Layout(chosen.data.output_dir), overlaps=True, output=io.BytesIO())
    for step in steps:
        assert launcher.has_room_for(step)
        launcher.start(step)
    assert not launcher.has_room_for(steps[0])
    until(lambda: len(list(locks.iterdir())) == 2)
    assert {lock.name for lock in locks.iterdir()} == {"GPU-5e2f", "MIG-77aa"}
    launcher.stop(at_once=True)


def test_steps_beside_each_other_share_the_cores(
    settings: Make, machine_with: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(8)
    step = make_plan(settings("--eval scratch --num-gpus 8"))[0]
    for name, value in environment(step).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert DeviceConfig().loader_workers == 64 // 8 - 1


def test_what_is_made_on_other_numbers_of_gpus_is_done(
    settings: Make, machine_with: Callable[[int], None], locks: Path
) -> None:
    machine_with(8)
    chosen = settings("--eval scratch --num-gpus 8 --gpus-per-eval 8")
    assert run(plan(chosen, locks), chosen)[0] == 0
    paths = Layout(chosen.data.output_dir)
    for words in ("--num-gpus 8", "--num-gpus 2", "--num-gpus 0"):
        assert all(is_done(step, paths) for step in make_plan(settings(f"--eval scratch {words}")))


def test_what_steps_beside_each_other_print_is_headed_by_their_names(
    settings: Make, machine_with: Callable[[int], None], locks: Path
) -> None:
    machine_with(2)
    chosen = settings("--eval scratch --eval-seeds 2 --num-gpus 2")
    first, second = plan(chosen, locks)
    output = io.BytesIO()
    launcher = LocalLauncher(Layout(chosen.data.output_dir), overlaps=True, output=output)
    assert benchmark.alternate([first, second], launcher, keep_going=True) == 0
    assert f"==> {first.name} <==\nstarted".encode() in output.getvalue()
    alone = replace(first, name="alone")
    output.truncate(0)
    assert benchmark.alternate([alone], launcher, keep_going=True) == 0
    assert b"==>" not in output.getvalue()
