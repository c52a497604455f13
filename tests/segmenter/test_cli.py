"""What users type, and what they are told when it cannot work."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segmenter.check import check_run, plan_batches
from segmenter.config import RECIPES, recipe_names, recipe_values
from segmenter.dataset import read_description
from tests.segmenter.boxes import REPOSITORY, config_of, train_arguments


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
probe = ["probe", "random", *(f"--{word}" for word in sys.argv[1].split("|"))]
for arguments in (["train", "--help"], ["probe", "--help"], probe, sys.argv[2:]):
    try:
        cli.main(arguments)
    except SystemExit as error:
        assert not error.code, error.code
loaded = {"torch", "mmseg", "mmcv", "timm", "accelerate"} & set(sys.modules)
assert not loaded, loaded
"""
    arguments = [*train_arguments(dataset, tmp_path / "run"), "--dry-run", "check"]
    of_probe = f"dataset={dataset}|output-dir={tmp_path / 'run'}|dry-run=check"
    subprocess.run([sys.executable, "-c", script, of_probe, *arguments], cwd=REPOSITORY, check=True)
    assert not (tmp_path / "run").exists()


def test_check_prints_nothing_and_writes_nothing(dataset, tmp_path, command):
    outcome = command(*train_arguments(dataset, tmp_path / "run"), "--dry-run", "check")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert not (tmp_path / "run").exists()


def test_what_a_run_will_be_is_known_before(dataset, finished, tmp_path):
    config, task = config_of(train_arguments(dataset, tmp_path / "run")), read_description(dataset)
    facts = check_run(config, task, processes=1)
    assert (facts.train, facts.val) == (7, 3)
    size = (finished / "checkpoint.pth").stat().st_size
    assert facts.checkpoint_bytes == pytest.approx(size, rel=0.15)  # of so small a file
    assert not (tmp_path / "run").exists()


def test_a_config_prints_the_command_line_that_makes_it(dataset, tmp_path):
    arguments = train_arguments(dataset, tmp_path / "run", clip_grad=1.5, multi_scale=None)
    config = config_of(arguments)
    words = config.arguments()
    assert config_of(["train", *words]) == config
    assert "--epochs" in words
    assert "--schedule" not in words, "it is the recipe's"


def test_a_batch_is_split_over_as_many_processes_as_there_will_be(dataset, tmp_path, command, monkeypatch):
    arguments = train_arguments(dataset, tmp_path / "run", batch_size=5, device_batch_size=2)
    plan = plan_batches(config_of(arguments), read_description(dataset), processes=2)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.steps_per_epoch) == (2, 2, 1)
    monkeypatch.setenv("WORLD_SIZE", "16")
    outcome = command(*arguments, "--dry-run", "check")
    assert_refused(outcome, "cannot be spread over 16 processes")


def test_recipes_are_complete_and_segmenter_is_the_papers():
    assert recipe_names() == ["fast", "mae", "segmenter", "upernet"]
    for name in recipe_names():
        recipe_values(name)
    paper = recipe_values("segmenter")
    assert (paper["optimizer"], paper["lr"], paper["momentum"]) == ("sgd", 1e-3, 0.9)
    assert (paper["schedule"], paper["poly_power"], paper["min_lr"]) == ("poly", 0.9, 1e-5)
    assert (paper["batch_size"], paper["epochs"], paper["crop_size"]) == (8, 64, 512)
    assert (paper["drop_path"], paper["decoder_layers"]) == (0.1, 2)


def test_config_files_take_either_spelling_and_the_command_line_wins(dataset, tmp_path, command):
    config = tmp_path / "config.yml"
    config.write_text("crop-size: 0\nwindow_size: 32\ndecoder: mask-transformer\n")
    arguments = [*train_arguments(dataset, tmp_path / "run", crop_size=None), "--config", config]
    check = ("--dry-run", "check")
    assert_refused(command(*arguments, *check), "--crop-size is 0")
    config.write_text("crop-size: 48\nwindow_size: 32\ndecoder: mask-transformer\n")
    assert command(*arguments, *check).code == 0
    too_small = (*arguments, *check, "--crop-size", "0")
    assert_refused(command(*too_small), "--crop-size is '0'")
    config.write_text("window_size: 32\ncompile: off\n")  # no word is taken for false
    assert command(*arguments, *check, "--crop-size", "32").code == 0
    config.write_text("crop_sise: 3\n")
    assert_refused(
        command(*arguments, *check),
        "config.yml: there is no 'crop_sise'; did you mean crop_size",
    )


def test_a_recipe_of_ones_own_is_read_and_checked(dataset, tmp_path, command):
    values = yaml.safe_load((RECIPES / "fast.yml").read_text())
    recipe = tmp_path / "own.yml"
    for change, messages in (
        ({}, None),
        ({"clip_grad": 1, "momentum": 0.8}, None),
        ({"optimizer": "lion"}, ["own.yml: --optimizer is 'lion'; choose one of sgd, adamw"]),
        ({"epochs": "many"}, ["own.yml: --epochs is 'many'; it should be a valid integer"]),
        ({"epochs": 0}, ["own.yml: --epochs is 0; it should be greater than or equal to 1"]),
        ({"learning": 1}, ["own.yml: there is no 'learning'"]),
        ({"output_dir": "x"}, ["own.yml: there is no 'output_dir'"]),
        ({"lr": None}, ["own.yml lacks lr"]),
    ):
        recipe.write_text(yaml.safe_dump({**values, **change}))
        outcome = command(*train_arguments(dataset, tmp_path / "run", recipe=recipe), "--dry-run", "check")
        if messages is None:
            assert (outcome.code, outcome.err) == (0, "")
        else:
            assert_refused(outcome, *messages)
            assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"model": "vit_mini"}, ["vit_mini", "vit_tiny", "vit_huge"]),
        ({"recipe": "slow"}, ["'slow'", "fast, mae, segmenter, upernet"]),
        ({"init": "nowhere.pth"}, ["nowhere.pth does not exist", "random"]),
        (
            {"output_dir": "/dev/null/run"},
            ["/dev/null is not a folder"],
        ),
        ({"log_with": "lightning"}, ["--log-with is 'lightning'", "tensorboard"]),
        ({"dataset": "nowhere.yml"}, ["nowhere.yml does not exist"]),
        ({"dataset": "/tmp"}, ["has none of the layouts of ade20k, camvid"]),
        ({"window_stride": 99}, ["--window-stride 99 is more than --window-size 32"]),
        ({"drop_path": 1.5}, ["--drop-path is '1.5'", "less than 1"]),
        ({"epochs": 0}, ["--epochs is '0'"]),
        ({"resume": "required"}, ["--resume required", "there is no checkpoint"]),
        ({"device": "cuda"}, ["--device cuda", "has no GPU"]),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(dataset, tmp_path, command, changes, messages):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    outcome = command(*train_arguments(dataset, tmp_path / "run", **changes))
    assert_refused(outcome, *messages)
    assert not (tmp_path / "run").exists()


def no_annotation(folder):
    (folder / "annotations/training/002.png").unlink()
    return "1 of 7 train images have no annotation: "


def empty_split(folder):
    for path in (folder / "images/validation").iterdir():
        path.unlink()
    return "no *.jpg"


def other_size(folder):
    path = folder / "annotations/training/002.png"
    Image.open(path).resize((9, 9)).save(path)
    return "002.png is 9 x 9 pixels, its image "


def outside_label(folder):
    path = folder / "annotations/training/002.png"
    labels = np.array(Image.open(path))
    labels[3, 3] = 200
    Image.fromarray(labels).save(path)
    return "002.png holds label 200, "


def corrupt_images(folder):
    (folder / "images/validation/101.jpg").write_bytes(b"no image")
    (folder / "images/validation/102.jpg").write_bytes(b"")
    return "101.jpg cannot be read as an image: it is no image (2 of "


@pytest.mark.parametrize("breaking", [no_annotation, empty_split, other_size, outside_label, corrupt_images])
def test_bad_data_is_refused_before_anything_is_written(own_dataset, tmp_path, command, breaking):
    message = breaking(own_dataset.parent)
    assert_refused(command(*train_arguments(own_dataset, tmp_path / "run")), message)
    assert not (tmp_path / "run").exists()
    assert_refused(command("prepare", "check", own_dataset), message)


def test_a_run_does_not_go_on_from_a_broken_checkpoint(dataset, tmp_path, command):
    """Nor start from one, nor score it: tests/wrong/test_files.py."""
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
