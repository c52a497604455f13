"""The site's pages: their commands run, and the messages they quote are those of the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "engine", "segments", "mae", "segmenter", "pipeline")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's configs, and the files of the page by the names in their first lines."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "benchmark.py").symlink_to(ROOT / "benchmark.py")
    for block in blocks("docs/extend.md", "python"):
        (folder / block.splitlines()[0].removeprefix("# ")).write_text(block)
    (folder / "stripes.py").write_text(blocks("README.md", "python")[0])
    return folder


@pytest.mark.parametrize(
    "command", [line for block in blocks("docs/extend.md", "sh") for line in block.splitlines()]
)
def test_what_extends_it_is_known_to_the_plan(folder: Path, command: str) -> None:
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=folder, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stripes" in done.stdout or "vit_nano" in command


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
