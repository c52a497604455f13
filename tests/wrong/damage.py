"""What crashes, disks and people do to a world's files: each is a function of the world."""

import json
import os
import sqlite3
from pathlib import Path

import torch

STORE = "in1k/masks/masks.sqlite"


def change(path, **values):
    """Other values in a checkpoint, by names with dots; DELETE takes one away."""

    def prepare(world):
        content = torch.load(world / path, weights_only=True)
        for name, value in values.items():
            *parents, last = name.split("__")
            inner = content
            for parent in parents:
                inner = inner[parent]
            if value is DELETE:
                del inner[last]
            else:
                inner[last] = value(inner[last]) if callable(value) else value
        torch.save(content, world / path)

    return prepare


DELETE = object()
NAN, INF = float("nan"), float("inf")


def poison(value, name="cls_token"):
    def put(weights):
        name_there = next(n for n in weights if n.endswith(name))
        return {**weights, name_there: torch.full_like(weights[name_there], value)}

    return put


def write(path, content):
    def prepare(world):
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (world / path).write_bytes(content)
        else:
            (world / path).write_text(content)

    return prepare


def cut(path, share=0.5):
    def prepare(world):
        content = (world / path).read_bytes()
        (world / path).write_bytes(content[: int(len(content) * share)])

    return prepare


PRE, FINE = "pre/checkpoint-1.pth", "fine/best.pth"
NO_CHECKPOINTS = {
    "empty": write(PRE, b""), "text": write(PRE, "no checkpoint"), "zip": write(PRE, b"PK\x03\x04"),
    "cut": cut(PRE), "list": lambda w: torch.save([1], w / PRE),
    "of another format": change(PRE, format_version=7),
    "of a strange format": change(PRE, format_version="x" * 500),
    "without its weights": change(PRE, model=DELETE),
    "weights that are a list": change(PRE, model=[1, 2]),
    "weights that are numbers": change(PRE, model=lambda m: dict.fromkeys(m, 1.0)),
    "settings that are text": change(PRE, config="text"),
    "a model that is a number": change(PRE, config__model=7),
    "a model that is not known": change(PRE, config__model="vit_giant"),
    "a size that is text": change(PRE, config__image_size="large"),
    "a size that is negative": change(PRE, config__image_size=-32),
    "a size that is not the weights'": change(PRE, config__image_size=64),
    "epochs that are text": change(PRE, epochs_completed="one"),
    "no settings": change(PRE, config={}), "an empty fixed set": change(PRE, fixed_set={}),
    "a fixed set of no images": change(PRE, fixed_set=lambda f: {n: x[:0] for n, x in f.items()}),
    "a fixed set of larger images": change(PRE, fixed_set__images=torch.zeros(8, 3, 64, 64).byte()),
    "a fixed set with a pattern less": change(PRE, fixed_set__pattern=lambda pattern: pattern[1:]),
    "NaN": change(PRE, model=poison(NAN)), "infinity": change(PRE, model=poison(-INF)),
    "a finetuned file": lambda w: (w / PRE).write_bytes((w / FINE).read_bytes()),
    "a folder": lambda w: ((w / PRE).unlink(), (w / PRE).mkdir()),
    "a pipe": lambda w: ((w / PRE).unlink(), os.mkfifo(w / PRE)),
    "a link to nothing": lambda w: ((w / PRE).unlink(), (w / PRE).symlink_to("nothing")),
    "a pickle of code": lambda w: torch.save({"format_version": 1, "x": Path}, w / PRE),
}  # fmt: skip
NO_FINETUNED = {
    "empty": write(FINE, b""), "cut": cut(FINE), "pretrained": lambda w: (
        (w / FINE).write_bytes((w / PRE).read_bytes())),
    "NaN": change(FINE, model=poison(NAN)), "infinity": change(FINE, model=poison(INF)),
    "shape that is text": change(FINE, shape="large"),
    "shape without its encoder": change(FINE, shape__encoder=DELETE),
    "a patch of 0 pixels": change(FINE, shape__encoder__patch_size=0),
    "a huge grid": change(FINE, shape__encoder__grid=10**9),
    "a huge number of classes": change(FINE, shape__num_classes=10**9),
    "a model that is not known": change(FINE, shape__encoder__model="vit_giant"),
    "fewer names than classes": change(FINE, classes=["one"]),
    "names that are numbers": change(FINE, classes=[1, 2, 3]),
    "colours out of range": change(FINE, palette=[[0, 0, 999]] * 3),
    "colours of two values": change(FINE, palette=[[0, 0]] * 3),
    "a protocol of text": change(FINE, protocol="x"),
    "a protocol without its window": change(FINE, protocol__window_size=DELETE),
    "a stride of 0": change(FINE, protocol__window_stride=0),
    "a normalization of its own": change(FINE, protocol__normalization="own"),
    "a dataset that is text": change(FINE, dataset="x"), "an empty dataset": change(FINE, dataset={}),
}  # fmt: skip


def sql(*statements):
    def prepare(world):
        with sqlite3.connect(world / STORE) as connection:
            connection.execute("PRAGMA ignore_check_constraints = 1")
            for statement in statements:
                connection.execute(statement)
        connection.close()

    return prepare


def rebuilt(change_rows):
    """The store's tables without their constraints, changed."""
    return sql(
        "CREATE TABLE i2 AS SELECT * FROM images", "CREATE TABLE s2 AS SELECT * FROM segments",
        "CREATE TABLE m2 AS SELECT * FROM meta", "DROP TABLE images", "DROP TABLE segments",
        "DROP TABLE meta", "ALTER TABLE i2 RENAME TO images", "ALTER TABLE s2 RENAME TO segments",
        "ALTER TABLE m2 RENAME TO meta", *change_rows,
    )  # fmt: skip


CUT = sql("UPDATE segments SET counts = x'00' WHERE id = (SELECT max(id) FROM segments)")
BOMB = f"zeroblob({50_000_000})"
STORES = {
    "empty": write(STORE, b""), "text": write(STORE, "no store"), "cut": cut(STORE, 0.6),
    "another database": lambda w: ((w / STORE).unlink(), sqlite3.connect(w / STORE).execute(
        "CREATE TABLE a (b)").connection.close()),
    "no meta": rebuilt(["DELETE FROM meta"]),
    **{f"no {name} in meta": rebuilt([f"DELETE FROM meta WHERE name='{name}'"])
       for name in ("source", "settings", "complete")},
    **{f"made for {ratios}": rebuilt(
        [f"""UPDATE meta SET value = '{{"for_coverage": {ratios}}}' WHERE name = 'settings'"""])
       for ratios in ("5", "[null]", '["x"]', "[1e400]")},
    "settings that are no JSON": rebuilt(["UPDATE meta SET value='{' WHERE name='settings'"]),
    "settings that are a list": rebuilt(["UPDATE meta SET value='[1]' WHERE name='settings'"]),
    "unfinished": rebuilt(["UPDATE meta SET value='0' WHERE name='complete'"]),
    "keys of NULL": rebuilt(["UPDATE images SET key = NULL"]),
    "keys of bytes": rebuilt(["UPDATE images SET key = x'fffe'"]),
    "keys that leave the folder": rebuilt(["UPDATE images SET key = '../../' || key"]),
    "absolute keys": rebuilt(["UPDATE images SET key = '/tmp/' || key"]),
    "heights of NULL": rebuilt(["UPDATE images SET height = NULL"]),
    "heights of text": rebuilt(["UPDATE images SET height = 'tall'"]),
    "heights below 0": rebuilt(["UPDATE images SET height = -height"]),
    "coverage of text": rebuilt(["UPDATE segments SET coverage = 'half'"]),
    "coverage of NULL": rebuilt(["UPDATE segments SET coverage = NULL"]),
    "coverage out of range": rebuilt(["UPDATE segments SET coverage = 1e9"]),
    "counts of NULL": rebuilt(["UPDATE segments SET counts = NULL"]),
    "counts of text": rebuilt(["UPDATE segments SET counts = 'abc'"]),
    "counts of noise": rebuilt(["UPDATE segments SET counts = randomblob(100)"]),
}  # fmt: skip


def run_directory(world):
    """What a run leaves, as far as status and report read it."""
    from tests.pipeline.finished_run import write_run

    paths = write_run(world / "run", methods=("patches",))
    plan = [{"name": "pretrain_patches_5", "needs": [], "folder": "pretrain_output/patches"}]
    paths.plan.write_text(json.dumps(plan))


def damaged(path, content):
    def prepare(world):
        run_directory(world)
        write(f"run/{path}", content)(world)

    return prepare
