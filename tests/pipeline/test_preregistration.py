"""A plan is frozen once, a change of it is seen, and what deviates from it is told."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.plan import preregistration
from pipeline.plan.layout import Layout
from pipeline.plan.machine import code_digest
from pipeline.plan.preregistration import (
    Made,
    deviations,
    names_of_runs,
    of_records,
    of_steps,
    parse_primary,
    read_frozen,
    write_frozen,
)
from pipeline.plan.records import Record, read_all_records, write_record
from pipeline.plan.settings import Settings
from pipeline.plan.steps import make_plan
from pipeline.report.answer import answers
from pipeline.report.page import frozen_question, write_all
from pipeline.report.scores import make_lines
from pipeline.report.tables import results_csv
from tests.pipeline.finished_run import write_run
from tests.pipeline.programs import run_benchmark
from tests.pipeline.test_report import text_of
from tests.pipeline.whole_run import write_inputs

Make = Callable[..., Settings]
CALL = (
    "--mask-method patches,segments --segments-from own,blob --seed 0,1,2 --pretrain-epochs 10 --eval-freq 5"
)


@pytest.fixture
def frozen_run(settings: Make, tmp_path: Path) -> Layout:
    """A plan for three lines and three seeds, of which segments-patches is asked for; nothing is run."""
    chosen = settings(CALL)
    write_frozen(Layout(chosen.data.output_dir), chosen, make_plan(chosen), "segments-patches")
    return Layout(chosen.data.output_dir)


def test_what_is_written_is_what_was_planned_and_the_last_line_its_digest(
    settings: Make, frozen_run: Layout
) -> None:
    text = frozen_run.preregistration.read_text()
    *above, last = text.splitlines(keepends=True)
    assert last == f"digest: {hashlib.sha256(''.join(above).encode()).hexdigest()}\n"
    content = yaml.safe_load(text)
    assert content["question"] == [{"first": "segments", "second": "patches"}]
    assert (content["measure"], content["seeds"], content["budget"]) == ("finetuning", [0, 1, 2], "epochs=10")
    assert content["correction"] == "Holm over 1 at 5%"
    frozen = read_frozen(frozen_run)
    assert frozen is not None and not frozen.is_changed
    for step in make_plan(settings(CALL)):
        assert frozen.settings_of(step.name) == {**step.settings}
    assert deviations(frozen, of_steps(make_plan(settings(CALL)))) == []


def test_a_plan_is_frozen_once_and_before_its_run(settings: Make, frozen_run: Layout, tmp_path: Path) -> None:
    chosen = settings(CALL)
    before = frozen_run.preregistration.read_bytes()
    with pytest.raises(ValueError, match="a plan is frozen once"):
        write_frozen(frozen_run, chosen, make_plan(chosen), "segments-patches")
    assert frozen_run.preregistration.read_bytes() == before
    late = settings(CALL, tmp_path / "late")
    steps = make_plan(late)
    write_record(Layout(late.data.output_dir), Record.of(steps[0], "done", None))
    with pytest.raises(ValueError, match="1 steps are done already"):
        write_frozen(Layout(late.data.output_dir), late, steps, "segments-patches")


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("segments\n", "patches\n", 1), lambda t: f"\n{t}", lambda t: t[1:],
               lambda t: t.replace("- 2\n", ""), lambda t: t.replace("digest: ", "digest: 0")],
)  # fmt: skip
def test_any_change_of_the_file_is_seen(frozen_run: Layout, change: Callable[[str], str]) -> None:
    text = frozen_run.preregistration.read_text()
    frozen_run.preregistration.write_text(change(text))
    try:
        frozen = read_frozen(frozen_run)
    except ValueError as error:
        assert "damaged" in str(error) or "is not YAML" in str(error)
    else:
        assert frozen is not None and frozen.is_changed
        assert "preregistration.yml was changed" in deviations(frozen, {})[0]


def test_other_settings_seeds_code_and_images_deviate(
    settings: Make, frozen_run: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = read_frozen(frozen_run)
    assert frozen is not None
    other = f"{CALL.replace('0,1,2', '0,1,2,3')} --finetune lr=0.5"
    said = " ".join(deviations(frozen, of_steps(make_plan(settings(other)))))
    assert "lr: 0.001 -> 0.5 (evaluate_patches_5, " in said
    assert "not in the plan (pretrain_patches-seed3_5" in said
    assert "segments-blob-seed3" not in said, "a line that nothing is asked of"
    planned = of_steps(make_plan(settings(CALL)))
    name = "pretrain_patches_10"
    made = {name: planned[name]._replace(code="0" * 16)}
    assert deviations(frozen, made) == [f"code: {code_digest()} -> {'0' * 16} ({name})"]
    with_images = replace(frozen, content={**frozen.content, "images": {"pretrain": "a" * 16}})
    made = {name: planned[name]._replace(images="b" * 16)}
    assert deviations(with_images, made) == [f"images: {'a' * 16} -> {'b' * 16} ({name})"]
    late = {name: planned[name]._replace(started=time.time() - 3600)}
    told = deviations(frozen, late, is_over=True)
    assert f"begun before the plan was written ({name})" in told
    assert any(one.startswith(f"not done, of {len(planned)} steps (pretrain_patches_5, ") for one in told)


def test_digests_of_code_follow_the_sources_and_a_plugin(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text("a = 1\n")
    first = code_digest(plugin)
    assert first != code_digest() == code_digest()
    code_digest.cache_clear()
    plugin.write_text("a = 2\n")
    assert code_digest(plugin) != first


def test_a_record_keeps_what_code_and_images_it_was_made_by(settings: Make, tmp_path: Path) -> None:
    class Facts:
        digest = "f" * 16

    step = replace(make_plan(settings(CALL))[0], facts=Facts)  # type: ignore[arg-type]
    running = Record.of(step, "running", None)
    assert (running.code, running.images) == (code_digest(), "f" * 16)
    again = Record.of(replace(step, facts=None), "done", running)
    assert again.images == "f" * 16
    paths = Layout(tmp_path)
    write_record(paths, again)
    assert of_records(read_all_records(paths))[step.name] == Made(step.settings, "f" * 16, code_digest())


def test_names_may_hold_dashes_and_have_to_be_lines_of_the_plan(settings: Make) -> None:
    names = names_of_runs(make_plan(settings(CALL)))
    assert names == ["patches", "segments", "segments-blob"]
    assert parse_primary("segments-segments-blob", names) == [("segments", "segments-blob")]
    assert parse_primary("segments-patches, segments-blob-segments", names) == [
        ("segments", "patches"), ("segments-blob", "segments"),
    ]  # fmt: skip
    for wrong in (
        "",
        "segments",
        "segments-green_patches",
        "patches-patches",
        "segments-patches-patches",
        "-",
    ):
        with pytest.raises(ValueError, match="two different of patches, segments, segments-blob"):
            parse_primary(wrong, names)
    with pytest.raises(ValueError, match="names one twice"):
        parse_primary("segments-patches,segments-patches", names)


# The report ---------------------------------------------------------------------------------------


@pytest.fixture
def reported(frozen_run: Layout, tmp_path: Path) -> Layout:
    """A finished run of these lines, with that plan."""
    text = frozen_run.preregistration.read_text()
    paths = write_run(
        tmp_path / "run", ("patches", "segments"), seeds=(0, 1, 2), chance=0.05, sources=("own", "blob"),
        epochs=(5, 10), probes=True,
    )  # fmt: skip
    paths.preregistration.write_text(text)
    return paths


def test_only_what_was_asked_for_is_confirmatory(reported: Layout) -> None:
    reported.record("evaluate_segments-seed2_10").unlink()
    lines = make_lines([reported])
    question, told = frozen_question([reported], lines)
    found = answers(lines, question)
    by_plan = {c.plan: [] for one in found for c in one.comparisons}
    for one in found:
        for c in one.comparisons:
            by_plan[c.plan].append((one.measure.words, c.first.label, c.second.label, c.state))
    assert by_plan["confirmatory"] == [("complete finetuning", "segments 15%", "patches", "better")]
    assert {state for *_, state in by_plan["exploratory"]} <= {"higher", "lower", "none"}
    # It is corrected for nothing but what else was asked for.
    [asked] = [c for c in found[0].comparisons if c.plan == "confirmatory"]
    assert asked.family == 1
    assert "a plan was frozen on" in told[0]
    assert any("steps (evaluate_segments-seed2_10)" in one for one in told)
    assert any(re.search(r": epochs: \d+ -> 6 \(evaluate_patches", one) for one in told), told
    rows = list(csv.DictReader(io.StringIO(results_csv(lines, found))))
    plans = {row["plan"] for row in rows if row["row"] == "difference"}
    assert plans == {"confirmatory", "exploratory"}
    write_all(reported)
    words = text_of(reported.report_html)
    assert "Asked for beforehand: segments 15% against patches +" in words
    assert "Deviation from the plan: " in words


def test_a_difference_that_no_report_would_compare_is_compared_when_it_was_asked_for(
    reported: Layout, settings: Make
) -> None:
    reported.preregistration.unlink()
    chosen = settings(CALL, reported.root)
    records = reported.records.rename(reported.root / "aside")
    write_frozen(reported, chosen, make_plan(chosen), "segments-blob-patches")
    records.rename(reported.records)
    lines = make_lines([reported])
    found = answers(lines, frozen_question([reported], lines)[0])[0]
    first = found.comparisons[0]
    assert (first.first.label, first.second.label) == ("segments 15% blob", "patches")
    assert (first.plan, first.seeds) == ("confirmatory", 3)


def test_a_plan_that_was_changed_makes_nothing_confirmatory(reported: Layout) -> None:
    text = reported.preregistration.read_text()
    reported.preregistration.write_text(text.replace("Holm over 1", "Holm over 2"))
    lines = make_lines([reported])
    question, told = frozen_question([reported], lines)
    found = answers(lines, question)
    assert {c.plan for one in found for c in one.comparisons} == {"exploratory"}
    assert "Deviation from the plan: preregistration.yml was changed after it was written" in told


def test_without_a_plan_nothing_is_said_of_one(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=(0, 1, 2))
    lines = make_lines([paths])
    assert frozen_question([paths], lines) == (None, [])
    assert {c.plan for one in answers(lines) for c in one.comparisons} == {""}


def test_freeze_then_dry_run_then_a_changed_plan(tmp_path: Path) -> None:
    config, out = write_inputs(tmp_path / "data"), tmp_path / "out"
    call = (
        "--config",
        config,
        "--output-dir",
        out,
        "--mask-method",
        "patches,green_patches",
        "--eval-freq",
        "2",
    )
    call = (*call, "--budget", "flops=patches@2")
    done = run_benchmark("freeze", *call, "--primary", "green_patches-patches")
    assert done.returncode == 0, done.stderr
    content = yaml.safe_load((out / "preregistration.yml").read_text())
    assert done.stdout.splitlines()[-1] == f"digest {content['digest']}"
    assert set(content["images"]) == {"pretrain", "evaluate"}
    same = run_benchmark(*call, "--dry-run")
    assert "not as in preregistration.yml" not in same.stderr
    other = run_benchmark(*call, "--seed", "0,1", "--dry-run")
    assert "not as in preregistration.yml: not in the plan (pretrain_patches-seed1_2" in other.stderr
    text = (out / "preregistration.yml").read_text()
    (out / "preregistration.yml").write_text(text.replace("flops=patches@2", "flops=patches@3"))
    refused = run_benchmark(*call, "--dry-run")
    assert refused.returncode == 2
    assert "was changed after it was written: put it back as it was" in refused.stderr
    assert preregistration.read_frozen(Layout(tmp_path)) is None
