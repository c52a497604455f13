"""A run that the version before left in the middle goes on as if it had never been updated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from common.formats import read_log
from pipeline.plan.sample import write_sample
from tests.equal_runs import TIMING_KEYS
from tests.pipeline.programs import REPO_ROOT, run_benchmark

EARLIER = REPO_ROOT / "tests/fixtures/earlier_run"
SIZE = {"train": 24, "val": 4, "segmentation_train": 8, "segmentation_val": 4}


def put_there(folder: Path) -> Path:
    """The run, its data and its command's file, all in `folder`; returns the output directory."""
    write_sample(folder / "sample", **SIZE)
    run = folder / "run"
    shutil.copytree(EARLIER / "run", run)
    shutil.copy(EARLIER / "run.yml", folder / "run.yml")
    for path in (*folder.glob("*.yml"), *run.rglob("*.json"), *run.rglob("*.yml")):
        text = path.read_text().replace("@RUN@", str(run))
        path.write_text(text.replace("@SAMPLE@", str(folder / "sample")))
    for path in (run / ".segmae/steps").iterdir():  # a file's size depends on the paths in it
        record = json.loads(path.read_text())
        record["outputs"] = {name: (run / name).stat().st_size for name in record["outputs"]}
        path.write_text(json.dumps(record))
    return run


def records(run: Path) -> dict[str, dict[str, object]]:
    return {path.stem: json.loads(path.read_text()) for path in (run / ".segmae/steps").iterdir()}


@pytest.mark.slow
def test_a_run_of_the_version_before_is_finished_with_the_same_numbers(tmp_path: Path) -> None:
    run = put_there(tmp_path)
    done_before = {name: r for name, r in records(run).items() if r["state"] == "done"}
    assert len(done_before) == 3
    # Without what is scored by default since then.
    call = ("--config", tmp_path / "run.yml", "--plugin", EARLIER / "nano.py")
    call = (*call, "--baselines", "none", "--probe-freq", "0")
    done = run_benchmark(*call)
    assert done.returncode == 0, done.stdout + done.stderr
    after = records(run)
    assert {name: after[name] for name in done_before} == done_before, "done steps, done again"
    assert {record["state"] for record in after.values()} == {"done"}
    assert after["evaluate_four_channels_2"]["attempts"] == 2
    for folder, expected in json.loads((EARLIER / "expected.json").read_text()).items():
        entries = read_log(run / folder / "log.txt")
        later = {"unreadable_images"}  # counted in finetunings, too, since
        known = set(expected[0]).union(*expected) | set(entries[0]) - later - set(TIMING_KEYS)
        results = [{k: v for k, v in e.items() if k in known} for e in entries]
        # Other processors round otherwise.
        assert results == [pytest.approx(entry, rel=1e-4) for entry in expected], folder
    assert "four_channels 15%" in (run / "report.html").read_text()
    before = records(run)
    assert run_benchmark(*call).returncode == 0
    assert records(run) == before


def test_other_settings_than_those_of_the_version_before_are_refused(tmp_path: Path) -> None:
    put_there(tmp_path)
    config = yaml.safe_load((tmp_path / "run.yml").read_text())
    config["pretrain"]["base_lr"] = 0.02
    config["finetune"]["epochs"] = 4
    (tmp_path / "run.yml").write_text(yaml.safe_dump(config))
    call = ("--config", tmp_path / "run.yml", "--plugin", EARLIER / "nano.py")
    done = run_benchmark(*call)
    assert done.returncode == 2
    assert "base_lr: 0.01 -> 0.02" in done.stderr
    assert "epochs: 3 -> 4" in done.stderr
