"""What is installed: the lock, containers, and `pip install -e .` beside another package `common`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("install") / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(site) / "common").mkdir()
    (Path(site) / "common/__init__.py").write_text("raise ImportError('the package of PyPI')\n")
    return python


def run(*words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", **more}
    return subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_an_editable_install_gives_the_packages_and_the_command_and_goes_again(python: Path) -> None:
    pip = (python, "-m", "pip", "--no-input", "--disable-pip-version-check")
    copied = run(*pip, "install", "--no-deps", ROOT)
    assert copied.returncode != 0
    assert "pip install -e ." in copied.stdout + copied.stderr

    done = run(*pip, "install", "--no-deps", "-e", ROOT)
    assert done.returncode == 0, done.stderr
    where = run(python, "-c", "import common.step_files; print(common.__file__)")
    assert where.stdout.strip() == str(ROOT / "common/__init__.py"), where.stderr
    # What the lock has is lent by this environment.
    others = {"PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONDONTWRITEBYTECODE": "1"}
    told = run(python.parent / "segmae", "--help", **others)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("Usage: segmae")
    wrong = run(python.parent / "segmae", "--mask-method", "none", **others)
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (2, False)

    assert run(*pip, "uninstall", "-y", "segmae").returncode == 0
    assert run(python, "-c", "import common").stderr.strip().endswith("the package of PyPI")


def test_the_definition_for_apptainer_does_the_dockerfiles_steps(tmp_path: Path) -> None:
    """And holds all that runs: from what it copies the command starts as it starts there."""
    parts = re.split(r"^%(\w+).*\n", (ROOT / "segmae.def").read_text(), flags=re.MULTILINE)
    header, sections = parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))
    docker = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    assert re.findall(r"^From: (.*)", header, re.M) == re.findall(r"^FROM (.*)", docker, re.M)
    (apt, setup) = re.findall(r"^RUN (.*)", docker, re.M)
    steps = [*re.split(r" && +", apt), *json.loads(setup)[2].split("; ")]
    lines = [line.strip() for line in sections["post"].splitlines() if "#" not in line]
    assert sorted(step.strip() for step in steps) == sorted(filter(None, {*lines} - {"cd /segmae"}))
    for files, place in map(str.split, sections["files"].strip().splitlines()):
        assert place == "/segmae/"
        for path in ROOT.glob(files):
            subprocess.run(["cp", "-Lr", path, tmp_path], check=True)
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert rooms == {path.parent.name for path in tmp_path.glob("*/__init__.py")}
    run = sections["runscript"].replace("/segmae/", f"{tmp_path}/")
    done = subprocess.run(
        ["sh", "-c", run], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert "--mask-method" in done.stdout, done.stderr


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
