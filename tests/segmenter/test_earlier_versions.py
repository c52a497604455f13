"""What earlier versions left is continued, scored and trusted."""

import json
import shutil

import pytest
import torch

from common.formats import read_log
from segmenter.loading import load_segmenter
from tests.segmenter.boxes import REPOSITORY, call, run, train_arguments
from tests.segmenter.test_train import assert_same_run, log_of, result_of

EARLIER = REPOSITORY / "tests/fixtures/earlier_run"


def forget(path, name):
    """A checkpoint or result as a version that did not know this setting would have written it."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        del content["settings"][name]
        path.write_text(json.dumps(content))
        return
    content = torch.load(path, weights_only=True)
    del content["config"][name]
    torch.save(content, path)


def test_a_run_without_a_later_setting_counts_as_its_older_value(dataset, finished, tmp_path):
    """`seed` stands for an option that a later version adds."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    forget(run / "checkpoint.pth", "seed")
    assert call(*train_arguments(dataset, run)).code == 0  # it had only its result to write
    assert_same_run(run, finished)
    forget(run / "result.json", "seed")
    assert call(*train_arguments(dataset, run)).code == 0
    assert call(*train_arguments(dataset, run), "--dry-run", "check").code == 0
    assert "seed" not in result_of(run)["settings"]  # nothing was written anew


@pytest.mark.parametrize("name", ["result.json", "checkpoint.pth"])
def test_another_value_of_a_later_setting_is_refused_by_name(dataset, finished, tmp_path, command, name):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / name, tmp_path / "run")
    forget(tmp_path / "run" / name, "seed")
    for check in ([], ["--dry-run", "check"]):
        outcome = command(*train_arguments(dataset, tmp_path / "run", seed=1), *check)
        assert outcome.code == 2
        assert f"{name} was made with other settings (seed: 0 -> 1)" in outcome.err


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A run directory of an earlier version and its data; its model comes by a plugin."""
    from pipeline.plan.sample import write_sample

    folder = tmp_path_factory.mktemp("earlier")
    size = {"train": 24, "val": 4, "segmentation_train": 8, "segmentation_val": 4}
    write_sample(folder / "sample", **size)
    shutil.copytree(EARLIER / "run/eval_output", folder / "eval_output")
    return folder


def earlier_arguments(folder, epochs):
    return [
        "train", "--plugin", str(EARLIER / "nano.py"), "--model", "vit_nano", "--recipe", "fast",
        "--dataset", str(folder / "sample/segmentation/dataset.yml"),
        "--init", str(EARLIER / f"run/pretrain_output/four_channels/checkpoint-{epochs}.pth"),
        "--output-dir", str(folder / f"eval_output/four_channels_{epochs}"),
        "--epochs", "3", "--batch-size", "4", "--image-size", "48", "--crop-size", "32",
        "--window-size", "32", "--window-stride", "32", "--eval-every", "1", "--workers", "0",
        "--device", "cpu",
    ]  # fmt: skip


def test_a_stopped_run_of_an_earlier_version_goes_on_as_it_would_have(earlier):
    run(earlier_arguments(earlier, 2), earlier / "output.txt")
    assert "epochs 2 to 3, from step 1" in (earlier / "output.txt").read_text()
    folder = earlier / "eval_output/four_channels_2"
    expected = json.loads((EARLIER / "expected.json").read_text())["eval_output/four_channels_2"]
    assert read_log(folder / "log.txt")[0]["train_loss"] == expected[0]["train_loss"]
    for record, wanted in zip(log_of(folder), expected, strict=True):
        known = {name: record[name] for name in wanted}  # and what later versions count, too
        assert known == pytest.approx(wanted, rel=1e-5)  # exact on the machine it was made on


def test_a_finished_run_of_an_earlier_version_is_finished(earlier):
    folder = earlier / "eval_output/four_channels_1"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(earlier_arguments(earlier, 1), earlier / "nothing.txt")
    assert (earlier / "nothing.txt").read_text() == ""
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_model_of_a_plugin_needs_it(earlier, monkeypatch, command):
    from engine.vit import VIT_SIZES, VitSize

    arguments = earlier_arguments(earlier, 2)
    del arguments[1:3]
    outcome = command(*arguments)
    assert outcome.code == 2
    assert "--model is 'vit_nano'; choose one of vit_tiny" in outcome.err
    monkeypatch.setitem(VIT_SIZES, "vit_nano", VitSize(width=16, depth=2, heads=2, patch_size=8))
    loaded = load_segmenter(EARLIER / "run/eval_output/four_channels_2/checkpoint.pth")
    assert (loaded.protocol.window_stride, loaded.protocol.scales) == (32, (1.0,))
