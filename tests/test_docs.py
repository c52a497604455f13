"""The site's pages: what they say of the code is so, and the notebooks run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.options import fields_of
from mae.config import GROUPS as PRETRAIN_GROUPS
from pipeline.plan.settings import GROUPS as BENCHMARK_GROUPS
from pipeline.plan.settings import Cluster, Compute
from segmenter.config import GROUPS as TRAIN_GROUPS
from segmenter.config import PROBE_GROUPS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "engine", "segments", "mae", "segmenter", "pipeline")


def test_the_messages_that_are_quoted_are_those_of_the_code() -> None:
    sources = [
        path for room in ROOMS for path in [ROOT / room, *(ROOT / room).rglob("*.py")] if path.is_file()
    ]
    code = "\n".join(path.read_text() for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # one message over several lines
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)[2:]
    assert len(rows) > 8
    for row in rows:
        for quoted in re.findall(r"`(.*?)`", row):
            for fragment in filter(str.strip, quoted.split("...")):
                assert fragment.strip() in code, (row, fragment)


def test_what_is_said_of_presets_and_datasets_is_there() -> None:
    page = (ROOT / "docs/score.md").read_text()
    presets = {path.stem for path in (ROOT / "segmenter/presets").glob("*.yml")}
    assert presets == set(re.findall(r"^\| `([\w-]+)` \| ", page, re.MULTILINE)) & presets
    assert len(list((ROOT / "segmenter/datasets").glob("*.yml"))) == 6


def test_options_that_are_said_to_matter_decide_and_the_others_do_not() -> None:
    parts = {
        **fields_of(*PROBE_GROUPS.values()),
        **fields_of(*TRAIN_GROUPS.values(), *PRETRAIN_GROUPS.values()),
    }
    places = fields_of(Compute, Cluster)
    matter, speed, _ = (ROOT / "docs/options.md").read_text().split("\n## ")

    def named(text: str) -> list[str]:
        return [name.replace("-", "_") for name in re.findall(r"`(?:--)?([a-z][\w-]+)[^`]*`", text)]

    firsts = named("".join(re.findall(r"^- (`.*?) –", matter, re.MULTILINE)))
    assert len(firsts) > 15
    known = {**parts, **fields_of(*BENCHMARK_GROUPS.values())}
    assert all(not known[name].neutral and name not in places for name in firsts)
    others = named(speed.split("They may change")[0])
    assert len(others) > 18
    assert all(known[name].neutral or name in {**places, "keep": None} for name in others)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["look", "score"])
def test_a_notebook_runs_from_above_to_below(tmp_path: Path, name: str) -> None:
    cells = json.loads((ROOT / f"docs/notebooks/{name}.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
