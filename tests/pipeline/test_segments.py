"""The steps that make or pack segments, and who waits for them; test_slurm.py runs some."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mae.config import PretrainConfig
from pipeline.plan.layout import Layout
from pipeline.plan.segments import with_segments
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from segments.config import PRESETS

Make = Callable[..., Settings]
MAKE = "--make-segments felzenszwalb --pretrain-epochs 1 "


@pytest.fixture
def none_there(data: Path) -> Path:
    """Where there are no segments: the store that would be made."""
    shutil.rmtree(data / "in1k/masks")
    return data / "in1k/masks/masks.sqlite"


@pytest.fixture
def may_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who can write everywhere."""
    monkeypatch.setattr(os, "access", lambda place, mode: False)


def planned(settings: Settings) -> dict[str, Step]:
    return {step.name: step for step in with_segments(make_plan(settings), settings)}


def masks_dir(step: Step) -> Path | None:
    assert isinstance(step.config, PretrainConfig)
    return step.config.data.masks_dir


def test_segments_are_packed_first_where_they_have_to_be(settings: Make, data: Path) -> None:
    pack, pretrain, evaluate = planned(settings("--pretrain-epochs 1")).values()
    masks = data / "in1k/masks"
    assert pack.command[-5:] == ["segments", "pack", str(masks), "--out", f"{masks}/masks.sqlite"]
    assert pretrain.needs == (pack.name,)
    assert masks_dir(pretrain) is None
    assert evaluate.needs == (pretrain.name,)


def test_nothing_is_packed_for_a_method_that_looks_at_no_segments(settings: Make) -> None:
    words = "--pretrain-epochs 1 --mask-method patches --pretrain use_unmasked_images=true"
    assert list(planned(settings(words))) == ["pretrain_patches_1", "evaluate_patches_1"]


@pytest.mark.parametrize("there", ["loose", "none"])
def test_segments_in_the_output_directory_are_the_same_segments(
    settings: Make, data: Path, may_not_write: None, there: str
) -> None:
    if there == "none":
        shutil.rmtree(data / "in1k/masks")
    chosen = settings(MAKE)
    first, pretrain, _ = planned(chosen).values()
    assert first.outputs == (Layout(chosen.data.output_dir).segments,)
    assert masks_dir(pretrain) == first.outputs[0]
    assert pretrain.settings == make_plan(chosen)[0].settings


def test_only_what_reads_segments_waits_until_they_are_made(settings: Make, none_there: Path) -> None:
    words = "--mask-method patches,segments,four_channels --eval-freq 1 --pretrain-epochs 2"
    steps = planned(settings(f"{MAKE} {words} --baselines scratch"))
    assert next(iter(steps)) == "generate_segments"
    waiting = {name for name, step in steps.items() if "generate_segments" in step.needs}
    assert waiting == {"pretrain_segments_1", "pretrain_four_channels_1"}
    assert steps["generate_segments"].needs == steps["pretrain_patches_1"].needs == ()


def test_the_official_checkpoint_is_waited_for_by_what_starts_from_it(settings: Make) -> None:
    words = "--pretrain-epochs 1 --model vit_base --baselines mae"
    steps = {step.name: step for step in make_plan(settings(words))}
    assert steps["evaluate_mae_0"].needs == ("fetch_vit_base",)
    assert steps["pretrain_four_channels_1"].needs == ()


def test_patches_need_not_wait_but_may_to_train_on_the_images_of_the_others(
    settings: Make, none_there: Path
) -> None:
    words = MAKE + "--mask-method patches,four_channels"
    at_once = planned(settings(words))
    assert at_once["pretrain_patches_1"].settings["use_unmasked_images"] is True
    assert "use_unmasked_images" not in at_once["pretrain_four_channels_1"].settings
    alike = planned(settings(words + " --pretrain use_unmasked_images=false"))
    assert alike["pretrain_patches_1"].needs == ("generate_segments",)
    alone = planned(settings(MAKE + "--mask-method patches"))
    assert "generate_segments" not in alone


def test_shards_are_joined_before_anybody_reads_them(settings: Make, none_there: Path) -> None:
    chosen = settings(MAKE + "--segment-shards 3 --launcher slurm")
    *shards, merge, pretrain, _ = planned(chosen).values()
    for index, step in enumerate(shards):
        assert f"--shard {index}/3" in " ".join(step.command)
        assert step.needs == ()
        assert step.outputs[0].name == f"masks-{index}-of-3.sqlite"
        assert str(step.outputs[0]) in merge.command
    assert len({step.folder for step in shards}) == 3
    assert merge.needs == tuple(step.name for step in shards)
    assert merge.outputs == (none_there,)
    assert pretrain.needs == ("merge_segments",)


def test_only_what_is_near_the_ratios_of_the_plan_is_made(settings: Make, none_there: Path) -> None:
    def wanted(words: str) -> tuple[str, object]:
        step = planned(settings(f"--pretrain-epochs 1 {words}"))["generate_segments"]
        _, _, told = " ".join(step.command).partition("--for-coverage ")
        return told.partition(" ")[0], step.settings["for_coverage"]

    two = "--make-segments sam2-tiny --coverage-ratio 25,15 --mask-method patches,segments"
    assert wanted(two) == ("15.0,25.0", [15.0, 25.0])
    assert wanted(two + ",segment_patches") == ("", [])
    assert wanted(MAKE) == ("15.0", [15.0])


def test_where_the_model_comes_from_and_runs(settings: Make, none_there: Path, tmp_path: Path) -> None:
    def made_by(words: str) -> str:
        step = planned(settings(f"--pretrain-epochs 1 --make-segments {words}"))
        return " ".join(step["generate_segments"].command[3:])

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert made_by("sam2-tiny").startswith("generate sam2-tiny --images")
    for model in (f"{tmp_path}/model", "facebook/sam-vit-base"):
        assert made_by(model).startswith("generate sam --images")
        assert f"--model {model}" in made_by(model)
    assert "--device cpu" in made_by("sam2-tiny")
    assert "--device cuda" in made_by("sam2-tiny --num-gpus 2")
    assert "--device" not in made_by("felzenszwalb")


@pytest.mark.parametrize("name", ["nonsense", "/nowhere/at/all", "{data}"])
@pytest.mark.parametrize("are_there", [False, True])
def test_a_generator_that_there_is_not_is_refused_whether_it_is_needed_or_not(
    settings: Make, none_there: Path, data: Path, name: str, are_there: bool
) -> None:
    if are_there:
        none_there.parent.mkdir()
        none_there.touch()
    with pytest.raises(ValueError, match=f": choose one of sam, {next(iter(PRESETS))}, "):
        planned(settings(f"--pretrain-epochs 1 --make-segments {name.format(data=data)}"))


def test_where_segments_are_there_none_are_made(settings: Make, none_there: Path) -> None:
    none_there.parent.mkdir()
    none_there.touch()
    assert list(planned(settings(MAKE))) == ["pretrain_four_channels_1", "evaluate_four_channels_1"]


def test_nothing_is_made_for_what_is_done_and_a_later_round_waits(settings: Make, none_there: Path) -> None:
    chosen = settings(MAKE + "--pretrain-epochs 2 --eval-freq 1")
    rounds = [f"pretrain_four_channels_{epochs}" for epochs in (1, 2)]
    needs = {s.name: s.needs for s in with_segments(make_plan(chosen), chosen, rounds[:1])}
    assert needs[rounds[0]] == ()
    assert needs[rounds[1]] == (rounds[0], "generate_segments")
    steps = with_segments(make_plan(chosen), chosen, rounds)
    assert all(step.kind != "generate" for step in steps)
