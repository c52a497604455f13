"""The two commands of a new user, and the lock that they install."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHELL_TOOLS = ["bash", "env", "dirname", "basename", "cat", "sed", "cmp", "cp"]


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", str(ROOT / name), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
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
def test_too_old_a_python_is_one_clear_line(script: str, path_with_old_python: str, tmp_path: Path) -> None:
    result = run_script(script, PATH=path_with_old_python, PYTHON="", VENV_DIR=str(tmp_path / "venv"))
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


def put_wheel(index: Path, name: str, version: str, *needs: str) -> str:
    """A package of one module that knows its version, in a simple index; returns its sha256."""
    module = name.replace("-", "_")
    wheel = index / name / f"{module}-{version}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True, exist_ok=True)
    info = f"{module}-{version}.dist-info"
    required = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{module}.py", f"version = {version!r}\n")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[str]:
    """The address of two package indexes on loopback: locked/ for the lock, and cu126/."""
    served = tmp_path / "indexes"
    for name, version, *needs in [
        ("torch", "2.14.1+cu126", "triton==3.8.0", "nvidia-cublas-cu12", "filelock"),
        ("torchvision", "0.29.1+cu126", "torch==2.14.1"),
        ("torch", "2.15.0+cu126"),  # newer than the lock's
        ("triton", "3.8.0"),
        ("nvidia-cublas-cu12", "12.6.4"),
        ("filelock", "99"),  # newer than the lock's, which will do
    ]:
        put_wheel(served / "cu126", name, version, *needs)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_torch_comes_from_another_index_and_the_rest_from_the_lock(indexes: str, tmp_path: Path) -> None:
    tree, served = tmp_path / "tree", tmp_path / "indexes"
    tree.mkdir()
    for name in ("environment.sh", "run_benchmark.sh"):
        shutil.copy(ROOT / name, tree)
    (tree / "benchmark.py").write_text(
        "import importlib.metadata as m\n"
        "print(sorted(f'{d.name} {d.version}' for d in m.distributions() if d.name != 'pip'))\n"
    )
    lock = [("torch", "2.14.1"), ("torchvision", "0.29.1"), ("filelock", "3.1"),
            ("triton", "3.8.0"), ("nvidia-cublas", "13.1"), ("cuda-bindings", "13.5"),
            ("nvidia-ml-py", "13.6")]  # fmt: skip
    hashed = [(f"{n}=={v}", put_wheel(served / "locked", n, v)) for n, v in lock]
    lines = [f"{pin}; python_version >= '3.10' --hash=sha256:{sha}\n" for pin, sha in hashed]
    (tree / "requirements.txt").write_text("".join(lines))

    def call(**torch_index: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        environment |= {"PYTHON": "", "VENV_DIR": str(tmp_path / "venv"), **torch_index}
        environment |= {"PIP_INDEX_URL": f"{indexes}/locked", "PIP_CONFIG_FILE": os.devnull}
        # Others that pip may be set up with are not asked for torch.
        environment |= {"PIP_EXTRA_INDEX_URL": f"{indexes}/locked", "PIP_NO_CACHE_DIR": "1"}
        return subprocess.run(
            ["bash", str(tree / "run_benchmark.sh"), "--help"],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    made = call(TORCH_INDEX=f"{indexes}/cu126")
    assert made.returncode == 0, made.stderr
    found = made.stdout.splitlines()[-1]
    for part in ("'filelock 3.1'", "'torch 2.14.1+cu126'", "'torchvision 0.29.1+cu126'",
                 "'nvidia-cublas-cu12 12.6.4'", "'triton 3.8.0'",
                 "'nvidia-ml-py 13.6'"):  # fmt: skip
        assert part in found
    for part in ("nvidia-cublas 13", "cuda-bindings"):
        assert part not in found
    for again in ({"TORCH_INDEX": f"{indexes}/cu126"}, {}):  # the same, and as it was made
        assert call(**again).stdout.splitlines() == [found]
    wrong = call(TORCH_INDEX=f"{indexes}/nowhere")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    assert f"no torch==2.14.1 torchvision==0.29.1 at TORCH_INDEX={indexes}/nowhere" in wrong.stderr
    locked = call(TORCH_INDEX="")
    assert locked.returncode == 0, locked.stderr
    assert "'torch 2.14.1'" in locked.stdout.splitlines()[-1]
    assert "'nvidia-cublas 13.1'" in locked.stdout.splitlines()[-1]
