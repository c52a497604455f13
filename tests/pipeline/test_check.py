"""What is judged before any work, in this process, and what the parts are asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from mae import listing
from pipeline.plan import check
from pipeline.plan.check import Question, ask, checked_plan
from pipeline.plan.settings import Settings
from segmenter.check import ScoringFacts
from tests.pipeline.whole_run import write_inputs

METHODS = "--mask-method patches,segments,segment_patches --segments-from own,borrowed --seed 0,1"


@pytest.fixture
def tiny(settings: Callable[..., Settings], tmp_path: Path) -> Callable[[str], Settings]:
    """Settings of a plan that could be run; its segments are not packed."""
    config = write_inputs(tmp_path / "tiny")
    paths = {"in1k-dir": "in1k", "eval-dataset": "segmentation/dataset.yml"}
    words = [f"--{flag} {tmp_path / 'tiny' / path}" for flag, path in paths.items()]
    return lambda more: settings(f"--config {config} {' '.join(words)} {more}")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that a check starts, none of which is run."""
    found: list[str] = []

    def note(questions: Iterable[Question]) -> list[str]:
        found.extend(" ".join(command[2:]) for command, _ in questions)
        return []

    monkeypatch.setattr(check, "ask", note)
    return found


def test_a_new_plan_lists_each_dataset_once_and_starts_no_process(
    tiny: Callable[[str], Settings], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    walked, read = [], []
    open_images, whole_dataset = listing.open_images, check.segmenter.check.read_description
    monkeypatch.setattr(listing, "open_images", lambda f, d: walked.append(f.name) or open_images(f, d))
    monkeypatch.setattr(
        check.segmenter.check,
        "read_description",
        lambda path: read.append(path.name) or whole_dataset(path),
    )
    steps = checked_plan(tiny(METHODS + " --pretrain-epochs 4 --eval-freq 1 --probe-freq 1"))
    assert len(steps) == 1 + (2 + 4 + 4) * 4 * 3
    assert (sorted(walked), read) == (["train", "val"], ["dataset.yml"])
    assert asked == []
    facts = {step.kind: step.facts for step in steps}
    assert (facts["pretrain"].train, facts["pretrain"].left_out) == (11, 1)
    assert isinstance(facts["evaluate"], ScoringFacts) and facts["evaluate"].checkpoint_bytes
    assert facts["pack"] is None


def test_a_checkpoint_that_is_there_is_asked_about_once_by_each_part(
    tiny: Callable[[str], Settings], asked: list[str], tmp_path: Path
) -> None:
    official = tmp_path / "mae.pth"
    official.write_text("x")
    call = f"{METHODS} --stack --mae-checkpoint {official} --baselines mae --pretrain-epochs 1"
    checked_plan(tiny(call))
    assert [command.split()[0] for command in asked] == ["segmenter", "mae"]
    assert all(command.endswith("--dry-run check") for command in asked)


def test_torch_is_never_loaded_for_a_new_plan(tmp_path: Path) -> None:
    config = write_inputs(tmp_path / "tiny")
    program = (
        "import sys, benchmark\n"
        f"sys.argv[1:] = ['--config', {str(config)!r}, '--output-dir', {str(tmp_path / 'out')!r},"
        " '--mask-method', 'patches,segments', '--probe-freq', '1', '--dry-run']\n"
        "try:\n    benchmark.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'mmseg', 'timm', 'accelerate'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_each_reason_of_parts_that_refuse_is_said_once() -> None:
    refuses: Question = [sys.executable, "-c", "import sys; sys.exit('Error: no')"], {}
    with pytest.raises(ValueError, match=r"^no$"):
        ask([refuses, refuses])
