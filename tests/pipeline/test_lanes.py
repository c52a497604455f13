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
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from tests.pipeline.programs import standin
from tests.processes import until

pytestmark = pytest.mark.slow

Make = Callable[..., Settings]


class OneProcess(Step):
    """A step whose command is one process, however many GPUs it takes."""

    @property
    def command(self) -> list[str]:
        return Step(**{**vars(self), "processes": 1}).command


class Plan:
    """Of steps that fail where another has their GPU, and say in `locks` which they have."""

    def __init__(self, settings: Settings, locks: Path) -> None:
        self.settings, self.locks = settings, locks
        self.paths = Layout(settings.data.output_dir)
        self.steps: list[Step] = [OneProcess(**vars(step)) for step in make_plan(settings)]
        self.behave(self.steps)

    def behave(self, steps: list[Step], **behaviour: object) -> None:
        for step in steps:
            changed = standin(step, gpus=self.locks, **behaviour)
            self.steps[self.steps.index(step)] = changed

    def wait_for(self, last: Step, steps: list[Step]) -> None:
        """None of these ends before that one has begun."""
        self.behave(steps, until=self.paths.record(last.name))

    def launcher(self, output: io.BytesIO | None = None) -> LocalLauncher:
        overlaps = self.settings.compute.overlaps
        return LocalLauncher(self.paths, overlaps=overlaps, output=output or io.BytesIO())

    def run(self) -> tuple[int, dict[str, Record]]:
        code = benchmark.alternate(self.steps, self.launcher(), keep_going=True)
        found = {step.name: read_record(self.paths, step.name) for step in self.steps}
        return code, {name: record for name, record in found.items() if record is not None}


@pytest.fixture
def plan(settings: Make, cards_here: Callable[..., None], tmp_path: Path) -> Callable[..., Plan]:
    """The plan of a call on a machine with so many GPUs."""

    def make(gpus: int, words: str) -> Plan:
        cards_here(*[Gpu("NVIDIA H100 80GB HBM3", 580, (9, 0))] * gpus)
        locks = tmp_path / "locks"
        locks.mkdir()
        return Plan(settings(f"{words} --num-gpus {gpus}"), locks)

    return make


MakePlan = Callable[[int, str], Plan]


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
    plan: MakePlan, gpus: int
) -> None:
    call = "--pretrain-epochs 2 --eval-freq 1 --eval-seeds 3 --probe-freq 1 --baselines scratch"
    made = plan(gpus, call)
    scores = [step for step in made.steps if step.kind in ("probe", "evaluate")]
    made.wait_for(scores[gpus - 1], scores)
    code, records = made.run()
    assert code == 0
    rounds = [record for record in records.values() if record.kind == "pretrain"]
    assert len(scores) == 3 * (1 + 3)
    assert at_once(records, *(step.name for step in scores)) == gpus
    assert {records[step.name].devices for step in scores} == {1}
    assert {record.devices for record in rounds} == {gpus}
    last_round = max(record.started + record.seconds for record in rounds)
    assert all(records[step.name].started >= last_round for step in scores)
    assert list(made.locks.iterdir()) == []


def test_each_gpu_kept_for_evaluation_is_a_lane_beside_pretraining(plan: MakePlan) -> None:
    made = plan(8, "--pretrain-epochs 2 --eval-freq 1 --eval-seeds 2 --eval-gpus 6,7")
    *first, second_round = made.steps[1:4]
    made.wait_for(second_round, first)
    code, records = made.run()
    assert code == 0
    names = ("evaluate_four_channels_1", "evaluate_four_channels_1-evalseed1")
    assert at_once(records, *names, "pretrain_four_channels_2") == 3
    assert records["pretrain_four_channels_2"].devices == 6


def test_a_score_takes_no_gpu_that_pretraining_waits_for(plan: MakePlan) -> None:
    call = "--stack --model vit_base --baselines scratch --pretrain-epochs 1 --eval-epochs 1"
    made = plan(2, call)
    folder = made.steps[0].folder
    fetch = standin(made.steps[0], output_dir=folder, seconds=0.5)
    made.steps[0] = replace(fetch, outputs=(folder / "result.json",))
    code, records = made.run()
    assert code == 0
    pretrain, scratch = records["pretrain_four_channels_1"], records["evaluate_scratch_0"]
    assert pretrain.started >= records[fetch.name].started + records[fetch.name].seconds
    assert scratch.started >= pretrain.started + pretrain.seconds


def test_a_score_may_take_several_gpus(plan: MakePlan) -> None:
    made = plan(4, "--eval scratch --eval-seeds 4 --gpus-per-eval 2")
    made.wait_for(made.steps[1], made.steps)
    code, records = made.run()
    assert code == 0
    assert at_once(records, *records) == 2
    assert [record.devices for record in records.values()] == [2] * 4
    step = make_plan(made.settings)[0]
    assert "--nproc-per-node=2" in step.command
    assert environment(step)["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_one_gpu_alternates(plan: MakePlan) -> None:
    code, records = plan(1, "--pretrain-epochs 2 --eval-freq 1").run()
    assert code == 0
    assert sorted(records, key=lambda name: records[name].started) == [
        *("pretrain_four_channels_1", "evaluate_four_channels_1"),
        *("pretrain_four_channels_2", "evaluate_four_channels_2"),
    ]


def test_a_step_that_fails_gives_its_gpu_back(plan: MakePlan) -> None:
    made = plan(2, "--eval scratch --eval-seeds 5")
    made.behave(made.steps[:1], behaviour="fail")
    code, records = made.run()
    assert code == 1
    assert [records[step.name].state for step in made.steps] == ["failed", *["done"] * 4]


def test_a_stop_reaches_all_that_runs_and_the_same_command_goes_on(plan: MakePlan) -> None:
    made = plan(4, "--eval scratch --eval-seeds 5")
    made.behave(made.steps, seconds=60, stop_after=3)

    def stop_when_four_run() -> None:
        until(lambda: len(list(made.locks.iterdir())) == 4, seconds=60)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_when_four_run)
    stopper.start()
    code, records = made.run()
    stopper.join()
    assert code == 75
    assert [record.state for record in records.values()] == ["stopped"] * 4
    assert list(made.locks.iterdir()) == []
    made.behave(made.steps, stop_after=3)
    code, records = made.run()
    assert code == 0
    assert [records[step.name].attempts for step in made.steps] == [2, 2, 2, 2, 1]
    assert all(is_done(step, made.paths) for step in made.steps)


def test_names_of_gpus_are_handed_on_as_they_were_given(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(2, "--eval scratch --eval-seeds 2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5e2f, MIG-77aa")
    made.behave(made.steps, seconds=60)
    launcher = made.launcher()
    for step in made.steps:
        assert launcher.has_room_for(step)
        launcher.start(step)
    assert not launcher.has_room_for(made.steps[0])
    until(lambda: len(list(made.locks.iterdir())) == 2)
    assert {lock.name for lock in made.locks.iterdir()} == {"GPU-5e2f", "MIG-77aa"}
    launcher.stop(at_once=True)


def test_steps_beside_each_other_share_the_cores(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = plan(8, "--eval scratch").steps
    for name, value in environment(step).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert DeviceConfig().loader_workers == 64 // 8 - 1


def test_what_is_made_on_other_numbers_of_gpus_is_done(plan: MakePlan, settings: Make) -> None:
    made = plan(8, "--eval scratch --gpus-per-eval 8")
    assert made.run()[0] == 0
    for words in ("--num-gpus 8", "--num-gpus 2", "--num-gpus 0"):
        steps = make_plan(settings(f"--eval scratch {words}"))
        assert all(is_done(step, made.paths) for step in steps)


def test_what_steps_beside_each_other_print_is_headed_by_their_names(plan: MakePlan) -> None:
    made, output = plan(2, "--eval scratch --eval-seeds 2"), io.BytesIO()
    launcher = made.launcher(output)
    assert benchmark.alternate(made.steps, launcher, keep_going=True) == 0
    assert f"==> {made.steps[0].name} <==\nstarted".encode() in output.getvalue()
    alone = replace(made.steps[0], name="alone")
    output.truncate(0)
    assert benchmark.alternate([alone], launcher, keep_going=True) == 0
    assert b"==>" not in output.getvalue()
