"""--budget: each method its own epochs, of equal cost, and a report that compares them so."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.schedule import BatchPlan
from mae.config import PretrainConfig, make_method, training_flops
from pipeline.launch import estimate
from pipeline.launch.estimate import estimate_run, with_hours
from pipeline.plan import records
from pipeline.plan.layout import Layout
from pipeline.plan.preregistration import write_frozen
from pipeline.plan.records import Record, differences, read_spends, write_record, write_run_files
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from pipeline.report.answer import answers
from pipeline.report.page import write_all
from pipeline.report.scores import make_lines
from pipeline.report.tables import spent
from tests.pipeline.finished_run import write_run
from tests.pipeline.test_report import text_of

Make = Callable[..., Settings]
METHODS = ("patches", "green_patches", "segment_patches", "four_channels", "preencoder")
FLOPS = f"--budget flops=patches@40 --mask-method {','.join(METHODS)} --eval-freq 10"


def pretrainings(settings: Settings) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {}
    for step in make_plan(settings):
        if step.kind == "pretrain":
            found.setdefault(step.run, []).append(step)
    return found


def flops_of(config: PretrainConfig) -> float:
    return training_flops(config.model, make_method(config.method, config.model))


def config_of(step: Step) -> PretrainConfig:
    assert isinstance(step.config, PretrainConfig)
    return step.config


@pytest.mark.parametrize("images", [97, 1000, 1_281_167])
@pytest.mark.parametrize("model", ["vit_tiny", "vit_large"])
def test_budgets_are_equal_within_one_optimizer_step(settings: Make, model: str, images: int) -> None:
    spent, steps = {}, {}
    for run, of_run in pretrainings(settings(f"{FLOPS} --model {model}")).items():
        config = config_of(of_run[-1])
        plan = BatchPlan(
            num_images=images, effective_batch_size=32, processes=1, micro_batch_size=32, seed=0,
            end=config.optimisation.end,
        )  # fmt: skip
        count = sum(plan.steps_in(epoch) for epoch in range(config.optimisation.epochs))
        steps[run] = 32 * flops_of(config)
        spent[run] = count * steps[run]
    assert {run: spent[run] for run in METHODS[:3]} == dict.fromkeys(METHODS[:3], spent["patches"])
    for run in METHODS[3:]:
        assert abs(spent[run] - spent["patches"]) <= steps[run]


def test_each_method_has_its_own_schedule_and_rounds_at_the_same_shares(settings: Make) -> None:
    found = pretrainings(settings(f"{FLOPS} --model vit_large"))
    ends = {run: config_of(of_run[-1]).optimisation.end for run, of_run in found.items()}
    assert ends["patches"] == ends["green_patches"] == 40
    cost = flops_of(config_of(found["four_channels"][0])) / flops_of(config_of(found["patches"][0]))
    assert ends["four_channels"] == pytest.approx(40 / cost, abs=1e-6)
    assert 3 < cost < 3.4, "as the page on the question says"
    for run, of_run in found.items():
        assert {config_of(step).optimisation.end for step in of_run} == {ends[run]}
        shares = [step.epochs / ends[run] for step in of_run]
        assert all(
            abs(s - at) * ends[run] <= 0.5 for s, at in zip(shares[:-1], (0.25, 0.5, 0.75), strict=True)
        )
        assert of_run[-1].epochs == math.ceil(ends[run])
    # A score belongs to the checkpoint of its round.
    scored = {step.name for step in make_plan(settings(FLOPS)) if step.kind == "evaluate"}
    made = {
        s.name.replace("pretrain", "evaluate") for s in make_plan(settings(FLOPS)) if s.kind == "pretrain"
    }
    assert scored == made


def test_epochs_are_what_they_were(settings: Make) -> None:
    same = [s.command for s in make_plan(settings("--pretrain-epochs 6 --eval-freq 3"))]
    assert [s.command for s in make_plan(settings("--budget epochs=6 --eval-freq 3"))] == same
    step = make_plan(settings("--budget epochs=6"))[0]
    assert "budget" not in step.settings
    assert config_of(step).data.use_unmasked_images is False


def test_equal_budgets_are_of_equal_images(settings: Make, data: Path) -> None:
    shutil.rmtree(data / "in1k/masks")
    call = "--make-segments felzenszwalb --mask-method patches,segments --budget flops=patches@4"
    assert not any(config_of(s[0]).data.use_unmasked_images for s in pretrainings(settings(call)).values())
    with pytest.raises(ValueError, match="methods on the same images"):
        make_plan(settings(f"{call} --pretrain use_unmasked_images=true"))


def done(steps: list[Step], paths: Layout) -> None:
    for step in steps:
        step.folder.mkdir(parents=True, exist_ok=True)
        write_record(paths, Record.of(step, "done", None))


def test_methods_of_one_budget_share_a_directory_and_another_budget_is_refused(
    settings: Make, tmp_path: Path
) -> None:
    paths, call = Layout(tmp_path / "out"), "--budget flops=patches@8 --eval-freq 8 --mask-method"
    done(make_plan(settings(f"{call} patches")), paths)
    assert differences(make_plan(settings(f"{call} patches,four_channels")), paths) == []
    other = "--budget flops=patches@9 --eval-freq 9 --mask-method four_channels"
    assert "budget: flops=patches@8, segments not counted -> flops=patches@9," in " ".join(
        differences(make_plan(settings(other)), paths)
    )
    alone = "--pretrain-epochs 5 --eval-freq 5 --mask-method four_channels"
    assert "epochs: 8 -> 5" in " ".join(differences(make_plan(settings(alone)), paths))


COST = {"setup_seconds": 5.0, "evaluation_seconds": 4.0, "evaluations": 8, "epochs": 4, "epoch_seconds": 10.0}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that were timed: an epoch of four_channels takes three times that of patches."""
    found: list[str] = []

    def answer(command: list[str], step: Step) -> Mapping[str, float]:
        if step.kind == "generate":
            return {"seconds": 1800.0, "bytes": 1.0}
        method = step.settings.get("mask_method", step.kind)
        found.append(method)
        return COST | {"epoch_seconds": 46.0 if method == "four_channels" else 10.0}

    monkeypatch.setattr(estimate, "_asked", answer)
    return found


def test_hours_are_those_of_timed_steps_once_for_a_directory(settings: Make, timed: list[str]) -> None:
    chosen = settings("--budget gpu-hours=1 --eval-freq 50 --mask-method patches,four_channels")
    # An epoch takes 10 or 46 seconds, and twice 4 for the held-out images.
    known = with_hours(chosen)
    assert known.ends == {"patches": 200, "four_channels": round(3600 / 54, 6)}
    steps = make_plan(known)
    assert [s.epochs for s in steps if s.run == "four_channels"] == [33, 33, 67, 67]
    paths = Layout(chosen.data.output_dir)
    write_run_files(known, steps, paths)
    timed.clear()
    done(steps, paths)
    assert with_hours(chosen).ends == known.ends
    assert differences(make_plan(with_hours(chosen)), paths) == [], "to the last digit"
    assert timed == [], "else the same command would go on with other epochs"
    more = settings("--budget gpu-hours=1 --mask-method patches,segments")
    assert with_hours(more).ends == {"patches": 200, "segments": 200}
    assert timed == ["segments"]
    assert with_hours(settings("--budget gpu-hours=2")).ends["four_channels"] == round(7200 / 54, 6)


def test_a_frozen_plan_keeps_the_hours_that_were_timed_for_it(settings: Make, timed: list[str]) -> None:
    chosen = settings("--budget gpu-hours=1 --eval-freq 50 --mask-method patches,four_channels")
    known, paths = with_hours(chosen), Layout(chosen.data.output_dir)
    write_frozen(paths, known, make_plan(known), "four_channels-patches")
    timed.clear()
    assert with_hours(chosen).ends == known.ends
    assert timed == []
    paths.preregistration.write_text(paths.preregistration.read_text().replace("epochs: 200", "epochs: 2"))
    assert with_hours(chosen).ends == known.ends
    assert timed == ["patches", "four_channels"], "what was changed tells nothing"


def test_making_segments_is_part_of_the_hours_where_it_is_asked_for(
    settings: Make, timed: list[str], data: Path
) -> None:
    call = "--budget gpu-hours=1 --count-segments --mask-method patches,four_channels"
    with pytest.raises(ValueError, match="nobody knows what the segments cost"):
        with_hours(settings(call))
    shutil.rmtree(data / "in1k/masks")
    chosen = settings(f"{call} --make-segments felzenszwalb")
    assert with_hours(chosen).ends == {"patches": 200, "four_channels": round(1800 / 54, 6)}
    made = Record(name="generate_segments", state="done", run="segments", kind="generate", fingerprint={})
    write_record(Layout(chosen.data.output_dir), replace(made, seconds=900))
    assert with_hours(chosen).ends["four_channels"] == 2700 / 54
    step = make_plan(with_hours(chosen))[0]
    assert step.settings["budget"] == "gpu-hours=1, segments counted"
    write_record(Layout(chosen.data.output_dir), replace(made, seconds=9000))
    with pytest.raises(ValueError, match=r"that is -100 epochs of four_channels"):
        with_hours(chosen)


def test_the_estimate_says_where_flops_and_hours_disagree(
    settings: Make, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Facts:
        plan = BatchPlan(num_images=8, effective_batch_size=4, processes=1, micro_batch_size=4, seed=0)
        train = val = checkpoint_bytes = model_bytes = 1

    def checked(chosen: Settings) -> list[Step]:
        return [replace(step, facts=Facts) for step in make_plan(chosen)]  # type: ignore[arg-type]

    monkeypatch.setattr(estimate, "checked_plan", checked)
    monkeypatch.setattr(estimate, "PretrainFacts", type)
    methods = "patches,green_patches,four_channels,segments"
    said = estimate_run(settings(f"--budget flops=patches@40 --mask-method {methods}"))
    _, table = said.split("to the end of its schedule:\n")
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert list(rows) == ["method", *methods.split(",")]
    assert rows["patches"].split()[1] == "40"
    assert rows["green_patches"].endswith("x 1.00    x 1.00")
    assert rows["four_channels"].endswith("x 3.25    x 3.00"), "8%: no more than timing tells"
    assert rows["segments"].endswith("x 1.00  they disagree")


# The report ---------------------------------------------------------------------------------------


def with_budget(
    paths: Layout, ends: Mapping[str, float], *, parts: int, asked: str = "flops=patches@10"
) -> None:
    """As if the run had had one."""
    content = yaml.safe_load(paths.run_yml.read_text())
    methods = {name: {"end": end, "flops_per_step": 3e16} for name, end in ends.items()}
    content["budget"] = {
        "asked": asked, "parts": parts, "count_segments": False, "methods": methods,
    }  # fmt: skip
    paths.run_yml.write_text(yaml.safe_dump(content))


@pytest.fixture
def bound(tmp_path: Path) -> Layout:
    """patches to epoch 10, segments to 4.2, whose FLOPs are 2.4 times as many."""
    paths = write_run(tmp_path / "run", ("patches",), epochs=(5, 10), seeds=(0, 1, 2), chance=0.2)
    other = write_run(tmp_path / "other", ("segments",), epochs=(2, 5), seeds=(0, 1, 2), chance=0.2)
    for name in ("pretrain_output", "eval_output", ".segmae/steps"):
        for path in (other.root / name).glob("*segments*"):
            shutil.move(path, paths.root / name / path.name)
    with_budget(paths, {"patches": 10.0, "segments": 4.2}, parts=10)
    return paths


def test_the_report_compares_equal_budgets_first_and_equal_epochs_where_they_are(bound: Layout) -> None:
    first, *others = answers(make_lines([bound]))
    assert first.ends == {"scratch": 0, "patches": 10, "segments 15%": 5}
    assert [one.where for one in others] == ["equal epochs"]
    assert others[0].ends["patches"] == others[0].ends["segments 15%"] == 5
    assert {c.is_first_look for c in first.comparisons} == {True}
    assert {c.is_first_look for c in others[0].comparisons} == {False}
    write_all(bound)
    words = text_of(bound.report_html)
    assert (
        "Compared at equal shares of the budget, each by its own schedule: flops=patches@10, segments not"
        in words
    )
    assert "After 5 epochs of each: there they have spent different amounts" in words


def test_the_page_has_what_each_line_spent(bound: Layout) -> None:
    lines = make_lines([bound])
    table = spent(lines, answers(lines)[0])
    rows: Any = {row["method"]: row for row in table["table"].rows}
    # 3e17 FLOPs an epoch, 2.4 times as many of segments: 5 epochs of its log are 3.6e18.
    assert (rows["patches"]["epochs"], rows["patches"]["optimizer steps"]) == ("10", "100")
    assert rows["segments 15%"]["epochs"] == "4.2"
    assert rows["segments 15%"]["own steps more than patches"] == f"{(3.6e18 - 3e18) / 3e16:+.2f}"
    write_all(bound)
    assert "What each line spent" in text_of(bound.report_html)


def test_before_the_end_equal_shares_are_compared(bound: Layout) -> None:
    for folder in bound.eval_output.glob("patches*_10"):
        shutil.rmtree(folder)
    lines = make_lines([bound])
    # Half of the budget: after 5 of 10 epochs, and after 2 of 4.2.
    assert answers(lines)[0].ends == {"scratch": 0, "patches": 5, "segments 15%": 2}


def test_what_run_yml_says_of_the_budget_is_judged_where_it_is_read(bound: Layout) -> None:
    assert read_spends(bound) is not None
    text = bound.run_yml.read_text()
    bound.run_yml.write_text(re.sub(r"end: 4\.2", "end: -1", text))
    with pytest.raises(ValueError, match=r"run\.yml is damaged: budget"):
        write_all(bound)
    assert records.read_spends(Layout(bound.root.parent / "nowhere")) is None
