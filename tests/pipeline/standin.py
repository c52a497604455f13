"""A stand-in for a part: leaves what a real part leaves, in a fraction of a second.

For the launchers' tests only; the tests of the whole use the real parts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

stop_asked = False


def ask_to_stop(number: int, frame: object) -> None:
    global stop_asked
    stop_asked = True


def value(name: str, default: str = "") -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def main() -> int:
    folder = Path(value("--output-dir"))
    behaviour = value("--behaviour")
    # Before it says that it has started: a signal may follow at once.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else ask_to_stop)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"started {os.getpid()}\n")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if "--gpus" in sys.argv else []
    locks = [Path(value("--gpus")) / gpu for gpu in gpus]
    for lock in locks:
        lock.touch(exist_ok=False)  # another step has it: this one fails
    try:
        return work(folder, behaviour)
    finally:
        for lock in locks:
            lock.unlink()


def work(folder: Path, behaviour: str) -> int:
    if behaviour == "fail":
        sys.stdout.write("the reason\n")
        return 3
    if behaviour == "with-orphan":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
        return 3
    log = folder / "log.txt"
    epochs, event = int(value("--stop-after", "1")), Path(value("--until", "."))
    first = len(log.read_text().splitlines()) if log.exists() else 0
    for epoch in range(first, epochs):
        deadline = time.monotonic() + float(value("--seconds", "0.05"))
        while (time.monotonic() < deadline or not event.exists()) and not stop_asked:
            time.sleep(0.01)
        if stop_asked:
            time.sleep(float(value("--save-seconds", "0")))
        with log.open("a") as stream:
            stream.write(json.dumps({"epoch": epoch + 1}) + "\n")
        state = "stopped" if stop_asked else "running"
        progress = {"state": state, "epoch": epoch + 1, "epochs_total": epochs}
        # As the parts write it: whoever reads it finds the one before or this one, whole.
        part = folder / f"progress.{os.getpid()}"  # each of several processes has its own
        part.write_text(json.dumps(progress))
        part.rename(folder / "progress.json")
        if stop_asked and epoch + 1 < epochs:
            sys.stdout.write("saved\n")
            return 75
    if behaviour != "leaves-nothing":
        for name in (f"checkpoint-{epochs}.pth", f"reconstructions-{epochs}.png"):
            (folder / name).write_text("x" * 10)
        for name in ("result.json", "predictions.png"):
            (folder / name).write_text(json.dumps({"mean_iou": 1.0}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
