"""The two commands of a new user, and the lock that they install."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHELL_TOOLS = ["bash", "env", "dirname", "basename", "cmp", "cp"]


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", str(ROOT / name), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def path_with_old_python(tmp_path: Path) -> str:
    """A PATH whose only Python fails the version test, as an old one does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in SHELL_TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    old = folder / "python3"
    old.write_text('#!/bin/bash\ncase "$2" in *exit*) exit 1;; *) echo 3.8.18;; esac\n')
    old.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("script", ["run_benchmark.sh", "run_tests.sh"])
def test_too_old_a_python_is_one_clear_line(
    script: str, path_with_old_python: str, tmp_path: Path
) -> None:
    result = run_script(
        script, PATH=path_with_old_python, PYTHON="", VENV_DIR=str(tmp_path / "venv")
    )
    assert result.returncode == 2
    assert result.stderr == (
        "Error: SegMAE needs Python 3.11, 3.12 or 3.13 on the PATH; python3 here is: 3.8.18.\n"
    )
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_not_there_is_one_clear_line() -> None:
    result = run_script("run_benchmark.sh", PYTHON="/nowhere/python")
    assert result.returncode == 2
    assert result.stderr == "Error: PYTHON=/nowhere/python is not a program.\n"


def test_an_environment_that_is_up_to_date_is_used_at_once(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    # Not a symlink: Python finds its packages through the path it was started by.
    (venv / "bin" / "python").write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", venv / "installed-requirements.txt")
    started = time.monotonic()
    result = run_script("run_benchmark.sh", "--help", VENV_DIR=str(venv), PYTHON="")
    assert result.returncode == 0
    assert "--mask-method" in result.stdout
    assert "Setting up" not in result.stdout
    assert time.monotonic() - started < 30  # a hang, not a measurement


@pytest.mark.parametrize("options", [[], ["--config", "configs/sample.yml"]])
def test_without_options_the_sample_config_is_run(options: list[str], tmp_path: Path) -> None:
    """It makes its data itself (test_benchmark.py), so that both calls of a new user are one."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[ "$1" = -c ] || echo "$PWD: $@"\n')
    python.chmod(0o755)
    result = run_script("run_benchmark.sh", *options, PYTHON=str(python))
    assert result.returncode == 0, result.stderr
    words = f"{ROOT}/benchmark.py --config configs/sample.yml"
    last = result.stdout.splitlines()[-1].replace(": benchmark.py", f": {ROOT}/benchmark.py")
    assert last == f"{ROOT if not options else Path.cwd()}: {words}"


def test_the_lock_is_hashed_names_no_index_and_takes_headless_opencv() -> None:
    lock = json.loads((ROOT / "Pipfile.lock").read_text())
    assert lock["_meta"]["sources"] == []
    packages = {**lock["default"], **lock["develop"]}
    for name, package in packages.items():
        assert package["hashes"], name
        assert "index" not in package, name
    assert "opencv-python-headless" in packages
    assert "opencv-python" not in packages


def test_requirements_hold_every_package_of_the_lock_with_its_version_and_hashes() -> None:
    lock = json.loads((ROOT / "Pipfile.lock").read_text())
    locked = {
        name: package["version"]
        for section in ("default", "develop")
        for name, package in lock[section].items()
    }
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    required = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[.*\])?(==[^;\s]+)", line)
        assert match, f"not a pinned package: {line[:80]}"
        assert "--hash=sha256:" in line, match[1]
        required[match[1]] = match[2]
    assert required == locked
