"""The two commands of a new user, and the environment that they make."""

import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.processes import until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SHELL_TOOLS = ["bash", "env", "dirname", "basename", "cat", "sed", "cmp", "cp", "readlink"]


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
        "Error: SegMAE needs Python 3.11 to 3.14 on the PATH; python3 here is: 3.8.18.\n"
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


@pytest.mark.parametrize("wrong", ["", "ruff", "mypy", "pytest"])
def test_a_check_that_fails_is_shown_and_named_and_the_others_run(wrong: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\necho "said by $2"\n[ "$2" != "{wrong}" ]\n')
    python.chmod(0o755)
    result = run_script("run_tests.sh", PYTHON=str(python))
    assert result.returncode == (1 if wrong else 0), result.stderr
    named = {word for word in result.stderr.split() if word != "Failed:"}
    assert named == ({wrong} if wrong else set())
    assert f"said by {wrong or 'pytest'}" in result.stdout and "said by pytest" in result.stdout


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


TORCH = [("torch", "2.14.1"), ("torchvision", "0.29.1"), ("filelock", "3.1"), ("triton", "3.8.0"),
         ("nvidia-cublas", "13.1"), ("cuda-bindings", "13.5"), ("nvidia-ml-py", "13.6")]  # fmt: skip


class Checkout:
    """What sets an environment up, with a small lock that is served on loopback."""

    def __init__(self, folder: Path, indexes: str) -> None:
        self.folder, self.indexes, self.venv = folder / "tree", indexes, folder / "venv"
        self.folder.mkdir()
        for name in ("environment.sh", "run_benchmark.sh"):
            shutil.copy(ROOT / name, self.folder)
        (self.folder / "benchmark.py").write_text(
            "import importlib.metadata as m\n"
            "print(sorted(f'{d.name} {d.version}' for d in m.distributions() if d.name != 'pip'))\n"
        )
        served = folder / "indexes/locked"
        self.lock({f"{name}=={version}": put_wheel(served, name, version) for name, version in TORCH})

    def lock(self, hashes: dict[str, str]) -> None:
        lines = [f"{pin}; python_version >= '3.10' --hash=sha256:{sha}\n" for pin, sha in hashes.items()]
        (self.folder / "requirements.txt").write_text("".join(lines))

    def start(self, **environment: str) -> subprocess.Popen[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        clean |= {"PYTHON": "", "VENV_DIR": str(self.venv), "PIP_RETRIES": "0"}
        clean |= {"PIP_INDEX_URL": f"{self.indexes}/locked", "PIP_CONFIG_FILE": os.devnull}
        # Others that pip may be set up with are not asked for torch.
        clean |= {"PIP_EXTRA_INDEX_URL": f"{self.indexes}/locked", "PIP_NO_CACHE_DIR": "1"}
        return subprocess.Popen(
            ["bash", str(self.folder / "run_benchmark.sh"), "--help"], env=clean | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            # Of what a shell runs in the background, as CI may, a script cannot trap it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def call(self, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def checkout(tmp_path: Path, indexes: str) -> Checkout:
    return Checkout(tmp_path, indexes)


@pytest.fixture(scope="module")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with a Python that links an environment's files instead of making it, which takes seconds."""
    made, folder = tmp_path_factory.mktemp("made") / "venv", tmp_path_factory.mktemp("bin")
    subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
    python = folder / "python3"
    copies = f'cp -rlT "{made}" "$3" && cp --remove-destination "{made}/pyvenv.cfg" "$3"'
    copies = f'[ "$1 $2" != "-m venv" ] || {{ {copies}; exec echo "# $3" >>"$3/pyvenv.cfg"; }}'
    python.write_text(f'#!/bin/bash\n{copies}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_torch_comes_from_another_index_and_the_rest_from_the_lock(checkout: Checkout) -> None:
    indexes = checkout.indexes
    made = checkout.call(TORCH_INDEX=f"{indexes}/cu126")
    assert made.returncode == 0, made.stderr
    found = made.stdout.splitlines()[-1]
    for part in ("'filelock 3.1'", "'torch 2.14.1+cu126'", "'torchvision 0.29.1+cu126'",
                 "'nvidia-cublas-cu12 12.6.4'", "'triton 3.8.0'",
                 "'nvidia-ml-py 13.6'"):  # fmt: skip
        assert part in found
    for part in ("nvidia-cublas 13", "cuda-bindings"):
        assert part not in found
    for again in ({"TORCH_INDEX": f"{indexes}/cu126"}, {}):  # the same, and as it was made
        assert checkout.call(**again).stdout.splitlines() == [found]
    wrong = checkout.call(TORCH_INDEX=f"{indexes}/nowhere")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    assert f"no torch==2.14.1 torchvision==0.29.1 at TORCH_INDEX={indexes}/nowhere" in wrong.stderr
    assert checkout.call().stdout.splitlines() == [found]  # what was there works as before
    locked = checkout.call(TORCH_INDEX="")
    assert locked.returncode == 0, locked.stderr
    assert "'torch 2.14.1'" in locked.stdout.splitlines()[-1]
    assert "'nvidia-cublas 13.1'" in locked.stdout.splitlines()[-1]
    # It was made beside, and nothing in it leads there.
    words = ["grep", "-rlI", "segmae-part", checkout.venv / "bin", checkout.venv / "pyvenv.cfg"]
    assert subprocess.run(words, capture_output=True, check=False).stdout == b""
    activate = f". {checkout.venv}/bin/activate && command -v python && pip --version"
    said = subprocess.run(["bash", "-c", activate], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{checkout.venv}/bin/python\n")
    assert f"{checkout.venv}/lib" in said
    assert not list(checkout.venv.parent.glob("venv?*"))


def a_working_environment(folder: Path) -> dict[str, bytes]:
    """What stands for one that an earlier lock made; returns all that it holds."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    (folder / "bin/python").chmod(0o755)
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "installed-requirements.txt").write_text("torch==2.0 --hash=sha256:0\n")
    return held(folder)


def held(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replaced_hash(checkout: Checkout) -> dict[str, str]:
    checkout.lock({"filelock==3.1": "0" * 64})
    return {}


def no_network(checkout: Checkout) -> dict[str, str]:
    return {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_EXTRA_INDEX_URL": ""}


def without_ensurepip(checkout: Checkout) -> dict[str, str]:
    """As Debian's Python is without python3-venv."""
    folder = checkout.folder / "bin"
    folder.mkdir()
    python = folder / "python3"
    python.write_text(f'#!/bin/bash\n[ "$1" != -m ] || exit 1\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def what_torch_needs_is_missing(checkout: Checkout) -> dict[str, str]:
    shutil.rmtree(checkout.folder.parent / "indexes/cu126/triton")
    return {"TORCH_INDEX": f"{checkout.indexes}/cu126"}


FAILURES = {
    "a wrong TORCH_INDEX": (lambda c: {"TORCH_INDEX": f"{c.indexes}/nowhere"}, "no torch==2.14.1"),
    "a TORCH_INDEX without what torch needs": (what_torch_needs_is_missing, "is not all at TORCH_INDEX"),
    "a changed lock without network": (no_network, "installing requirements.txt failed"),
    "a package of another hash": (replaced_hash, "installing requirements.txt failed"),
    "no venv": (without_ensurepip, "apt install python3-venv"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_a_set_up_that_fails_leaves_the_environment_that_is_there(
    failure: str, checkout: Checkout, quick_python: str
) -> None:
    before, (prepare, says) = a_working_environment(checkout.venv), FAILURES[failure]
    result = checkout.call(**{"PATH": quick_python, **prepare(checkout)})
    assert result.returncode == 2, result.stderr
    assert says in result.stderr.splitlines()[-1]
    assert held(checkout.venv) == before
    assert not list(checkout.venv.parent.glob("venv?*"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_set_up_that_is_stopped_leaves_it_too_and_starts_over(
    stop: int, checkout: Checkout, quick_python: str
) -> None:
    before = a_working_environment(checkout.venv)
    beside = checkout.venv.with_name("venv.segmae-part")
    process = checkout.start(PATH=quick_python)
    until((beside / "bin/python").exists)
    os.killpg(process.pid, stop)
    process.communicate(timeout=60)
    assert process.returncode == (75 if stop == signal.SIGINT else -stop)
    assert held(checkout.venv) == before
    assert beside.exists() == (stop == signal.SIGKILL)
    if stop == signal.SIGKILL:
        again = checkout.call(PATH=quick_python)
        assert again.returncode == 0, again.stderr
        assert "'torch 2.14.1'" in again.stdout
        assert not beside.exists()


def test_of_two_set_ups_at_once_one_waits_for_the_other(checkout: Checkout, quick_python: str) -> None:
    a_working_environment(checkout.venv)
    both = [checkout.start(PATH=quick_python) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("'torch 2.14.1'" in out for out, _ in said)
    assert sum("Setting up" in out for out, _ in said) == 1
    assert sum("waiting for it" in out for out, _ in said) == 1
    assert not list(checkout.venv.parent.glob("venv?*"))


def test_what_a_kill_between_the_last_steps_left_is_put_back(checkout: Checkout, quick_python: str) -> None:
    beside = checkout.venv.with_name("venv.segmae-part")
    a_working_environment(beside)
    before = a_working_environment(beside / "replaced")
    assert checkout.call(PATH=quick_python, **no_network(checkout)).returncode == 2
    names = {name.replace("venv.segmae-part/replaced", "venv"): text for name, text in before.items()}
    assert held(checkout.venv) == names


PLACES = {
    "a folder of the user's": lambda c: c.folder.parent / "mine",
    "a link to it": lambda c: c.folder.parent / "link",
    "the checkout": lambda c: Path(),
    "the folder above": lambda c: Path(".."),
    "an environment of the user's": lambda c: c.folder.parent / "own",
    "a file": lambda c: c.folder / "benchmark.py",
    "below a file": lambda c: c.folder / "benchmark.py/venv",
    "a link to itself": lambda c: c.folder.parent / "loop",
    "a name of 300 letters": lambda c: c.folder / ("x" * 300),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_only_what_was_made_here_is_replaced(place: str, checkout: Checkout) -> None:
    above = checkout.folder.parent
    (above / "mine/.git").mkdir(parents=True)
    (above / "mine/thesis.tex").write_text("years")
    (above / "link").symlink_to("mine")
    (above / "loop").symlink_to("loop")
    a_working_environment(above / "own")
    (above / "own/installed-requirements.txt").unlink()
    before = held(above)
    result = checkout.call(VENV_DIR=str(PLACES[place](checkout)))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("Error: VENV_DIR")
    assert held(above) == before
    assert (above / "mine/.git").is_dir()


def test_an_environment_behind_a_link_is_made_anew_there(checkout: Checkout, quick_python: str) -> None:
    a_working_environment(checkout.venv)
    link = checkout.venv.with_name("link")
    link.symlink_to("venv")
    (checkout.venv / "bin/python").unlink()  # as a newer system leaves it
    shutil.copy(checkout.folder / "requirements.txt", checkout.venv / "installed-requirements.txt")
    result = checkout.call(PATH=quick_python, VENV_DIR=str(link))
    assert result.returncode == 0, result.stderr
    assert link.is_symlink()
    assert not (checkout.venv / "replaced").exists()
