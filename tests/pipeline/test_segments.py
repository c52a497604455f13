"""The steps that make or pack segments, and who waits for them; test_slurm.py runs some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.plan.layout import Layout
from pipeline.plan.parts import Facts
from pipeline.plan.segments import with_segments
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Step, make_plan
from segments.generate import Shard
from tests.pipeline.programs import FACTS, plan_of

Make = Callable[..., Settings]
MAKE = "--make-segments felzenszwalb --pretrain-epochs 1 "


@pytest.fixture
def none_there(tmp_path: Path) -> Facts:
    """What is known where there are no segments."""
    of_all = ["images", "val_dir", "out", "shard"]
    generators = {
        "felzenszwalb": [*of_all, "scales", "processes"],
        "sam": [*of_all, "model", "device", "for_coverage"],
        "sam2-tiny": [*of_all, "device", "for_coverage"],
    }
    store = tmp_path / "data/in1k/masks/masks.sqlite"
    return replace(FACTS, making=store, generators=generators)


def planned(settings: Settings, facts: Facts) -> dict[str, Step]:
    steps = with_segments(make_plan(settings, facts), settings, facts)
    return {step.name: step for step in steps}


def test_segments_are_packed_first_where_they_have_to_be(settings: Make, tmp_path: Path) -> None:
    chosen = settings("--pretrain-epochs 1")
    beside = replace(FACTS, packing=(tmp_path / "masks", tmp_path / "masks/masks.sqlite"))
    pack, pretrain, evaluate = planned(chosen, beside).values()
    assert pack.command[-5:] == [
        *("masks", "pack", str(tmp_path / "masks"), "--out"), str(tmp_path / "masks/masks.sqlite"),
    ]  # fmt: skip
    assert pretrain.needs == (pack.name,)
    assert pretrain.options["masks_dir"] is None
    assert evaluate.needs == (pretrain.name,)


def test_nothing_is_packed_for_a_method_that_looks_at_no_segments(
    settings: Make, tmp_path: Path
) -> None:
    words = "--pretrain-epochs 1 --mask-method patches --pretrain use_unmasked_images=true"
    facts = replace(FACTS, packing=(tmp_path / "masks", tmp_path / "masks/masks.sqlite"))
    assert list(planned(settings(words), facts)) == ["pretrain_patches_1", "evaluate_patches_1"]


@pytest.mark.parametrize("fact", ["packing", "making"])
def test_segments_in_the_output_directory_are_the_same_segments(
    settings: Make, none_there: Facts, tmp_path: Path, fact: str
) -> None:
    chosen = settings(MAKE)
    store = Layout(chosen.data.output_dir).segments
    place = (tmp_path / "masks", store) if fact == "packing" else store
    facts = replace(none_there, **{"making": None, fact: place})
    pretrain = planned(chosen, facts)["pretrain_four_channels_1"]
    assert pretrain.options["masks_dir"] == store
    assert pretrain.settings == plan_of(chosen)[0].settings


def test_only_what_reads_segments_waits_until_they_are_made(
    settings: Make, none_there: Facts
) -> None:
    words = "--mask-method patches,segments,four_channels --eval-freq 1 --pretrain-epochs 2"
    steps = planned(settings(f"{MAKE} {words} --baselines scratch"), none_there)
    assert next(iter(steps)) == "generate_segments"
    waiting = {name for name, step in steps.items() if "generate_segments" in step.needs}
    assert waiting == {"pretrain_segments_1", "pretrain_four_channels_1"}
    assert steps["generate_segments"].needs == steps["pretrain_patches_1"].needs == ()


def test_the_official_checkpoint_is_waited_for_by_what_starts_from_it(settings: Make) -> None:
    words = "--pretrain-epochs 1 --model vit_base --baselines mae"
    steps = {step.name: step for step in plan_of(settings(words))}
    assert steps["evaluate_mae_0"].needs == ("fetch_vit_base",)
    assert steps["pretrain_four_channels_1"].needs == ()


def test_patches_need_not_wait_but_may_to_train_on_the_images_of_the_others(
    settings: Make, none_there: Facts
) -> None:
    words = MAKE + "--mask-method patches,four_channels"
    at_once = planned(settings(words), none_there)
    assert at_once["pretrain_patches_1"].settings["use_unmasked_images"] is True
    assert "use_unmasked_images" not in at_once["pretrain_four_channels_1"].settings
    alike = planned(settings(words + " --pretrain use_unmasked_images=false"), none_there)
    assert alike["pretrain_patches_1"].needs == ("generate_segments",)
    alone = planned(settings(MAKE + "--mask-method patches"), none_there)
    assert "generate_segments" not in alone


def test_shards_are_joined_before_anybody_reads_them(settings: Make, none_there: Facts) -> None:
    chosen = settings(MAKE + "--segment-shards 3 --launcher slurm")
    *shards, merge, pretrain, _ = planned(chosen, none_there).values()
    assert [step.options["shard"] for step in shards] == ["0/3", "1/3", "2/3"]
    for step in shards:
        assert step.needs == ()
        assert step.outputs == (Shard.parse(step.options["shard"]).name(step.options["out"]),)
        assert str(step.outputs[0]) in merge.command
    assert len({step.folder for step in shards}) == 3
    assert merge.needs == tuple(step.name for step in shards)
    assert merge.outputs == (none_there.making,)
    assert pretrain.needs == ("merge_segments",)


def test_a_generator_that_can_makes_only_what_is_near_the_ratios_of_the_plan(
    settings: Make, none_there: Facts
) -> None:
    def wanted(words: str) -> tuple[object, object]:
        step = planned(settings(f"--pretrain-epochs 1 {words}"), none_there)["generate_segments"]
        return step.options.get("for_coverage"), step.settings["for_coverage"]

    two = "--make-segments sam2-tiny --coverage-ratio 25,15 --mask-method patches,segments"
    assert wanted(two) == ([15.0, 25.0], [15.0, 25.0])
    assert wanted(two + ",segment_patches") == ([], [])
    assert wanted(MAKE) == (None, [15.0])


def test_where_the_model_comes_from_and_runs(
    settings: Make, none_there: Facts, tmp_path: Path
) -> None:
    def made_by(words: str) -> str:
        chosen = settings(f"--pretrain-epochs 1 --make-segments {words}")
        return " ".join(planned(chosen, none_there)["generate_segments"].command[3:])

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert made_by("sam2-tiny").startswith("masks generate sam2-tiny --images")
    assert f"masks generate sam --model {tmp_path}/model" in _sorted(made_by(f"{tmp_path}/model"))
    assert "masks generate sam --model facebook/sam-vit-base" in _sorted(
        made_by("facebook/sam-vit-base")
    )
    assert "--device cpu" in made_by("sam2-tiny")
    assert "--device cuda" in made_by("sam2-tiny --num-gpus 2")
    assert "--device" not in made_by("felzenszwalb")


def _sorted(command: str) -> str:
    """With --model first."""
    head, _, options = command.partition(" --")
    pairs = options.split(" --")
    return " --".join([head, *sorted(pairs, key=lambda pair: not pair.startswith("model "))])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nonsense", "is unknown; choose one of felzenszwalb, sam, sam2-tiny"),
        ("/nowhere/at/all", "is unknown"),
        ("{data}", "is a folder without a config.json"),
    ],
)
@pytest.mark.parametrize("are_there", [False, True])
def test_a_generator_that_there_is_not_is_refused_whether_it_is_needed_or_not(
    settings: Make, none_there: Facts, data: Path, name: str, said: str, are_there: bool
) -> None:
    chosen = settings(f"--pretrain-epochs 1 --make-segments {name.format(data=data)}")
    facts = replace(none_there, making=None) if are_there else none_there
    with pytest.raises(ValueError, match=said):
        planned(chosen, facts)


def test_where_segments_are_there_none_are_made(settings: Make, none_there: Facts) -> None:
    facts = replace(none_there, making=None)
    assert list(planned(settings(MAKE), facts)) == [
        *("pretrain_four_channels_1", "evaluate_four_channels_1"),
    ]


def test_nothing_is_made_for_what_is_done_and_a_later_round_waits(
    settings: Make, none_there: Facts
) -> None:
    chosen = settings(MAKE + "--pretrain-epochs 2 --eval-freq 1")
    rounds = [f"pretrain_four_channels_{epochs}" for epochs in (1, 2)]
    steps = with_segments(make_plan(chosen, none_there), chosen, none_there, rounds[:1])
    needs = {step.name: step.needs for step in steps}
    assert needs[rounds[0]] == ()
    assert needs[rounds[1]] == (rounds[0], "generate_segments")
    steps = with_segments(make_plan(chosen, none_there), chosen, none_there, rounds)
    assert all(step.kind != "generate" for step in steps)
