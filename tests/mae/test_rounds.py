"""Rounds, kills, restarts, accumulation and processes change nothing."""

import math
import os
import shutil
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from common.interruption import Interruption
from common.step_files import find_resumable
from engine import devices
from mae.pretrain import pretrain
from tests.mae.conftest import assert_same_weights, make_config, read_epochs

pytestmark = pytest.mark.slow

SPLIT = {"batch_size": 2}  # 4 forward passes per step on one process, 2 on each of two


@pytest.fixture(scope="module")
def whole(in1k_dir, tmp_path_factory, processes):
    """One uninterrupted run: 4 epochs of 3 steps, accumulating."""
    output_dir = tmp_path_factory.mktemp("whole")
    assert processes.run(make_config(in1k_dir, output_dir, **SPLIT)) == [0]
    return output_dir


@pytest.fixture(scope="module")
def whole_on_two(in1k_dir, tmp_path_factory, processes):
    """The same on two processes."""
    output_dir = tmp_path_factory.mktemp("whole_on_two")
    assert processes.run(make_config(in1k_dir, output_dir, **SPLIT), processes=2) == [0, 0]
    return output_dir


def test_a_run_leaves_log_checkpoint_pictures_and_progress(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "log.txt", "checkpoint-4.pth", "last.pth", "reconstructions-4.png", "progress.json",
        "tensorboard", ".lock", ".trackers.json",
    }  # fmt: skip
    epochs = read_epochs(whole)
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4]
    assert epochs[-1]["val_loss"] < epochs[0]["val_loss"]  # always hidden in the same way
    assert all(record["val_loss"] > 0 for record in epochs)
    assert all(5 < record["coverage_percent_mean"] < 30 for record in epochs)
    checkpoint = torch.load(whole / "checkpoint-4.pth", weights_only=True)
    assert checkpoint["epochs_completed"] == 4
    assert checkpoint["config"]["mask_method"] == "four_channels"
    assert checkpoint["model"]["patch_embed.proj.weight"].shape == (24, 4, 16, 16)


def test_rounds_give_the_weights_and_log_of_one_run(whole, in1k_dir, tmp_path, processes):
    for epochs in (0, 1, 3, 4):
        config = make_config(in1k_dir, tmp_path, stop_after=epochs, **SPLIT)
        assert processes.run(config) == [0]
        assert (tmp_path / f"checkpoint-{epochs}.pth").is_file()
    assert read_epochs(tmp_path) == read_epochs(whole)
    assert_same_weights(tmp_path / "checkpoint-4.pth", whole / "checkpoint-4.pth")
    assert processes.run(config) == [0]  # a finished round has nothing to do
    assert read_epochs(tmp_path) == read_epochs(whole)


def test_a_run_that_ends_within_an_epoch_has_its_whole_schedule_and_is_the_same_after_a_stop(
    in1k_dir, tmp_path, processes
):
    """Two epochs, of 3 steps and 2: what a budget of 1.67 epochs is."""
    short = {"epochs": 2, "last_epoch": 0.6, "warmup_fraction": 0.0, **SPLIT}
    config = make_config(in1k_dir, tmp_path / "whole", **short)
    assert pretrain(config)
    first, last = read_epochs(tmp_path / "whole")
    assert last["train_flops"] == first["train_flops"] * (1 + 2 / 3)
    peak = config.optimisation.learning_rate
    assert first["train_lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 2 / 5)))
    assert last["train_lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 4 / 5)))
    stopped = make_config(in1k_dir, tmp_path / "stopped", **short)
    # It comes with the last step of the first epoch, and is seen with the next: one is left.
    assert processes.run(stopped, sabotage=partial(_signal_before_step, 3, signal.SIGTERM, (0,))) == [75]
    assert processes.run(stopped) == [0]
    assert read_epochs(tmp_path / "stopped") == [first, last]
    assert_same_weights(*(tmp_path / name / "checkpoint-2.pth" for name in ("whole", "stopped")))


def test_the_model_as_it_starts_is_saved_whenever_it_is_asked_for(whole, in1k_dir, tmp_path, processes):
    early, late = tmp_path / "early", tmp_path / "late"
    shutil.copytree(whole, late)
    before = content_of(late)
    for folder in (early, late):
        assert processes.run(make_config(in1k_dir, folder, stop_after=0, **SPLIT)) == [0]
    found = {path.name for path in early.iterdir()}
    assert found == {"checkpoint-0.pth", "reconstructions-0.png", ".lock"}
    left = content_of(late)
    assert left.keys() - before.keys() == {"checkpoint-0.pth", "reconstructions-0.png"}
    assert before.items() <= left.items()  # log, checkpoints and progress of the run stay
    assert_same_weights(early / "checkpoint-0.pth", late / "checkpoint-0.pth")
    checkpoint = torch.load(early / "checkpoint-0.pth", weights_only=True)
    assert (checkpoint["epochs_completed"], checkpoint["steps_completed"]) == (0, 0)
    seen = (late / "checkpoint-0.pth").stat().st_mtime_ns
    assert processes.run(make_config(in1k_dir, late, stop_after=0, **SPLIT)) == [0]
    assert (late / "checkpoint-0.pth").stat().st_mtime_ns == seen, "it is there already"


def content_of(folder):
    files = (path for path in folder.iterdir() if path.is_file() and path.name != ".lock")
    return {path.name: path.read_bytes() for path in files}


def test_what_another_call_saved_before_it_let_go_is_not_trained_again(
    whole, in1k_dir, tmp_path, monkeypatch
):
    """Whoever waits for the folder reads the checkpoint when it has it, not before."""
    out, hold = tmp_path / "run", devices.hold
    assert pretrain(make_config(in1k_dir, out, stop_after=1, **SPLIT))

    @contextmanager
    def let_in_after_the_other(path, folder):
        with hold(path, folder):
            shutil.copytree(whole, out, dirs_exist_ok=True)
            yield

    monkeypatch.setattr(devices, "hold", let_in_after_the_other)
    assert pretrain(make_config(in1k_dir, out, **SPLIT))
    assert (out / "last.pth").read_bytes() == (whole / "last.pth").read_bytes()
    assert read_epochs(out) == read_epochs(whole)


def test_a_kill_before_the_picture_of_a_round_costs_the_picture_only(whole, in1k_dir, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    picture = out / "reconstructions-4.png"
    picture.unlink()
    assert pretrain(make_config(in1k_dir, out, **SPLIT))
    assert picture.read_bytes() == (whole / picture.name).read_bytes()
    assert read_epochs(out) == read_epochs(whole)


def _kill_in_second_save(rank):
    """SIGKILL when the file beside is written, but not renamed."""
    calls = []
    fsync = os.fsync

    def kill(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.endswith(".pth.segmae-part"):
            calls.append(descriptor)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = kill


def _write_at_once():
    """The run waits for each save, so that what a kill leaves is known."""
    from engine.checkpoint import Saver

    save = Saver.save

    def save_and_wait(self, *arguments, **named):
        save(self, *arguments, **named)
        self.running.result()

    Saver.save = save_and_wait


def _kill_after_the_log_line(rank):
    """SIGKILL when epoch 3 is in the log, but not in a checkpoint."""
    from engine import logbook

    _write_at_once()
    add_epoch = logbook.Logbook.add_epoch

    def add_and_kill(self, record):
        add_epoch(self, record)
        if record["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    logbook.Logbook.add_epoch = add_and_kill


def _signal_before_step(number, signal_number, ranks, rank):
    """The process gets it inside an epoch: they have three steps."""
    from engine import update

    _write_at_once()
    step, calls = update.GuardedUpdate.step, []

    def count_and_send(self, *arguments):
        calls.append(1)
        if len(calls) == number and rank in ranks:
            os.kill(os.getpid(), signal_number)
        step(self, *arguments)

    update.GuardedUpdate.step = count_and_send


_kill_before_step_11 = partial(_signal_before_step, 11, signal.SIGKILL, (0,))


def _save_after_every_step(rank):
    from engine import checkpoint

    checkpoint.time = type("Clock", (), {"monotonic": staticmethod(_Hours())})


class _Hours:
    """A clock on which every look is an hour later."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 3600
        return self.now


def _save_after_every_step_and_kill_before_step_5(rank):
    _save_after_every_step(rank)
    _signal_before_step(5, signal.SIGKILL, (0,), rank)


@pytest.mark.parametrize(
    ("sabotage", "minutes", "epochs_completed", "steps_completed"),
    [
        (_kill_in_second_save, None, 1, 0),
        (_kill_after_the_log_line, None, 2, 0),
        (_kill_before_step_11, None, 3, 0),
        (_save_after_every_step_and_kill_before_step_5, 1.0, 1, 1),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    whole, in1k_dir, tmp_path, processes, sabotage, minutes, epochs_completed, steps_completed
):
    config = make_config(in1k_dir, tmp_path, save_every_minutes=minutes, **SPLIT)
    assert processes.run(config, sabotage=sabotage) == [-signal.SIGKILL]
    kept = torch.load(find_resumable(tmp_path), weights_only=True)
    assert (kept["epochs_completed"], kept["steps_completed"]) == (
        epochs_completed,
        steps_completed,
    )
    assert processes.run(config) == [0]
    assert read_epochs(tmp_path) == read_epochs(whole)
    assert_same_weights(tmp_path / "checkpoint-4.pth", whole / "checkpoint-4.pth")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_signals_only_leave_a_note(number):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested
    assert signal.getsignal(number) == before


def test_a_signal_saves_the_step_and_exits_with_75(whole, in1k_dir, tmp_path, processes):
    config = make_config(in1k_dir, tmp_path, **SPLIT)
    sabotage = partial(_signal_before_step, 5, signal.SIGTERM, (0,))
    assert processes.run(config, sabotage=sabotage) == [75]
    assert '"state": "stopped"' in (tmp_path / "progress.json").read_text()
    assert processes.run(config) == [0]
    assert read_epochs(tmp_path) == read_epochs(whole)
    assert_same_weights(tmp_path / "checkpoint-4.pth", whole / "checkpoint-4.pth")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_of_which_one_is_stopped_go_on_as_if_nothing_had_happened(
    whole_on_two, in1k_dir, tmp_path, processes, number
):
    """The one that does not save. A request stops both, after the same step."""
    config = make_config(in1k_dir, tmp_path, **SPLIT)
    sabotage = partial(_signal_before_step, 5, number, (1,))
    codes = processes.run(config, processes=2, sabotage=sabotage)
    assert codes == ([75, 75] if number == signal.SIGTERM else [1, -signal.SIGKILL])
    assert processes.run(config, processes=2) == [0, 0]
    assert read_epochs(tmp_path) == read_epochs(whole_on_two)
    assert_same_weights(tmp_path / "checkpoint-4.pth", whole_on_two / "checkpoint-4.pth")


def test_the_effective_batch_decides_not_the_number_of_processes(whole, whole_on_two):
    for one, two in zip(read_epochs(whole), read_epochs(whole_on_two), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4), name
    a, b = (torch.load(run / "last.pth", weights_only=True) for run in (whole, whole_on_two))
    for name, weight in a["model"].items():
        assert torch.allclose(weight, b["model"][name], atol=2e-3), name


def test_only_the_rolling_checkpoint_holds_the_optimizer_unless_it_is_asked_for(
    whole, in1k_dir, tmp_path, processes
):
    own, rolling = (torch.load(whole / name, weights_only=True) for name in ("checkpoint-4.pth", "last.pth"))
    assert rolling.keys() - own.keys() == {"optimizer"}
    assert_same_weights(whole / "checkpoint-4.pth", whole / "last.pth")
    first = make_config(in1k_dir, tmp_path, stop_after=1, **SPLIT)
    assert processes.run(first) == [0]
    # Without the rolling one nothing goes on, and nothing is written; what is done stays done.
    shutil.move(tmp_path / "last.pth", tmp_path.parent / "last.pth")
    before = content_of(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-1\.pth holds the model without the optimizer, so that"):
        pretrain(make_config(in1k_dir, tmp_path, stop_after=2, **SPLIT))
    assert content_of(tmp_path) == before
    assert pretrain(first)
    # With it in every checkpoint, also a round's own goes on, to the same end.
    shutil.move(tmp_path.parent / "last.pth", tmp_path / "last.pth")
    assert processes.run(make_config(in1k_dir, tmp_path, stop_after=2, keep_optimizer=True, **SPLIT)) == [0]
    assert (tmp_path / "checkpoint-2.pth").samefile(tmp_path / "last.pth")
    (tmp_path / "last.pth").unlink()
    assert processes.run(make_config(in1k_dir, tmp_path, **SPLIT)) == [0]
    assert_same_weights(tmp_path / "checkpoint-4.pth", whole / "checkpoint-4.pth")


def _kill_before_the_optimizer_goes(rank):
    from engine import checkpoint

    write = checkpoint._write

    def write_or_die(content, path):
        if "optimizer" not in content:
            os.kill(os.getpid(), signal.SIGKILL)
        write(content, path)

    checkpoint._write = write_or_die


def test_a_kill_before_the_optimizer_goes_leaves_a_round_that_goes_on(whole, in1k_dir, tmp_path, processes):
    config = make_config(in1k_dir, tmp_path, stop_after=1, **SPLIT)
    assert processes.run(config, sabotage=_kill_before_the_optimizer_goes) == [-signal.SIGKILL]
    assert (tmp_path / "checkpoint-1.pth").samefile(tmp_path / "last.pth")
    assert processes.run(config) == [0]
    assert processes.run(make_config(in1k_dir, tmp_path, **SPLIT)) == [0]
    assert_same_weights(tmp_path / "checkpoint-4.pth", whole / "checkpoint-4.pth")
