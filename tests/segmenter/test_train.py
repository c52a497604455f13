"""Finetuning from start to result, cut and continued at every kind of place."""

import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch

import engine.checkpoint
import segmenter.model
from common.formats import read_log
from engine.trainer import EpochTrainer
from tests.equal_runs import TIMING_KEYS
from tests.segmenter.boxes import call, run, train_arguments
from tests.tensorboard_events import scalars

TIMINGS = {"images_per_second", "data_wait_share", "epoch_seconds", "peak_memory_mib"}


def log_of(output_dir):
    return [
        {name: value for name, value in record.items() if name not in TIMING_KEYS}
        for record in read_log(output_dir / "log.txt")
    ]


def weights_of(output_dir, name="checkpoint.pth"):
    return torch.load(output_dir / name, weights_only=True)["model"]


def result_of(output_dir):
    return json.loads((output_dir / "result.json").read_text())


def assert_same_run(output_dir, finished):
    assert log_of(output_dir) == log_of(finished)
    expected = weights_of(finished)
    for name, weight in weights_of(output_dir).items():
        assert torch.equal(weight, expected[name]), name
    for key in ("pixel_accuracy", "mean_iou", "best_mean_iou", "class_iou"):
        assert result_of(output_dir)[key] == result_of(finished)[key]


def test_a_run_leaves_everything_and_nothing_unfinished(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "log.txt", "checkpoint.pth", "best.pth", "predictions.png", "progress.json",
        "areas.npz", "result.json", "tensorboard", ".trackers.json", ".lock",
    }  # fmt: skip
    assert any((finished / "tensorboard").iterdir())


def test_the_areas_of_the_images_amount_to_the_scores(finished):
    with np.load(finished / "areas.npz", allow_pickle=False) as file:
        images, areas = file["images"], file["areas"]
    result = result_of(finished)
    assert len(images) == len(areas) == result["dataset"]["num_val"]
    assert len(set(images.tolist())) == len(images)
    intersection, predicted, label = areas.sum(0)
    iou = 100 * intersection / (predicted + label - intersection)
    assert iou.tolist() == pytest.approx(list(result["class_iou"].values()))
    assert result["pixel_accuracy"] == pytest.approx(100 * intersection.sum() / label.sum())


def test_the_log_has_each_epoch_once_with_its_scores(finished):
    records = read_log(finished / "log.txt")
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["num_updates"] for record in records] == [2, 4]
    for record in records:
        assert {"train_loss", "train_learning_rate", "val_pixel_accuracy", "val_mean_accuracy",
                "val_mean_iou", *TIMINGS} <= set(record)  # fmt: skip
        assert 0 <= record["data_wait_share"] <= 1


def test_the_result_holds_scores_recipe_and_protocol(finished):
    result = result_of(finished)
    last = read_log(finished / "log.txt")[-1]
    assert result["mean_iou"] == last["val_mean_iou"]
    assert result["best_mean_iou"] >= result["mean_iou"]
    assert (result["epochs"], result["num_updates"], result["init"]) == (2, 4, "random")
    assert list(result["class_iou"]) == ["ground", "box", "sky"]
    assert result["protocol"]["window_stride"] == 24
    assert result["recipe"]["name"] == "fast"
    assert result["dataset"] == {"name": "boxes", "num_classes": 3, "num_val": 3}
    assert result["seed"] == 0
    assert result["num_processes"] == 1
    assert result["device"] == "cpu"


def test_progress_says_that_the_run_is_done(finished):
    progress = json.loads((finished / "progress.json").read_text())
    assert (progress["state"], progress["epoch"], progress["epochs_total"]) == ("done", 2, 2)
    assert progress["pid"] == os.getpid()
    assert progress["images_per_second"] > 0


def test_the_checkpoint_is_plain_and_complete(finished):
    content = torch.load(finished / "checkpoint.pth", weights_only=True)
    assert content["format_version"] == 1
    assert (content["epochs_completed"], content["steps_completed"]) == (2, 0)
    assert content["config"]["model"] == "vit_toy"


def test_the_same_command_again_does_nothing(dataset, finished, command):
    before = (finished / "result.json").stat().st_mtime_ns
    assert command(*train_arguments(dataset, finished)).code == 0
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_other_settings_are_refused_by_name(dataset, finished, command):
    for check in ([], ["--dry-run", "check"]):
        outcome = command(*train_arguments(dataset, finished, lr=0.5), *check)
        assert outcome.code == 2
        assert "lr: 0.001 -> 0.5" in outcome.err
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_signal_saves_and_the_same_command_continues_exactly(
    dataset, finished, tmp_path, monkeypatch, step
):
    """Step 2 is the end of an epoch: the signal then stops the evaluation."""
    steps = []
    original = EpochTrainer.step

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(EpochTrainer, "step", interrupted)
    arguments = train_arguments(dataset, tmp_path / "run")
    assert call(*arguments).code == 75
    assert len(steps) == step
    assert json.loads((tmp_path / "run/progress.json").read_text())["state"] == "stopped"
    assert not (tmp_path / "run/result.json").exists()
    assert call(*arguments).code == 0
    assert len(steps) == 4
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("save", [2, 3, 4])
def test_a_run_killed_in_the_middle_of_a_save_continues_exactly(
    dataset, finished, tmp_path, monkeypatch, save
):
    """Saves of the first epoch: before its evaluation, and after it."""
    saves = []
    original = torch.save

    def half_a_file(content, file):
        saves.append(1)
        if len(saves) == save:
            file.write(b"half a file")
            raise SystemExit(137)
        original(content, file)

    monkeypatch.setattr(engine.checkpoint.torch, "save", half_a_file)
    arguments = train_arguments(dataset, tmp_path / "run")
    assert call(*arguments).code == 137
    assert call(*arguments).code == 0
    assert_same_run(tmp_path / "run", finished)


def _kill_after_epoch(count):
    """SIGKILL when so many epochs are in the log; their checkpoints are written."""
    from engine import checkpoint, logbook

    save, add_epoch, added = checkpoint.Saver.save, logbook.Logbook.add_epoch, []

    def save_and_wait(self, *arguments, **named):
        save(self, *arguments, **named)
        self.running.result()

    def add_and_kill(self, record):
        add_epoch(self, record)
        added.append(record)
        if len(added) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Saver.save, logbook.Logbook.add_epoch = save_and_wait, add_and_kill


def test_a_killed_process_continues_exactly(dataset, finished, tmp_path):
    output_dir = tmp_path / "run"
    arguments = train_arguments(dataset, output_dir, save_every_minutes=1e-6)
    sabotage = partial(_kill_after_epoch, 1)
    run(arguments, tmp_path / "output.txt", sabotage=sabotage, code=-signal.SIGKILL)
    assert call(*arguments).code == 0
    assert_same_run(output_dir, finished)


def test_tensorboard_gets_every_value_once_also_after_a_kill(dataset, finished, tmp_path):
    output_dir = tmp_path / "run"
    arguments = train_arguments(dataset, output_dir, epochs=4)
    sabotage = partial(_kill_after_epoch, 2)
    run(arguments, tmp_path / "output.txt", sabotage=sabotage, code=-signal.SIGKILL)
    assert not (output_dir / "result.json").exists()
    assert call(*arguments).code == 0
    for folder in (output_dir, finished):
        expected = {}
        for record in read_log(folder / "log.txt"):
            for name in set(record) - {"epoch"}:
                expected.setdefault(name, []).append((record["epoch"], pytest.approx(record[name])))
        assert scalars(folder) == expected


def test_without_trackers_there_are_none(dataset, tmp_path):
    assert call(*train_arguments(dataset, tmp_path / "run", log_with="none", epochs=1)).code == 0
    assert not (tmp_path / "run/tensorboard").exists()


def test_resume_never_refuses_an_existing_run(dataset, finished, tmp_path, command):
    arguments = train_arguments(dataset, tmp_path / "run", resume="never", epochs=1)
    assert command(*arguments).code == 0
    for name in ("result.json", "checkpoint.pth"):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
        for check in ([], ["--dry-run", "check"]):
            outcome = command(*arguments, *check)
            assert outcome.code == 2
            assert outcome.err == (
                f"Error: --resume never: {tmp_path / 'run' / name} is there already; remove it or "
                "use another --output-dir\n"
            )
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
        (tmp_path / "run/result.json").unlink(missing_ok=True)


def test_a_loss_that_is_not_finite_stops_before_the_step(dataset, tmp_path, command, monkeypatch):
    original = segmenter.model.segmentation_loss
    calls = []

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(segmenter.model, "segmentation_loss", poisoned)
    outcome = command(*train_arguments(dataset, tmp_path / "run"))
    assert outcome.code == 1
    assert "not finite on process 0, step 2 of 2 in epoch 2" in outcome.err
    assert "Traceback" not in outcome.err
    state = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert (state["epochs_completed"], state["steps_completed"]) == (1, 0)
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    assert json.loads((tmp_path / "run/progress.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run/result.json").exists()


def test_small_device_batches_change_the_loss_by_rounding_only(dataset, tmp_path):
    changes = {"drop_path": 0, "decoder_dropout": 0, "epochs": 1}
    losses = []
    for name, most in (("whole", None), ("parts", 1)):
        arguments = train_arguments(
            dataset, tmp_path / name, device_batch_size=most, **changes
        )  # fmt: skip
        assert call(*arguments).code == 0
        losses.append(read_log(tmp_path / name / "log.txt")[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_recomputed_activations_and_the_size_that_fits_change_nothing(dataset, finished, tmp_path):
    """Dropout and drop path included; without a GPU the default size fits."""
    arguments = train_arguments(dataset, tmp_path / "run", device_batch_size="auto")
    assert call(*arguments, "--activation-checkpointing").code == 0
    assert_same_run(tmp_path / "run", finished)


def test_too_little_gpu_memory_names_what_to_lower(dataset, tmp_path, command, monkeypatch):
    def refused(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a")

    monkeypatch.setattr(segmenter.model, "segmentation_loss", refused)
    outcome = command(*train_arguments(dataset, tmp_path / "run"))
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "Error: CUDA out of memory. Tried to allocate 2.00 GiB: lower --eval-batch-size or "
        "lower --device-batch-size or give --activation-checkpointing; the result stays the same"
    )


def test_two_processes_train_and_score_like_one(dataset, finished, tmp_path):
    """No dropout here, whose noise differs by process; 3 test images on 2 processes."""
    changes = {"drop_path": 0, "decoder_dropout": 0}
    arguments = train_arguments(dataset, tmp_path / "two", **changes)
    run(arguments, tmp_path / "output.txt", processes=2)
    assert call(*train_arguments(dataset, tmp_path / "one", **changes)).code == 0
    assert result_of(tmp_path / "two")["num_processes"] == 2
    logs = [read_log(tmp_path / name / "log.txt") for name in ("one", "two")]
    for one, other in zip(*logs, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    score = ["evaluate", finished / "best.pth", "--dataset", dataset, "--device", "cpu",
             "--workers", "0", "--eval-batch-size", "1", "--out"]  # fmt: skip
    run([*score, tmp_path / "two.json"], tmp_path / "output.txt", processes=2)
    assert call(*score, tmp_path / "one.json").code == 0
    exact = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    assert exact[0] == exact[1]
    assert exact[0]["mean_iou"] == result_of(finished)["best_mean_iou"]
