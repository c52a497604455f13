"""Stop signals, and who gets them."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, subprocess, sys, time
from contextlib import nullcontext
from common.interruption import Interruption

with Interruption() as interruption:
    with interruption.shielding_children() if sys.argv[1] == "shielded" else nullcontext():
        child = subprocess.Popen(["sleep", "30"])
        print("started", flush=True)
        deadline = time.monotonic() + 120
        while not interruption.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        print(interruption.requested, child.poll(), flush=True)
        if sys.argv[1] == "shielded":
            time.sleep(1)
            print("again", flush=True)
            time.sleep(20)  # a second signal ends this, whatever it is that waits
    child.kill()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("how", ["shielded", "plain"])
def test_children_started_under_the_shield_survive_a_signal_to_the_group(how, number):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, number)
        told = process.stdout.readline().split()
        if how == "plain":
            assert told == ["True", str(-number)]
            assert process.wait(240) == 0
        else:
            assert told == ["True", "None"]
            assert process.stdout.readline() == "again\n"
            os.kill(process.pid, number)
            began = time.monotonic()
            assert process.wait(240) == 1
            assert time.monotonic() - began < 10
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the child that has survived
        process.wait()
