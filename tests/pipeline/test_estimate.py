from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline.launch import estimate
from pipeline.launch.estimate import step_seconds, timings, wall_seconds
from pipeline.plan.segments import with_segments
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from segmenter.check import ScoringFacts

Make = Callable[..., Settings]
COST = {
    "pretrain": {
        "setup_seconds": 5, "epoch_seconds": 9, "evaluation_seconds": 1, "evaluations": 4,
        "epochs": 4,
    },
    "evaluate": {
        "setup_seconds": 1, "epoch_seconds": 2, "evaluation_seconds": 30, "evaluations": 3,
        "epochs": 6,
    },
}  # fmt: skip


def seconds_of(steps: list[Step]) -> dict[str, float]:
    return step_seconds(steps, timings(steps))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were timed, of a plan whose parts answer at once."""
    found: list[str] = []

    def answer(command: list[str], step: Step) -> dict[str, float]:
        found.append(step.name)
        return COST[step.kind]

    monkeypatch.setattr(estimate, "_asked", answer)
    return found


def test_costs_are_set_up_epochs_and_evaluations(settings: Make, timed: list[str]) -> None:
    steps = make_plan(settings("--pretrain-epochs 4 --eval-epochs 1,4"))
    assert seconds_of(steps) == {
        "pretrain_four_channels_1": 5 + 10,
        "evaluate_four_channels_1": 1 + 6 * 2 + 3 * 30,
        "pretrain_four_channels_4": 5 + 3 * 10,
        "evaluate_four_channels_4": 1 + 6 * 2 + 3 * 30,
    }


def test_a_probe_looks_once_at_the_training_images_and_at_the_others(
    settings: Make, timed: list[str]
) -> None:
    steps = make_plan(settings("--pretrain-epochs 4 --eval-freq 4 --probe-freq 2"))
    steps = [replace(step, facts=ScoringFacts(train=40, val=10)) for step in steps]
    found = seconds_of(steps)
    assert found["probe_four_channels_2"] == found["probe_four_channels_4"] == 1 + (1 + 4) * 30


def test_of_probes_alone_one_is_timed(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(command: list[str], step: Step) -> dict[str, float]:
        asked.append((step.name, command[-2:]))
        return COST.get(step.kind, {"setup_seconds": 2, "evaluation_seconds": 30})

    monkeypatch.setattr(estimate, "_asked", answer)
    steps = make_plan(settings("--pretrain-epochs 4 --eval-freq 0 --probe-freq 2"))
    found = seconds_of([replace(step, facts=ScoringFacts(train=40, val=10)) for step in steps])
    assert asked == [
        (name, ["--dry-run", "time"]) for name in ("pretrain_four_channels_2", "probe_four_channels_2")
    ]
    assert found["probe_four_channels_4"] == 2 + (1 + 4) * 30


def test_making_segments_is_priced_and_what_reads_them_timed_without(
    settings: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(data / "in1k/masks")
    words = "--make-segments sam --segment-shards 4 --pretrain-epochs 4 --eval-freq 4"
    chosen = settings(f"{words} --mask-method patches,segments,segment_patches")
    steps, asked = with_segments(make_plan(chosen), chosen), {}
    monkeypatch.setattr(estimate, "checked_plan", lambda settings: steps)

    def answer(command: list[str], step: Step) -> dict[str, float]:
        asked[step.name] = " ".join(command[3:])
        return COST.get(step.kind, {"seconds": 40 * 3600, "bytes": 3 * 2**30})

    monkeypatch.setattr(estimate, "_asked", answer)
    text = estimate.estimate_run(chosen)
    generated, patches, _, segments, segment_patches = asked.values()
    assert "--shard 0/1" in generated and generated.endswith("--estimate --json")
    for timed in (patches, segments, segment_patches):  # that need no segments
        assert "--mask-method" not in timed and "--use-unmasked-images" in timed
        # As many tokens are encoded: all, or those that the method leaves.
        assert ("--mask-ratio 0.0" in timed) == (timed == segments)
    assert "generate_segments_3-of-4" in text
    assert "10.00" in text
    assert "about 6.0 GiB at the peak" in text


def test_the_price_is_what_the_generator_itself_says_and_nothing_is_written(
    settings: Make, data: Path
) -> None:
    shutil.rmtree(data / "in1k/masks")
    chosen = settings("--make-segments felzenszwalb --pretrain-epochs 1 --mask-method segments")
    making = with_segments(make_plan(chosen), chosen)[0]
    for path in (data / "in1k/train").rglob("*.*"):
        path.unlink()
    for number in range(3):
        picture = Image.effect_noise((40, 30), 60).convert("RGB")
        picture.save(data / f"in1k/train/added_{number}.png")
    price = estimate._price_of_segments(making)
    assert price["images"] == 3
    assert price["seconds"] > 0
    assert price["bytes"] > 0
    assert not (data / "in1k/masks").exists()


def test_each_method_is_timed_once(settings: Make, timed: list[str]) -> None:
    call = "--mask-method patches,segments --seed 0,1 --pretrain-epochs 2"
    seconds_of(make_plan(settings(call)))
    assert timed == ["pretrain_patches_2", "evaluate_patches_2", "pretrain_segments_2"]


def test_evaluations_beside_pretraining_take_no_time_of_their_own(settings: Make) -> None:
    steps = make_plan(settings("--pretrain-epochs 2 --eval-freq 1"))
    seconds = {step.name: 10.0 for step in steps}
    assert wall_seconds(steps, seconds, overlaps=False) == 40
    assert wall_seconds(steps, seconds, overlaps=True) == 30


def test_ten_finetunings_on_eight_gpus_are_two_waves_after_pretraining(settings: Make) -> None:
    call = "--pretrain-epochs 10 --eval-freq 1"
    shared = make_plan(settings(f"{call} --num-gpus 8"))
    hours = {"pretrain": 0.25, "evaluate": 2.0}
    seconds = {step.name: hours[step.kind] for step in shared}
    assert wall_seconds(shared, seconds, overlaps=True) == 10 * 0.25 + 2 * 2.0
    kept = make_plan(settings(f"{call} --num-gpus 8 --eval-gpus 6,7"))
    # Two lanes of five: the first starts with the first checkpoint, the second with the next.
    assert wall_seconds(kept, seconds, overlaps=True) == 0.25 + 0.25 + 5 * 2.0
    pairs = make_plan(settings(f"{call} --num-gpus 8 --gpus-per-eval 2"))
    assert wall_seconds(pairs, seconds, overlaps=True) == 10 * 0.25 + 3 * 2.0  # 4, 4, 2


def test_the_estimate_says_what_running_beside_each_other_gains(
    settings: Make, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "checked_plan", make_plan)
    said = estimate.estimate_run(settings("--pretrain-epochs 4 --eval-freq 2 --num-gpus 2"))
    # two rounds of 5 + 2 x 10 seconds; two finetunings of 1 + 6 x 2 + 3 x 30 at once
    assert "wall time: 2 min 33 s (0.04 h); one step after another it would be 4 min 16 s" in said
    assert f"device-hours: {(2 * 50 + 2 * 103) / 3600:.2f}" in said
