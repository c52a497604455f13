"""What benchmark.py says of options that are a part's, in its own words; and scores of runs elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest

import benchmark
from common.step_files import checkpoint_path
from pipeline.plan.check import checked_plan
from pipeline.plan.settings import Settings
from pipeline.plan.steps import in_words_of_the_plan, make_plan
from segmenter.labels import _ranges
from segments.config import default_masks


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--mask-ratio", "0.6"],
            "--mask-ratio is no option here, but one of a part: --pretrain mask_ratio=0.6",
        ),
        (["--mask_ratio=0.6"], "but one of a part: --pretrain mask_ratio=0.6"),
        (["--lr", "1e-3"], "but one of a part: --finetune lr=1e-3"),
        (
            ["--workers", "--dry-run"],
            "--pretrain workers=... or --finetune workers=... or --probe workers=...",
        ),
        (["--sead", "1"], "No such option '--sead'"),
        (["--seed", "0", "1", "2"], "several values are given with commas: --seed 0,1,2"),
        (["--mask_method", "patches", "segments", "--dry-run"], "commas: --mask_method patches,segments"),
        (["--model", "vit_base", "vit_large"], "vit_large: no word stands alone here"),
    ],
)
def test_a_slip_of_the_command_line_is_told_what_to_write(words: list[str], said: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        benchmark.main.main(words, standalone_mode=False)
    assert said in caught.value.format_message()


def test_a_part_s_option_in_a_yaml_file_is_told_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "own.yml").write_text("mask-ratio: 0.6\n")
    with pytest.raises(
        ValueError, match=r"there is no 'mask_ratio', but one of a part: --pretrain mask_ratio="
    ):
        benchmark.main.main(["--config", str(tmp_path / "own.yml")], standalone_mode=False)


@pytest.mark.parametrize(
    ("said", "kind", "here"),
    [
        ("add --allow-missing-segments if", "pretrain", "add --pretrain allow_missing_segments=true if"),
        ("--effective-batch-size 4096: there", "pretrain", "--pretrain effective_batch_size=4096: there"),
        ("--batch-size 8 is", "evaluate", "--finetune batch_size=8 is"),
        ("Is that the right --masks-dir?", "pretrain", "Is that the right --masks-dir?"),
        ("use another --output-dir", "probe", "use another --output-dir"),
        ("--epochs 5", "pretrain", "--pretrain-epochs 5"),
        ("python -m mae pretrain --batch-size 8", "pretrain", "python -m mae pretrain --batch-size 8"),
    ],
)
def test_what_a_part_advises_is_said_as_benchmark_py_has_it(said: str, kind: str, here: str) -> None:
    assert in_words_of_the_plan(said, kind) == here


def test_one_wrong_part_does_not_hide_another(settings: Callable[..., Settings]) -> None:
    """The default batch is larger than this dataset; the evaluation data are wrong, too."""
    with pytest.raises(ValueError) as caught:
        checked_plan(
            settings("--mask-method patches --pretrain-epochs 1 --pretrain use_unmasked_images=true")
        )
    first, second = str(caught.value).splitlines()
    assert first == "--pretrain effective_batch_size=4096: there are images for at most 1"
    assert "dataset.yml" in second


def test_masks_sqlite_beside_the_images_is_found(tmp_path: Path) -> None:
    assert default_masks(tmp_path) == tmp_path / "masks"
    (tmp_path / "masks.sqlite").touch()
    assert default_masks(tmp_path) == tmp_path / "masks.sqlite"
    (tmp_path / "masks").mkdir()
    assert default_masks(tmp_path) == tmp_path / "masks"


def test_allowed_labels_are_told_as_ranges() -> None:
    assert _ranges(np.array([*range(11), 255])) == "0 to 10 and 255"
    assert _ranges(np.array([1, 3, 4, 9])) == "1, 3 to 4 and 9"
    assert _ranges(np.array([7])) == "7"


def test_pretrained_from_scores_what_is_there_and_pretrains_nothing(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "earlier/pretrain_output/patches"
    elsewhere.mkdir(parents=True)
    for epochs in (1, 2):
        checkpoint_path(elsewhere, epochs).touch()
    words = (
        f"--mask-method patches --pretrain-epochs 2 --eval-freq 1 --pretrained-from {tmp_path / 'earlier'}"
    )
    steps = make_plan(settings(f"{words} --probe-freq 1 --baselines untrained"))
    assert [step.name for step in steps] == [
        "probe_patches_1", "evaluate_patches_1", "probe_patches_2", "evaluate_patches_2",
    ]  # fmt: skip
    assert [step.config.run.init for step in steps if step.kind == "evaluate"] == [
        checkpoint_path(elsewhere, 1), checkpoint_path(elsewhere, 2),
    ]  # fmt: skip
    assert all(step.folder.is_relative_to(tmp_path / "out") and not step.needs for step in steps)
    with pytest.raises(ValueError, match=r"there are those after epochs 1, 2"):
        checked_plan(settings(words.replace("--eval-freq 1", "--eval-epochs 0")))
    with pytest.raises(ValueError, match="is not the output directory of a run"):
        settings(f"--pretrained-from {elsewhere}")
