"""Which weights go once they are scored, that what is gone counts as done, and what all take."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import benchmark
from common.options import Layer, make_all
from common.step_files import BEST, CHECKPOINT, LAST
from mae.config import ModelConfig
from pipeline.launch.local import LocalLauncher
from pipeline.launch.slurm import StepJob
from pipeline.launch.view import disk_text
from pipeline.plan.check import checked_plan
from pipeline.plan.keep import Expiring, disk_bytes, expiring, remove_expired
from pipeline.plan.layout import Layout
from pipeline.plan.records import is_done, read_record
from pipeline.plan.settings import GROUPS, Keep, Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from segmenter.check import ScoringFacts
from tests.pipeline.programs import REPO_ROOT, standin

pytestmark = pytest.mark.slow

Make = Callable[..., Settings]
# Probed after each of 4 epochs, finetuned after the second and the last.
PLAN = "--pretrain-epochs 4 --eval-freq 2 --probe-freq 1"


def run(settings: Settings, keep: Keep) -> tuple[int, list[Step], Layout]:
    """The plan by stand-ins, with the files of weights that the parts leave beside their outputs."""
    steps, paths = [standin(step) for step in make_plan(settings)], Layout(settings.data.output_dir)
    for step in steps:
        step.folder.mkdir(parents=True, exist_ok=True)
        for name in {"pretrain": (LAST,), "evaluate": (CHECKPOINT, BEST)}.get(step.kind, ()):
            if not is_done(step, paths):
                (step.folder / name).write_text("weights")
    launcher = LocalLauncher(paths, overlaps=False, output=io.BytesIO())
    return benchmark.alternate(steps, launcher, keep_going=True, keep=keep), steps, paths


def weights(paths: Layout) -> list[str]:
    """Of the real parts' files; a stand-in leaves a round's checkpoint wherever it is called."""
    found = (*paths.pretrain_output.rglob("*.pth"), *paths.eval_output.rglob("*t.pth"))
    return sorted(str(path.relative_to(paths.root)) for path in found)


ROUNDS = [f"pretrain_output/four_channels/checkpoint-{epochs}.pth" for epochs in (1, 2, 3, 4)]
CONTINUING = ["pretrain_output/four_channels/last.pth"]
FINETUNED = [f"eval_output/four_channels_{n}/{name}" for n in (2, 4) for name in (BEST, CHECKPOINT)]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ("all", [*FINETUNED, *ROUNDS, *CONTINUING]),
        ("scored", ROUNDS),
        ("finetuned", [ROUNDS[1], ROUNDS[3]]),
    ],
)
def test_what_goes_once_it_is_scored_counts_as_done_and_less_can_be_kept_later(
    settings: Make, keep: Keep, left: list[str]
) -> None:
    code, steps, paths = run(settings(PLAN), keep)
    assert code == 0 and weights(paths) == sorted(left)
    assert all(is_done(step, paths) for step in steps)
    attempts = [read_record(paths, step.name).attempts for step in steps]
    assert run(settings(PLAN), keep)[0] == 0
    assert [read_record(paths, step.name).attempts for step in steps] == attempts
    # Later: what another call finetuned stays.
    later = PLAN if keep == "all" else "--pretrain-epochs 4 --eval-freq 0 --probe-freq 1"
    assert run(settings(later), "finetuned")[0] == 0
    assert weights(paths) == [ROUNDS[1], ROUNDS[3]]
    # A file that somebody else removed, or cut, is made again.
    kept = next(step for step in steps if step.name == "pretrain_four_channels_4")
    kept.outputs[0].write_text("")
    assert not is_done(kept, paths)


def test_a_score_that_failed_keeps_its_checkpoint(settings: Make) -> None:
    chosen = settings(PLAN)
    steps, paths = [standin(step) for step in make_plan(chosen)], Layout(chosen.data.output_dir)
    steps = [
        standin(step, behaviour="fail") if step.name == "probe_four_channels_1" else step for step in steps
    ]
    launcher = LocalLauncher(paths, overlaps=False, output=io.BytesIO())
    assert benchmark.alternate(steps, launcher, keep_going=True, keep="finetuned") == 1
    assert ROUNDS[0] in weights(paths) and ROUNDS[2] not in weights(paths)


def test_what_is_gone_cannot_be_scored_again(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.plan import check

    monkeypatch.setattr(check, "_check_by_parts", lambda *_: {})
    _, _, _ = run(settings(PLAN), "finetuned")
    checked_plan(settings(PLAN))
    with pytest.raises(
        ValueError, match=r"evaluate_four_channels_3 needs the checkpoint .*checkpoint-3\.pth"
    ):
        checked_plan(settings("--pretrain-epochs 4 --eval-epochs 2,3,4 --probe-freq 1"))


def test_a_job_removes_what_only_it_still_needed(settings: Make) -> None:
    _, steps, paths = run(settings(PLAN), "all")
    (file,) = [f for f in expiring(steps, "finetuned") if f.path.name == "checkpoint-1.pth"]
    assert file.after == {"pretrain_four_channels_1", "probe_four_channels_1"}
    probe = next(step for step in steps if step.name == "probe_four_channels_1")
    job = StepJob(paths.root, probe, [file])
    assert job() == "done"  # it was before: another job's end comes first, and removes it
    record = read_record(paths, "probe_four_channels_1")
    assert record is not None
    remove_expired(job.goes, lambda name: name != probe.name, paths)
    assert file.path.exists()
    remove_expired(job.goes, lambda name: True, paths)
    assert not file.path.exists()
    assert is_done(next(step for step in steps if step.name == file.of), paths)


def test_with_gpus_probes_come_when_there_are_enough_to_fill_them(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "visible_gpus", lambda: ["0", "1"])
    words = PLAN + " --num-gpus 2 --keep "
    order = {keep: [step.name for step in make_plan(settings(words + keep))] for keep in ("all", "finetuned")}
    short = [
        name.replace("_four_channels_", " ").replace("pretrain", "p").replace("probe", "s")
        for name in order["finetuned"]
    ]
    assert short == ["p 1", "p 2", "s 1", "s 2", "p 3", "p 4", "s 3", "s 4", "evaluate 2", "evaluate 4"]
    assert sorted(order["all"]) == sorted(order["finetuned"])
    assert order["all"][:4] == [f"pretrain_four_channels_{epochs}" for epochs in (1, 2, 3, 4)]


def sized(steps: list[Step], **sizes: tuple[int, int]) -> list[Step]:
    return [
        replace(
            step,
            facts=ScoringFacts(
                train=1, val=1, checkpoint_bytes=sizes[step.kind][0], model_bytes=sizes[step.kind][1]
            ),
        )
        if step.kind in sizes
        else step
        for step in steps
    ]


@pytest.mark.parametrize(
    ("keep", "peak", "end"),
    [
        # In the last round: four checkpoints, last.pth and what replaces it, the first finetuning's two.
        ("all", 4 * 100 + 300 + 300 + (10 + 30), 4 * 100 + 300 + 2 * (10 + 30)),
        # In the last round: what was before, last.pth replaced, and no weights of the first finetuning.
        ("scored", 4 * 100 + 300 + 300, 4 * 100),
        # 1 and 3 go with their probes: 2, 4 and last.pth.
        ("finetuned", 2 * 100 + 300 + 300, 2 * 100),
    ],
)
def test_peak_and_end_are_counted_by_the_sizes_that_the_parts_give(
    settings: Make, keep: Keep, peak: int, end: int
) -> None:
    chosen = settings(f"{PLAN} --keep {keep}")
    steps = sized(make_plan(chosen), pretrain=(300, 100), evaluate=(30, 10))
    assert disk_bytes(steps, keep) == (peak, end)
    assert f"GiB in the end (--keep {keep})" in disk_text(steps, chosen)


@pytest.mark.parametrize(("gpus_per_eval", "peak"), [(1, 105), (4, 50)])
def test_the_recommended_run_leaves_less_than_60_gb(
    data: Path, tmp_path: Path, gpus_per_eval: int, peak: int
) -> None:
    given = yaml.safe_load((REPO_ROOT / "configs/imagenet.yml").read_text())
    told = {"in1k_dir": data / "in1k", "eval_dataset": data / "dataset.yml", "output_dir": tmp_path / "out"}
    groups = make_all(GROUPS, [Layer({**given, **told, "num_gpus": 8, "gpus_per_eval": gpus_per_eval})])
    groups["compute"] = groups["compute"].resolved(groups["cluster"], 8)
    settings = Settings(**groups)
    one = ModelConfig(model="vit_large").checkpoint_bytes
    steps = sized(make_plan(settings), pretrain=(one, one // 3), evaluate=(one, one // 3))
    assert 3.9e9 < one < 4.1e9
    assert disk_bytes(steps, settings.parts.keep).end < 60e9
    assert disk_bytes(steps, settings.parts.keep).peak / 1e9 == pytest.approx(peak, abs=0.5)
    assert disk_bytes(steps, "all").end > 800e9
    before = sum({"pretrain": one, "evaluate": 2 * one}.get(step.kind, 0) for step in steps)
    assert before > 1.4e12


def test_a_files_time_comes_with_the_last_of_its_readers(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_text("x")
    file = Expiring(path, "none", frozenset({"one", "two"}))
    for done, there in (({"one"}, True), ({"one", "two"}, False), ({"one", "two"}, False)):
        remove_expired([file], done.__contains__, Layout(tmp_path))
        assert path.exists() is there
