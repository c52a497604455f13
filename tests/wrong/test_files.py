"""Files that crashes, disks and people damage: one line with the file and the reason."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.wrong.damage import (
    CUT,
    NO_CHECKPOINTS,
    NO_FINETUNED,
    STORE,
    STORES,
    damaged,
    run_directory,
    write,
)
from tests.wrong.world import INSPECT, REPORT, Case, call, check, pretrain_words

EXPORT = "mae export {w}/pre/checkpoint-1.pth --plugin {w}/nano.py --out {w}/out.pth"
DRAW = "mae reconstruct {w}/pre/checkpoint-1.pth --plugin {w}/nano.py --out {w}/out.png"
SCORE = ("segmenter evaluate {w}/fine/best.pth --plugin {w}/nano.py --device cpu --workers 0 "
         "--dataset {w}/data/dataset.yml --out {w}/out.json")  # fmt: skip
PREDICT = ("segmenter predict {w}/fine/best.pth {w}/photos --plugin {w}/nano.py --device cpu "
           "--out {w}/out")  # fmt: skip
MERGE = f"segments merge {{w}}/{STORE} --out {{w}}/joined.sqlite"
UNPACK = f"segments unpack {{w}}/{STORE} {{w}}/out --processes 1"
STATUS = "benchmark status {w}/run"

RESULT, RECORD = "eval_output/patches_5/result.json", ".segmae/steps/pretrain_patches_5.json"
LOG = "pretrain_output/patches/log.txt"
JSONS = ["", "{", "[]", "null", "7", '"text"', '{"mean_iou": "high"}', "\x00\x01", "[" * 5000,
         '{"name": 7, "state": "done", "run": "x", "kind": "pretrain", "fingerprint": {}}',
         '{"mean_iou": NaN, "format_version": 1}', '{"format_version": "one"}']  # fmt: skip
RUN_FILES = {
    **{f"result {n}": (damaged(RESULT, text), REPORT, RESULT) for n, text in enumerate(JSONS)},
    **{f"record {n}": (damaged(RECORD, text), command, RECORD)
       for n, text in enumerate(JSONS) for command in (REPORT, STATUS)},
    **{f"plan {n}": (damaged(".segmae/plan.json", text), STATUS, "plan.json")
       for n, text in enumerate(JSONS) if text != "[]"},
    **{f"log {n}": (damaged(LOG, f"{text}\n"), REPORT, "log.txt") for n, text in enumerate(JSONS)},
    "log in the middle": (damaged(LOG, '{"epoch": 1}\n{"ep\n{"epoch": 3}\n'), REPORT, "log.txt:2"),
    "log with text": (damaged(LOG, '{"epoch": 1, "train_loss": "low"}\n'), REPORT, "log.txt:1"),
    "log without its epoch": (damaged(LOG, '{"train_loss": 1}\n'), REPORT, "of no epoch"),
    "run.yml of text": (damaged("run.yml", "text"), REPORT, "run.yml"),
    "run.yml of a list": (damaged("run.yml", "[1]"), REPORT, "run.yml"),
    "run.yml with settings of text": (damaged("run.yml", "settings: all"), REPORT, "run.yml"),
    "run.yml cut": (damaged("run.yml", "settings: {a: [1"), REPORT, "run.yml"),
    "run.yml that is no UTF-8": (damaged("run.yml", b"a: \xff"), REPORT, "run.yml"),
}  # fmt: skip


def areas(write):
    """write: makes what stands in place of an areas.npz."""

    def prepare(world):
        run_directory(world)
        path = min((world / "run").rglob("areas.npz"))
        path.unlink()
        write(path)

    return prepare


def claiming(shape):
    """An archive whose first array has a header, and no value."""

    def write(path):
        with zipfile.ZipFile(path, "w") as archive, archive.open("images.npy", "w") as file:
            header = {"descr": "<U9", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)

    return write


def saved(**arrays):
    return lambda path: np.savez(path, **arrays)


SOUND = np.ones((1, 3, 2), int)
NO_AREAS = {
    "empty": areas(Path.touch), "a folder": areas(Path.mkdir), "a pipe": areas(os.mkfifo),
    "a bare array": areas(lambda path: np.save(path.open("wb"), SOUND)),
    "10^15 values": areas(claiming((10**15,))), "no values": areas(claiming((3,))),
    "no names": areas(saved(areas=SOUND)), "one name that is no list": areas(saved(images="a", areas=SOUND)),
    "other images": areas(saved(images=["a", "b"], areas=SOUND)),
    "objects": areas(saved(images=np.array([{}]), areas=SOUND)),
    "below 0": areas(saved(images=["a"], areas=-SOUND)),
    "halves": areas(saved(images=["a"], areas=SOUND / 2)),
}  # fmt: skip

TRACKED = {
    "TensorBoard's folder is a file": write("pre/tensorboard", "notes"),
    "TensorBoard's folder is a link to nothing": lambda w: (w / "pre/tensorboard").symlink_to("nothing"),
    "what trackers got is a folder": lambda w: (w / "pre/.trackers.json").mkdir(),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACKED)
def test_what_is_in_the_way_of_trackers_is_named(name, world, capsys):
    words = [*pretrain_words(world, "pre"), "--log-with", "tensorboard"]
    check(Case(name, words, "--output-dir: .*pre/(tensorboard|.trackers.json)", prepare=TRACKED[name]),
          world, capsys)  # fmt: skip


OF_TRACKERS = [
    "[]", '"x"', "{}", "\0", '{"ids": {"tensorboard": 5}, "sent": {"tensorboard": 1}}',
    '{"ids": {}, "sent": {"tensorboard": "x"}}', '{"ids": {}, "sent": {"tensorboard": -5}}',
]  # fmt: skip


@pytest.mark.parametrize("text", OF_TRACKERS)
def test_a_run_does_not_end_for_what_its_trackers_got(text, world, capsys, caplog):
    write("pre/.trackers.json", text)(world)
    code, _, err = call([*pretrain_words(world, "pre"), "--log-with", "tensorboard"], capsys)
    assert code == 0, err
    assert ".trackers.json is damaged" in caplog.text
    assert json.loads((world / "pre/.trackers.json").read_text())["sent"] == {"tensorboard": 2}


LONG = "n" * 10**6
NAMES = {
    "a name": {"name": LONG, "needs": [], "folder": "x"},
    "names of others": {"name": "a", "needs": [LONG], "folder": "x"},
    "control characters": {"name": "a\x1b]0;b\n\x1b[31mc", "needs": [], "folder": "x"},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_a_file_holds_does_not_flood_or_steer_a_terminal(name, world, capsys):
    run_directory(world)
    (world / "run/.segmae/plan.json").write_text(json.dumps([NAMES[name]]))
    code, out, err = call(STATUS.replace("{w}", str(world)).split(), capsys)
    assert code == (2 if name == "a name" else 0)
    assert len(out + err) < 1000
    assert "\x1b" not in out + err


CASES = [
    *[Case(f"export {name}", EXPORT, "checkpoint-1.pth|pre", prepare=prepare)
      for name, prepare in NO_CHECKPOINTS.items() if "fixed set" not in name],
    *[Case(f"reconstruct {name}", DRAW, "checkpoint-1.pth|pre", prepare=prepare)
      for name, prepare in NO_CHECKPOINTS.items()],
    *[Case(f"evaluate {name}", SCORE, "best.pth", prepare=prepare)
      for name, prepare in NO_FINETUNED.items()],
    *[Case(f"predict {name}", PREDICT, "best.pth", prepare=prepare)
      for name, prepare in NO_FINETUNED.items()],
    Case("unpack a store whose last segment is damaged", UNPACK, "a segment of .* is damaged", prepare=CUT),
    *[Case(f"unpack a store: {name}", UNPACK, "masks.sqlite|masks", prepare=prepare)
      for name, prepare in STORES.items() if "coverage" not in name],
    Case("merge a store with a damaged segment", MERGE, "masks.sqlite: a segment of .* is damaged",
         prepare=CUT),
    *[Case(f"inspect a store: {name}", INSPECT, "masks.sqlite", prepare=prepare)
      for name, prepare in STORES.items() if "keys that" not in name and "absolute" not in name],
    *[Case(f"areas: {name}", REPORT, "areas.npz is damaged", prepare=prepare)
      for name, prepare in NO_AREAS.items()],
    *[Case(name, command, says, prepare=prepare)
      for name, (prepare, command, says) in RUN_FILES.items()],
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_file_is_named(case, world, capsys):
    check(case, world, capsys)
