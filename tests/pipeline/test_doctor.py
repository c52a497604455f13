from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import doctor
from pipeline.doctor import Finding, examine, findings_text
from pipeline.segments import with_segments
from pipeline.settings import GROUPS, Compute, Parts, Settings
from tests.pipeline.programs import FACTS, plan_of


def to_fix(**groups: object) -> list[str]:
    given: Mapping[str, Any] = {name: group() for name, group in GROUPS.items()} | groups
    return [f.subject for f in examine(lambda: Settings(**given), given) if f.fix]


def test_a_machine_without_flags_is_examined() -> None:
    given = {name: group() for name, group in GROUPS.items()}
    subjects = [f.subject for f in examine(lambda: pytest.fail("no run was asked for"), given)]
    assert {"python", "torch", "devices", "processors", "memory"} <= set(subjects)


def test_more_gpus_than_there_are_is_found() -> None:
    assert to_fix(compute=Compute(num_gpus=64)) == ["devices"]


def test_more_workers_than_cores_is_found() -> None:
    given = {"compute": Compute(num_gpus=0), "parts": Parts(pretrain={"workers": 10_000})}
    assert to_fix(**given) == ["processors"]


def test_flags_of_a_run_that_would_be_refused_are_found(tmp_path: Any) -> None:
    assert to_fix(data=replace(GROUPS["data"](), in1k_dir=tmp_path)) == ["flags"]


def test_segments_that_the_plan_will_make_are_named(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = settings("--make-segments felzenszwalb --segment-shards 2 --pretrain-epochs 1")
    facts = replace(FACTS, making=tmp_path / "x.sqlite", generators={"felzenszwalb": []})
    steps = with_segments(plan_of(chosen), chosen, facts)
    monkeypatch.setattr(doctor, "checked_plan", lambda settings: steps)
    groups = {name: getattr(chosen, name) for name in GROUPS}
    found = {finding.subject: finding.text for finding in examine(lambda: chosen, groups)}
    assert found["segments"] == "make segments by felzenszwalb (3 steps)"


def test_what_to_fix_is_marked_with_its_remedy() -> None:
    found = [Finding("a", "good"), Finding("bb", "bad", fix="do it")]
    assert findings_text(found).splitlines() == [
        *("ok   a   good", "FIX  bb  bad", "         -> do it", "1 to fix"),
    ]
