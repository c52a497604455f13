"""`pip install -e .`, for real, in an environment where something else is called `common`."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

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
