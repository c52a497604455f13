"""The whole as a user meets it: benchmark.py, its real parts, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

import benchmark
from common.console import run_program
from common.formats import read_log
from tests import toy
from tests.equal_runs import TIMING_KEYS
from tests.pipeline.programs import REPO_ROOT, run_benchmark
from tests.pipeline.slurm_cluster import SlurmCluster, running_slurm
from tests.pipeline.whole_run import scores, write_inputs
from tests.processes import until

STRIPES = '''
import numpy as np

from mae.masking import MaskingMethod
from tests import toy


class Stripes(MaskingMethod):
    """Every other column of patches is set to the mean colour."""

    name = "stripes"
    uses_segments = False
    settings = ()

    def pattern(self, rng, segment):
        columns = np.arange(self.image_size) // self.patch_size % 2
        return np.tile(columns.astype(np.uint8), (self.image_size, 1))
'''
ROUNDS = ("--mask-method", "four_channels", "--pretrain-epochs", "2", "--eval-freq", "1")


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run that was left alone: two rounds of four_channels."""
    out = tmp_path_factory.mktemp("reference") / "out"
    done = run_benchmark("--config", config, "--output-dir", out, *ROUNDS)
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out


def files_below(folder: Path) -> dict[str, float]:
    return {str(p.relative_to(folder)): p.stat().st_mtime for p in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_leaves_the_directory_of_the_design_and_prints_the_table(reference: Path) -> None:
    for name in (
        *("run.yml", "results.csv", "report.html"),
        *("pretrain_output/four_channels/log.txt", "pretrain_output/four_channels/console.log"),
        *(f"pretrain_output/four_channels/checkpoint-{n}.pth" for n in (1, 2)),
        *(f"pretrain_output/four_channels/reconstructions-{n}.png" for n in (1, 2)),
        *(f"eval_output/four_channels_{n}/result.json" for n in (1, 2)),
        *(f"eval_output/four_channels_{n}/predictions.png" for n in (1, 2)),
        *(f"eval_output/four_channels_{n}/checkpoint.pth" for n in (1, 2)),
    ):
        assert (reference / name).stat().st_size > 0, name
    log = (reference / "pretrain_output/four_channels/log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2]
    printed = (reference / "stdout.txt").read_text()
    assert "method" in printed
    assert "finetuned" in printed
    assert [row["epochs"] for row in scores(reference)] == ["1", "2"]
    assert yaml.safe_load((reference / "run.yml").read_text())["versions"]["torch"]


@pytest.mark.slow
def test_the_same_command_again_does_nothing(reference: Path, config: Path) -> None:
    before = files_below(reference / "pretrain_output") | files_below(reference / "eval_output")
    done = run_benchmark("--config", config, "--output-dir", reference, *ROUNDS)
    assert done.returncode == 0
    after = files_below(reference / "pretrain_output") | files_below(reference / "eval_output")
    assert after == before


@pytest.mark.slow
def test_other_settings_in_the_same_directory_are_refused_by_name(reference: Path, config: Path) -> None:
    before = files_below(reference)
    done = run_benchmark(
        *("--config", config, "--output-dir", reference, *ROUNDS, "--pretrain", "base_lr=0.05")
    )
    assert done.returncode == 2
    assert "four_channels: base_lr: 0.06 -> 0.05" in done.stderr
    assert files_below(reference) == before


@pytest.fixture(scope="session")
def killed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The output directory of a run of two methods that was killed twice, and its plugin."""
    out = tmp_path_factory.mktemp("killed") / "out"
    plugin = out.parent / "stripes.py"
    plugin.write_text(STRIPES)
    command = [sys.executable, str(REPO_ROOT / "benchmark.py"), "--config", str(config)]
    command += ["--mask_method", "four-channels,stripes", "--overlap", "--pretrain-epochs", "2"]
    command += ["--eval-epochs", "2", "--output-dir", str(out), "--plugin", str(plugin)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kill, working in (
        (_kill_step, "pretrain_output/four_channels"),
        (_kill_parent, "eval_output/four_channels_2"),
    ):
        parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        until((out / working / "progress.json").exists)
        kill(parent, out)
        assert parent.wait(240) != 0
    done = run_benchmark(*command[2:])
    assert done.returncode == 0, done.stderr
    return out, plugin


@pytest.mark.slow
def test_two_methods_beside_each_other_killed_again_and_again_end_in_one_report(
    reference: Path, killed: tuple[Path, Path]
) -> None:
    """Neither kills, nor the cut into rounds, nor what ran beside it makes a difference."""
    out = killed[0]
    rows = scores(out)
    assert [row["method"] for row in rows] == ["four_channels", "stripes"]
    assert rows[0] == scores(reference)[1]
    logs = [folder / "pretrain_output/four_channels/log.txt" for folder in (out, reference)]
    assert _results_in(logs[0]) == _results_in(logs[1])
    assert all(row["method"] in (out / "report.html").read_text() for row in rows)


@pytest.mark.slow
def test_a_method_of_ones_own_is_one_class_from_the_command_line_to_the_report(
    config: Path, killed: tuple[Path, Path]
) -> None:
    out, plugin = killed
    rows = scores(out)
    assert (rows[1]["method"], rows[1]["coverage_ratio"]) == ("stripes", "")
    call = ("--config", config, "--output-dir", out, "--mask-method", "stripes", "--dry-run")
    call = (*call, "--pretrain-epochs", "2", "--eval-epochs", "2", "--coverage-ratio", "30")
    refused = run_benchmark(*call)
    assert refused.returncode == 2
    assert "--mask-method is 'stripes'; choose one of patches, segments" in refused.stderr
    again = run_benchmark(*call, "--plugin", plugin)
    assert "2 steps, 2 done" in again.stdout, "no setting of a method without a ratio"


def _kill_parent(parent: subprocess.Popen[bytes], out: Path) -> None:
    parent.kill()


def _kill_step(parent: subprocess.Popen[bytes], out: Path) -> None:
    """The one that runs, or the next, if it ends meanwhile."""
    while parent.poll() is None:
        for file in (out / ".segmae/steps").glob("*.json"):
            record = json.loads(file.read_text())
            if record["state"] == "running":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record["pid"], signal.SIGKILL)
                    return


def _results_in(log: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in e.items() if k not in TIMING_KEYS} for e in read_log(log)]


@pytest.mark.slow
def test_torchrun_trains_and_scores_on_two_processes(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_benchmark(
        *("--config", config, "--output-dir", out, "--mask-method", "patches"),
        *("--pretrain-epochs", "1", "--num-gpus", "0", "--num-processes", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert [row["method"] for row in scores(out)] == ["patches"]
    console = (out / "pretrain_output/patches/console.log").read_text()
    assert "effective batch 4 = 2 process(es) x 1 step(s) x 2 images" in console
    assert console.count("epoch 1  train_loss") == 1
    result = json.loads((out / "eval_output/patches_1/result.json").read_text())
    assert result["num_processes"] == 2


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    """A real Slurm with one node; the test is skipped where it cannot be started."""
    with running_slurm(tmp_path / "slurm") as slurm:
        yield slurm


@pytest.mark.slow
def test_slurm_runs_the_plan_side_by_side_requeues_and_ends_like_the_local_run(
    reference: Path, config: Path, tmp_path: Path, cluster: SlurmCluster
) -> None:
    out = tmp_path / "out"
    # The nodes' processors are fewer than the jobs believe: threads would slow each other down.
    call = ("--config", config, "--output-dir", out, *ROUNDS, "--launcher", "slurm")
    call = (*call, "--sbatch", "cpus-per-task=1")
    submitted = run_benchmark(*call)
    assert submitted.returncode == 0, submitted.stderr
    assert "4 jobs submitted" in submitted.stdout
    first, beside = _job_of(out, "pretrain_four_channels_1"), set()
    until(lambda: _is_running(out, first))
    cluster.query("scontrol", "requeue", first)
    # Until then it is live: however long the call takes, all four are.
    assert "4 jobs submitted" not in run_benchmark(*call).stdout, "they were submitted twice"
    cluster.start_requeued(first)

    def nothing_left() -> bool:
        jobs = cluster.query("squeue", "-h", "-o", "%j %T").splitlines()
        beside.add(frozenset(job.split()[0] for job in jobs if job.endswith("RUNNING")))
        return not jobs

    until(nothing_left)
    assert {"evaluate_four_channels_1", "pretrain_four_channels_2"} in beside
    record = json.loads((out / ".segmae/steps/pretrain_four_channels_1.json").read_text())
    assert (record["state"], record["attempts"]) == ("done", 2)
    followed = run_benchmark(*call, "--wait")
    assert followed.returncode == 0, followed.stderr
    assert scores(out) == scores(reference)


def _job_of(out: Path, step: str) -> str:
    return str(json.loads((out / f".segmae/steps/{step}.json").read_text())["job_id"])


def _is_running(out: Path, job: str) -> bool:
    """Whether the job's step has started, as its record says."""
    records = [json.loads(p.read_text()) for p in (out / ".segmae/steps").glob("*.json")]
    return any(r["job_id"] == job and r["state"] == "running" for r in records)


def test_dry_run_shows_the_plan_on_a_screen_and_changes_nothing(config: Path, tmp_path: Path) -> None:
    before = files_below(config.parent)
    out = tmp_path / "out"
    call = ("--config", config, "--output-dir", out, *ROUNDS, "--dry-run")
    done = run_benchmark(*call)
    assert done.returncode == 0, done.stderr
    assert re.search("[45] steps, 0 done", done.stdout), "packing, unless another test has"
    assert "-m mae" not in done.stdout
    assert max(map(len, done.stdout.replace(str(out), "").splitlines())) <= 100
    assert "effective batch 4 = 4 per device x 1 devices x 1 accumulated" in done.stdout
    assert "end of warm-up" in done.stdout
    verbose = run_benchmark(*call, "--verbose")
    assert verbose.stdout.count("-m mae pretrain") == 2
    assert verbose.stdout.count("-m segmenter train") == 2
    assert not out.exists()
    assert files_below(config.parent) == before


def test_segments_that_cannot_be_written_beside_go_into_the_output_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, because tests may run as root, for whom every folder can be written to."""
    config, out = write_inputs(tmp_path / "inputs"), tmp_path / "out"
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p).name != "masks" and access(p, mode))
    arguments = ["--config", str(config), "--output-dir", str(out), *ROUNDS, "--dry-run"]
    with pytest.raises(SystemExit) as end:
        run_program(benchmark.main, "benchmark.py", [*arguments, "--verbose"])
    told = capsys.readouterr()
    assert end.value.code == 0, told.err
    assert told.out.count(f"--masks-dir {out / 'segments.sqlite'}") == 2
    assert f"segments pack {config.parent / 'in1k/masks'} --out {out / 'segments.sqlite'}" in told.out


@pytest.mark.slow
def test_a_finished_run_packs_nothing(reference: Path, config: Path, tmp_path: Path) -> None:
    store = config.parent / "in1k/masks/masks.sqlite"
    aside = store.rename(tmp_path / "aside.sqlite")
    try:
        done = run_benchmark("--config", config, "--output-dir", reference, *ROUNDS, "--dry-run")
    finally:
        aside.rename(store)
    assert "4 steps, 4 done" in done.stdout, done.stderr


def test_dry_run_of_a_stacked_run_needs_no_download(config: Path, tmp_path: Path) -> None:
    call = ("--stack", "--model", "vit_base", "--dry-run", "--verbose", "--eval-epochs", "0,1")
    done = run_benchmark(
        "--config", config, "--output-dir", tmp_path / "out", *call, "--pretrain-epochs", "1"
    )
    assert done.returncode == 0, done.stderr
    assert "-m mae fetch --model vit_base" in done.stdout
    assert not (tmp_path / "out").exists()


def test_classes_may_be_links_and_images_ppm(tmp_path: Path) -> None:
    """What pretraining reads, benchmark.py takes: it asks."""
    config = write_inputs(tmp_path / "tiny")
    train, elsewhere = tmp_path / "tiny/in1k/train", tmp_path / "elsewhere"
    train.rename(elsewhere)
    for path in elsewhere.rglob("*.JPEG"):
        Image.open(path).save(path.with_suffix(".ppm"))
        path.unlink()
    train.mkdir()
    for folder in elsewhere.iterdir():
        (train / folder.name).symlink_to(folder)
    done = run_benchmark("--config", config, "--output-dir", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "pretraining: 11 images (1 left out)" in done.stdout


def test_sample_data_that_are_not_used_are_not_made(config: Path, tmp_path: Path) -> None:
    data = config.parent
    done = run_benchmark(
        *("--config", REPO_ROOT / "configs/sample.yml", "--in1k-dir", data / "in1k", "--dry-run"),
        *("--eval-dataset", data / "segmentation/dataset.yml"),
        *("--pretrain", "effective_batch_size=4"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "sample").exists()


@pytest.mark.slow
def test_estimate_times_the_parts_and_leaves_nothing(tmp_path: Path) -> None:
    """Also without segments, and without the sample's data that the run would use."""
    shutil.rmtree(write_inputs(tmp_path / "data").parent / "in1k/masks")
    before = files_below(tmp_path)
    done = run_benchmark(
        *("--config", REPO_ROOT / "configs/sample.yml", "--in1k-dir", tmp_path / "data/in1k"),
        *("--plugin", toy.PLUGIN, "--model", "vit_toy", "--pretrain", "effective_batch_size=4"),
        *("--mask-method", "four_channels", "--make-segments", "felzenszwalb", "--estimate"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path) == before
    rows = [line.split()[1] for line in done.stdout.splitlines() if "four_channels" in line]
    assert rows == [
        *("pretrain_four_channels_0", "probe_four_channels_0", "pretrain_four_channels_6"),
        *("probe_four_channels_6", "evaluate_four_channels_6"),
    ]
    for text in ("generate_segments", "evaluate_scratch_0", "wall time: ", "at the peak"):
        assert text in done.stdout


def test_doctor_looks_at_the_data_through_the_parts(config: Path, tmp_path: Path) -> None:
    call = ("doctor", "--config", config, "--output-dir", tmp_path / "out", "--mask-method")
    done = run_benchmark(*call, "patches")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 train, 1 left out, 4 val" in done.stdout
    assert done.stdout.splitlines()[-1] == "ready"
    wrong = run_benchmark(*call, "patches", "--pretrain", "patch_size=5")
    assert wrong.returncode == 1
    assert "--image-size 32 is not a multiple of the patch size 5" in wrong.stdout
    assert wrong.stdout.splitlines()[-1] == "1 to fix"


def test_epochs_that_do_not_divide_are_told_what_happens(config: Path, tmp_path: Path) -> None:
    call = ("--pretrain-epochs", "5", "--eval-freq", "2", "--dry-run")
    done = run_benchmark("--config", config, "--output-dir", tmp_path / "out", *call)
    assert done.returncode == 0
    assert "a shorter last round ends at 5" in done.stderr


def test_bad_input_is_one_line_and_leaves_nothing(config: Path, tmp_path: Path) -> None:
    """More of it in this process: tests/wrong/test_command_lines.py."""
    out = tmp_path / "out"
    done = run_benchmark("--config", config, "--output-dir", out, "--eval", "7")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "checkpoint-7.pth, which does not exist" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_help_lists_flags_and_commands() -> None:
    done = run_benchmark("--help")
    assert done.returncode == 0
    for word in ("--in1k-dir", "--mask-method", "sample", "status", "report", "doctor"):
        assert word in done.stdout


@pytest.mark.slow
def test_sample_writes_data_and_says_how_to_use_them(tmp_path: Path) -> None:
    done = run_benchmark("sample", tmp_path / "s")
    assert done.returncode == 0
    assert (tmp_path / "s/in1k/train").is_dir()
    assert f"--in1k-dir {tmp_path}/s/in1k" in done.stdout
