"""Who may import whom, and what a command line may load before it works."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "mae": {"segmenter", "pipeline", "benchmark"},
    "segmenter": {"mae", "pipeline", "benchmark"},
    "pipeline": {"mae", "segmenter", "benchmark", "torch"},
    "benchmark.py": {"mae", "segmenter", "torch"},
}


def imported(source: Path) -> set[str]:
    """Top-level names of every import in a file, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_no_other(room: str) -> None:
    path = ROOT / room
    sources = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert sources
    offenders = {
        str(source.relative_to(ROOT)): sorted(bad)
        for source in sources
        if (bad := imported(source) & FORBIDDEN[room])
    }
    assert offenders == {}


def test_importing_benchmark_loads_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "matplotlib", "PIL", "submitit", "pycocotools", "jinja2", "rich"]
    program = f"import benchmark, sys; print([n for n in {heavy} if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
