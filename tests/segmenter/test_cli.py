"""What users type, and what they are told when it cannot work."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segmenter.options import RECIPES, read_recipe
from tests.segmenter.boxes import REPOSITORY, train_arguments


def assert_refused(outcome, *messages):
    assert outcome.code == 2
    lines = outcome.err.strip().splitlines()
    assert 1 <= len(lines) <= 2, outcome.err
    assert lines[0].startswith("Error: ")
    for message in messages:
        assert message in outcome.err


def test_help_and_check_do_not_import_torch(dataset, tmp_path):
    script = """
import sys
import segmenter.cli as cli
for arguments in (["train", "--help"], sys.argv[1:]):
    try:
        cli.main(arguments)
    except SystemExit as error:
        assert not error.code, error.code
loaded = {"torch", "mmseg", "mmcv", "timm", "accelerate"} & set(sys.modules)
assert not loaded, loaded
"""
    arguments = [*train_arguments(dataset, tmp_path / "run"), "--check"]
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=REPOSITORY, check=True)
    assert not (tmp_path / "run").exists()


def test_check_prints_nothing_and_writes_nothing(dataset, tmp_path, command):
    outcome = command(*train_arguments(dataset, tmp_path / "run"), "--check")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert not (tmp_path / "run").exists()


def test_check_knows_how_many_processes_there_will_be(dataset, tmp_path, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    arguments = [*train_arguments(dataset, tmp_path / "run"), "--check"]
    assert_refused(command(*arguments), "cannot be spread over 16 processes")


def test_recipes_are_complete_and_segmenter_is_the_papers():
    assert {path.stem for path in RECIPES.glob("*.yml")} == {"segmenter", "mae", "fast"}
    for path in RECIPES.glob("*.yml"):
        read_recipe(path.stem)
    paper = read_recipe("segmenter")
    assert (paper["optimizer"], paper["lr"], paper["momentum"]) == ("sgd", 1e-3, 0.9)
    assert (paper["schedule"], paper["poly_power"], paper["min_lr"]) == ("poly", 0.9, 1e-5)
    assert (paper["batch_size"], paper["epochs"], paper["crop_size"]) == (8, 64, 512)
    assert (paper["drop_path"], paper["decoder_layers"]) == (0.1, 2)


def test_config_files_take_either_spelling_and_the_command_line_wins(dataset, tmp_path, command):
    config = tmp_path / "config.yml"
    config.write_text("crop-size: 0\nwindow_size: 32\ndecoder: mask-transformer\n")
    arguments = [*train_arguments(dataset, tmp_path / "run", crop_size=None), "--config", config]
    assert_refused(command(*arguments, "--check"), "--crop-size is 0")
    assert command(*arguments, "--check", "--crop-size", "32").code == 0
    config.write_text("window_size: 32\ncompile: off\n")  # false, as YAML reads it
    assert command(*arguments, "--check", "--crop-size", "32").code == 0
    config.write_text("crop_sise: 3\n")
    assert_refused(command(*arguments, "--check"), "unknown option 'crop_sise'", "crop_size")


def test_a_recipe_of_ones_own_is_read_and_checked(dataset, tmp_path, command):
    values = yaml.safe_load((RECIPES / "fast.yml").read_text())
    recipe = tmp_path / "own.yml"
    for change, messages in (
        ({"optimizer": "lion"}, ["optimizer", "sgd"]),
        ({"epochs": "many"}, ["epochs", "many"]),
        ({"learning": 1}, ["unknown option 'learning'"]),
    ):
        recipe.write_text(yaml.safe_dump({**values, **change}))
        outcome = command(*train_arguments(dataset, tmp_path / "run", recipe=recipe), "--check")
        assert_refused(outcome, *messages)
    del values["lr"]
    recipe.write_text(yaml.safe_dump(values))
    outcome = command(*train_arguments(dataset, tmp_path / "run", recipe=recipe), "--check")
    assert_refused(outcome, "lacks lr")


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"model": "vit_mini"}, ["vit_mini", "vit_tiny", "vit_huge"]),
        ({"recipe": "slow"}, ["'slow'", "fast, mae, segmenter"]),
        ({"init": "nowhere.pth"}, ["nowhere.pth does not exist", "random"]),
        ({"dataset": "nowhere.yml"}, ["nowhere.yml does not exist"]),
        ({"dataset": "/tmp"}, ["is not an ADEChallengeData2016 folder"]),
        ({"window_stride": 99}, ["--window-stride 99 is more than --window-size 32"]),
        ({"drop_path": 1.5}, ["--drop-path is 1.5", "0 to below 1"]),
        ({"epochs": 0}, ["--epochs is 0"]),
        ({"resume": "required"}, ["--resume required", "does not exist"]),
        ({"device": "cuda"}, ["--device cuda", "no CUDA device"]),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    dataset, tmp_path, command, changes, messages
):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    outcome = command(*train_arguments(dataset, tmp_path / "run", **changes))
    assert_refused(outcome, *messages)
    assert not (tmp_path / "run").exists()


def no_annotation(folder):
    (folder / "annotations/training/002.png").unlink()
    return "002.png"


def empty_split(folder):
    for path in (folder / "images/validation").iterdir():
        path.unlink()
    return "no *.jpg"


def empty_file(folder):
    (folder / "images/training/002.jpg").write_bytes(b"")
    return "002.jpg (train) is an empty file of 0 bytes"


def other_size(folder):
    path = folder / "annotations/training/002.png"
    Image.open(path).resize((9, 9)).save(path)
    return "002.png is 9 x 9 pixels"


def outside_label(folder):
    path = folder / "annotations/training/002.png"
    labels = np.array(Image.open(path))
    labels[3, 3] = 200
    Image.fromarray(labels).save(path)
    return "002.png holds label 200"


def corrupt_image(folder):
    (folder / "images/validation/101.jpg").write_bytes(b"no image")
    return "101.jpg cannot be read as an image"


@pytest.mark.parametrize(
    "breaking", [no_annotation, empty_split, empty_file, other_size, outside_label, corrupt_image]
)
def test_bad_data_is_refused_before_anything_is_written(own_dataset, tmp_path, command, breaking):
    message = breaking(own_dataset.parent)
    assert_refused(command(*train_arguments(own_dataset, tmp_path / "run")), message)
    assert not (tmp_path / "run").exists()
    assert_refused(command("prepare", "check", own_dataset), message)


def test_bad_checkpoints_are_refused(dataset, tmp_path, command):
    path = tmp_path / "init.pth"
    path.write_bytes(b"")
    arguments = train_arguments(dataset, tmp_path / "run", init=path)
    assert_refused(command(*arguments, "--check"), "cannot be read as a checkpoint")
    torch.save({"model": {"surprise": torch.zeros(1)}}, path)
    assert_refused(command(*arguments), "is not a checkpoint of a ViT encoder")
    evaluate = ["evaluate", path, "--dataset", dataset]
    assert_refused(command(*evaluate), "is not a checkpoint of `python -m segmenter train`")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pth").write_bytes(b"broken")
    arguments = train_arguments(dataset, tmp_path / "run")
    assert_refused(command(*arguments), "cannot be read as a checkpoint")


def test_a_checkpoint_of_another_number_of_classes_is_refused(finished, ade20k, tmp_path, command):
    outcome = command(
        "evaluate", finished / "best.pth", "--dataset", ade20k,
        "--save-predictions", tmp_path / "predictions",
    )  # fmt: skip
    assert_refused(outcome, "the checkpoint has 3 classes", "ade20k has 150")
    assert list(tmp_path.iterdir()) == []
