"""Real processes: signals, closed streams, full disks, process groups that end cleanly."""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from tests.segmenter.boxes import REPOSITORY
from tests.wrong.damage import run_directory
from tests.wrong.world import INSPECT, REPORT, call, pretrain_words, probe_words, train_words

pytestmark = pytest.mark.slow

HANG = """
import sys, time
from engine.vit import VIT_SIZES, VitSize
VIT_SIZES.setdefault("vit_speck", VitSize(width=16, depth=1, heads=2))
import mae.listing
def wait_for_ever(*arguments, **more):
    print("hangs", file=sys.stderr, flush=True)
    while True: time.sleep(1)
mae.listing.open_images = wait_for_ever
"""


def start(words, **more):
    program, *arguments = map(str, words)
    return subprocess.Popen(
        [sys.executable, "-m", program, *arguments], cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )  # fmt: skip


def test_a_second_signal_ends_a_run_that_hangs(world):
    (world / "nano.py").write_text(HANG)
    process = start(pretrain_words(world))
    try:
        assert process.stderr is not None
        while "hangs" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)  # torchrun and Slurm pass one wish on twice
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 1
        assert "ended at once by a second signal" in process.stderr.read()
    finally:
        process.kill()


def close(number):
    return lambda: os.close(number)


@pytest.mark.parametrize(("number", "epochs", "code"), [(1, "1", 0), (2, "1", 0), (2, "0", 2)])
def test_a_closed_stream_changes_no_exit_code(world, number, epochs, code):
    process = start([*pretrain_words(world), "--epochs", epochs], preexec_fn=close(number))
    process.communicate(timeout=240)
    assert process.returncode == code
    assert (world / "new/checkpoint-1.pth").exists() == (code == 0)
    if code == 0:
        torch.load(world / "new/checkpoint-1.pth", weights_only=True)
        assert b"epoch" in (world / "new/log.txt").read_bytes()


def test_a_reader_that_has_gone_changes_no_exit_code(world):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(["mae", "methods"], stdout=writing, stderr=writing)
    os.close(writing)
    assert process.wait(240) == 0


@contextmanager
def full_disk():
    """No file of this process can be larger than 4 KiB; pytest's own may be one of them afterwards."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


COMMANDS = {
    "export": "mae export {w}/pre/checkpoint-1.pth --plugin {w}/nano.py --out {w}/out/x.pth",
    "export safetensors": "mae export {w}/pre/checkpoint-1.pth --plugin {w}/nano.py --out "
                          "{w}/out/x.safetensors",
    "reconstruct": "mae reconstruct {w}/pre/checkpoint-1.pth --plugin {w}/nano.py --out "
                   "{w}/out/x.png",
    "inspect": INSPECT.replace("{w}/out", "{w}/out/x"),
    "report": REPORT + " --out {w}/out/x.html",
    "predict": "segmenter predict {w}/fine/best.pth {w}/photos --plugin {w}/nano.py --device cpu "
               "--out {w}/out",
    "unpack": "segments unpack {w}/in1k/masks/masks.sqlite {w}/out --processes 1",
    "generate": "segments generate felzenszwalb --images {w}/photos --processes 1 --out "
                "{w}/out/x.sqlite",
    "pack": "segments pack {w}/loose --processes 1 --out {w}/out/x.sqlite",
    "pretrain": "", "train": "", "probe": "",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half_made(command, world, capsys):
    run_directory(world)
    (world / "out").mkdir()
    words = COMMANDS[command].replace("{w}", str(world)).split()
    runs = {"pretrain": pretrain_words, "train": train_words, "probe": probe_words}
    words = runs[command](world) if command in runs else words
    with full_disk():
        code, _, err = call(words, capsys)
    if command in ("unpack", "predict", "probe") and code == 0:
        pytest.skip("its files are small enough")
    assert code == 1, err
    assert "Traceback" not in err
    message = err[err.rindex("Error: ") :]
    assert "cannot be written" in message
    assert len(message.splitlines()) <= 2
    unfinished = {path.name for path in (world / "out").glob("*.segmae-part")}
    assert unfinished <= {"x.sqlite.segmae-part"}  # it goes on from there
    assert not list((world / "out").glob("x*[!t]"))
    assert not list((world / "new").glob("*.pt*"))


def last_step_damages(world, library):
    """A plugin by which the last step of an epoch leaves weights of NaN."""
    (world / "nano.py").write_text(
        (world / "nano.py").read_text()
        + f"""
import torch
step, count = torch.optim.{library}.step, [0]
def damaging(self, *arguments, **more):
    result = step(self, *arguments, **more)
    count[0] += 1
    if count[0] % 2 == 0:  # the last of an epoch
        for group in self.param_groups:
            group["params"][0].data.fill_(float("nan"))
    return result
torch.optim.{library}.step = damaging
"""
    )


@pytest.mark.parametrize("part", ["mae", "segmenter"])
def test_the_damage_of_the_last_step_is_not_saved(world, part):
    words = pretrain_words(world) if part == "mae" else train_words(world)
    last_step_damages(world, "AdamW")
    more = ["--epochs", "1"]
    process = start([*words, *more])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    assert "is not finite after epoch 1" in err
    assert "Traceback" not in err
    assert not list((world / "new").glob("*.pth"))
    assert (world / "new/log.txt").read_text() == ""
