"""What is scored, and against what: probes, reference lines, controls."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.plan.check import init_of
from pipeline.plan.layout import Layout
from pipeline.plan.records import (
    Record,
    differences,
    is_done,
    output_sizes,
    write_record,
)
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from segmenter.config import ProbeConfig, TrainConfig

Make = Callable[..., Settings]


def names(settings: Settings) -> list[str]:
    return [step.name for step in make_plan(settings)]


def probe_of(settings: Settings, name: str) -> Step:
    return next(step for step in make_plan(settings) if step.name == name)


def test_every_round_is_probed_before_it_is_finetuned(settings: Make) -> None:
    call = "--pretrain-epochs 4 --eval-freq 2 --eval-epochs 4"
    assert names(settings(call + " --probe-freq 2")) == [
        "pretrain_four_channels_2",
        "probe_four_channels_2",
        "pretrain_four_channels_4",
        "probe_four_channels_4",
        "evaluate_four_channels_4",
    ]


def test_probes_can_be_more_frequent_than_evaluations_and_join_each(settings: Make) -> None:
    steps = names(settings("--pretrain-epochs 5 --eval-freq 5 --probe-freq 2"))
    assert [n for n in steps if n.startswith("probe")] == [
        "probe_four_channels_2", "probe_four_channels_4", "probe_four_channels_5"
    ]  # fmt: skip
    assert [n for n in steps if n.startswith("evaluate")] == ["evaluate_four_channels_5"]


def test_by_default_what_is_evaluated_is_probed(settings: Make) -> None:
    made = settings("--pretrain-epochs 4 --eval-freq 2 --probe-freq 2")
    experiment = replace(made.experiment, probe_freq=None)
    assert experiment.probe_points == experiment.eval_points == (2, 4)


def test_a_plan_may_be_of_probes_only(settings: Make) -> None:
    call = "--pretrain-epochs 4 --eval-freq 0 --baselines untrained,scratch"
    for freq, points in (("2", (2, 4)), ("3", (3, 4)), ("9", (4,))):
        kinds = [name for name in names(settings(f"{call} --probe-freq {freq}")) if "pretrain" not in name]
        expected = ["probe_scratch_0", *(f"probe_four_channels_{n}" for n in (0, *points))]
        assert kinds == expected


def test_a_probe_gets_the_protocol_of_the_finetuning_and_options_of_its_own(
    settings: Make,
) -> None:
    call = "--pretrain-epochs 1 --probe-freq 1 --recipe fast --finetune image_size=96"
    made = settings(call + " --finetune epochs=3 --probe probes=knn --seed 4")
    probe = probe_of(made, "probe_four_channels-seed4_1")
    checkpoint = made.data.output_dir / "pretrain_output/four_channels-seed4/checkpoint-1.pth"
    words = probe.command
    assert words[2:5] == ["segmenter", "probe", str(checkpoint)]
    assert "--init" not in words
    for option, value in (("image-size", "96"), ("recipe", "fast"), ("seed", "4")):
        assert words[words.index(f"--{option}") + 1] == value
    assert "--epochs" not in words
    assert probe.needs == ("pretrain_four_channels-seed4_1",)
    assert probe.outputs == (made.data.output_dir / "probe_output/four_channels-seed4_1/result.json",)
    assert probe.settings["init"] == "pretrain_output/four_channels-seed4/checkpoint-1.pth"


def test_images_with_classes_are_probed_too_unless_others_are_named(settings: Make, data: Path) -> None:
    (data / "in1k/val/disc").mkdir(parents=True)
    one_class = probe_of(settings("--pretrain-epochs 1 --probe-freq 1"), "probe_four_channels_1").config
    assert isinstance(one_class, ProbeConfig) and one_class.run.image_folder is None
    (data / "in1k/val/square").mkdir()
    for more, folder in (("", data / "in1k/val"), (" --probe image_folder=/other", Path("/other"))):
        steps = make_plan(settings("--pretrain-epochs 1 --probe-freq 1" + more))
        [config] = [step.config for step in steps if isinstance(step.config, ProbeConfig)]
        assert config.run.image_folder == folder


def test_probes_use_the_gpus_kept_for_evaluation_and_their_lane(settings: Make) -> None:
    call = "--pretrain-epochs 1 --probe-freq 1 --num-gpus 4 --eval-gpus 3"
    probe = probe_of(settings(call), "probe_four_channels_1")
    assert (probe.gpus, probe.processes, probe.lane) == ((3,), 1, "evaluate")


def test_several_processes_of_a_probe_keep_its_operand(settings: Make) -> None:
    call = "--pretrain-epochs 1 --probe-freq 1 --num-processes 2"
    words = probe_of(settings(call), "probe_four_channels_1").command
    at = words.index("segmenter")
    assert words[at - 1 : at + 2] == ["-m", "segmenter", "probe"]
    assert words[at + 2].endswith("checkpoint-1.pth")


def test_scratch_and_each_start_are_scored_by_default_and_mae_where_its_file_is(
    settings: Make,
) -> None:
    call = "--pretrain-epochs 1 --mask-method patches,segments --probe-freq 1 --baselines scratch"
    made = settings(call)
    made = replace(made, experiment=replace(made.experiment, baselines=None))
    scratch = ["probe_scratch_0", "evaluate_scratch_0"]
    start = ["pretrain_patches_0", "probe_patches_0"]
    assert names(made)[:5] == [*scratch, *start, "pretrain_patches_1"]
    official = made.data.output_dir / "pretrain_output/mae_pretrain_vit_large.pth"
    official.parent.mkdir(parents=True)
    official.touch()
    found = [name for name in names(made) if name.endswith("_0")]
    started = [*start, "pretrain_segments_0", "probe_segments_0"]
    assert found == [*scratch, "probe_mae_0", "evaluate_mae_0", *started]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--baselines none", []),
        ("--baselines mae", ["fetch_vit_large", "evaluate_mae_0"]),
        (
            "--baselines none --eval-epochs 0,1",
            ["pretrain_four_channels_0", "evaluate_four_channels_0"],
        ),
        ("--baselines untrained", []),  # it is probed, and here are no probes
        (
            "--baselines untrained --probe-freq 1 --segments-from own,blob",
            ["pretrain_four_channels_0", "probe_four_channels_0"],
        ),
        (
            "--baselines none --eval-epochs 0,1 --stack",
            ["fetch_vit_large", "pretrain_four_channels_0", "evaluate_four_channels_0"],
        ),
        ("--baselines scratch --seed 0,1", ["evaluate_scratch_0", "evaluate_scratch-seed1_0"]),
    ],
)
def test_baselines_as_they_are_asked_for(settings: Make, words: str, expected: list[str]) -> None:
    found = names(settings(f"--pretrain-epochs 1 {words}"))
    assert [n for n in found if "_0" in n or "fetch" in n] == expected


def test_scratch_has_patches_of_the_size_that_the_methods_have(settings: Make) -> None:
    """A checkpoint tells its own; another size would be another cost, and another score."""
    call = "--pretrain-epochs 1 --probe-freq 1 --baselines scratch --pretrain patch_size=8"
    for more, expected in (("", 8), (" --finetune patch_size=32", 32)):
        scores = {
            step.name: step.config.model.patch_size
            for step in make_plan(settings(call + more))
            if isinstance(step.config, ProbeConfig | TrainConfig)
        }
        assert scores["probe_scratch_0"] == scores["evaluate_scratch_0"] == expected
        told = None if not more else 32
        assert scores["probe_four_channels_1"] == scores["evaluate_four_channels_1"] == told


def test_a_baseline_is_one_step_however_many_methods_there_are(settings: Make) -> None:
    call = "--mask-method patches,segments,four_channels --coverage-ratio 10,15 --baselines scratch"
    assert names(settings(call)).count("evaluate_scratch_0") == 1


def test_an_official_checkpoint_of_ones_own_is_a_baseline(settings: Make, tmp_path: Path) -> None:
    file = tmp_path / "mae.pth"
    file.write_text("x")
    found = make_plan(settings(f"--baselines mae --mae-checkpoint {file} --pretrain-epochs 1"))
    assert found[0].name == "evaluate_mae_0"
    assert init_of(found[0]) == file


def test_controls_multiply_the_methods_that_use_segments_only(settings: Make) -> None:
    call = "--mask-method patches,segment_patches,four_channels --segments-from own,blob"
    found = names(settings(call + " --pretrain-epochs 1 --coverage-ratio 15,25"))
    assert [n for n in found if n.startswith("pretrain")] == [
        "pretrain_patches_1",
        "pretrain_segment_patches_1",
        "pretrain_segment_patches-blob_1",
        "pretrain_four_channels_1",
        "pretrain_four_channels-blob_1",
        "pretrain_four_channels-cov25_1",
        "pretrain_four_channels-cov25-blob_1",
    ]
    by_name = {step.name: step for step in make_plan(settings(call + " --pretrain-epochs 1"))}
    blob = by_name["pretrain_segment_patches-blob_1"].settings
    assert blob["segments_from"] == "blob" and "coverage_ratio" not in blob
    assert "segments_from" not in by_name["pretrain_patches_1"].settings


def recorded(paths: Layout, steps: list[Step]) -> None:
    """The steps as done, with their outputs."""
    for step in steps:
        step.folder.mkdir(parents=True, exist_ok=True)
        for path in step.outputs:
            path.write_text("x")
        outputs = output_sizes(step, paths)
        write_record(paths, Record.of(step, "done", None, outputs=outputs))


def test_probes_bind_later_calls_until_they_are_removed(settings: Make) -> None:
    call = "--pretrain-epochs 1 --probe-freq 1 --baselines scratch"
    first = settings(f"{call} --probe probes=knn")
    paths = Layout(first.data.output_dir)
    recorded(paths, make_plan(first))
    assert all(is_done(step, paths) for step in make_plan(first))
    other = make_plan(settings(f"{call} --mask-method patches"))
    found = differences(other, paths)
    assert found
    assert all("probes: ['knn'] -> " in difference for difference in found)
    shutil.rmtree(paths.probe_output)
    assert differences(other, paths) == []


def test_controls_of_a_method_may_share_an_output_directory(settings: Make) -> None:
    first = settings("--pretrain-epochs 1 --segments-from own,blob --coverage-ratio 15,25")
    paths = Layout(first.data.output_dir)
    recorded(paths, make_plan(first))
    more = make_plan(settings("--pretrain-epochs 1 --segments-from block"))
    assert {step.run for step in more} == {"four_channels-block"}
    assert differences(more, paths) == []
