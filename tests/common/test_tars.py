"""Images in tars are those of the folder that they would unpack to, or refused by name."""

import json
import os
import pickle
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import tars
from common.files import beside
from common.images import find_images, has_classes, locate_image, open_images, read_reduced, read_rgb
from tests.processes import ended, start, until
from tests.tar_forms import FORMS, class_tars, cut, shards, simple, tar_of_tars

LONG = "long-" + "x" * 180  # more than a header has room for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of ImageNet's names, one image linked to another."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(7):
        path = folder / f"n0000000{number % 2}" / f"n0000000{number % 2}_{number * 37}.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    for name in (LONG, "zwei-äöü"):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(folder / f"n00000001/{name}.png")
    os.link(path, folder / "n00000000/n00000000_hard.JPEG")
    (folder / "n00000000/n00000000_soft.JPEG").symlink_to(path.name)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_tars_have_the_names_and_bytes_of_the_folder(folder, tmp_path, form):
    train = tmp_path / "train"
    FORMS[form](folder, train)
    images = open_images(train)
    assert images.names == find_images(folder)
    for name in images.names:
        content = (folder / name).read_bytes()
        assert (images.source / name).read_bytes() == content
    assert (read_rgb(images.source / name) == read_rgb(folder / name)).all()
    assert (read_reduced(images.source / name, 4)[0] == read_reduced(folder / name, 4)[0]).all()
    assert str(images.source / name) == f"{train}/{name}" and (images.source / name).name == Path(name).name
    # By names that begin with the folder's own, as segments know held-out images.
    above = images.source.parent
    assert (above / f"train/{name}").read_bytes() == content
    assert locate_image(train / name).read_bytes() == content
    again = pickle.loads(pickle.dumps(images.source))  # as a loader process may get it
    assert (again / name).read_bytes() == content
    assert has_classes(train) and has_classes(folder) and not has_classes(folder / "n00000000")
    with pytest.raises(ValueError, match=r"train/n00000009/none\.jpg is in none of the tars there"):
        (images.source / "n00000009/none.jpg").read_bytes()


@pytest.mark.parametrize("form", ["tar of tars", "shards"])
def test_ratarmount_finds_the_same_offsets(folder, tmp_path, form):
    ratarmount = pytest.importorskip("ratarmountcore.mountsource.formats.tar", reason="the index's oracle")
    train = tmp_path / "train"
    FORMS[form](folder, train)
    images = open_images(train).source.tars
    found = {}
    for path in sorted(train.glob("*.tar")):
        theirs = ratarmount.SQLiteIndexedTar(
            path, recursive=True, stripRecursiveTarExtension=True, writeIndex=False
        )
        waiting = ["/"]
        while waiting:
            below = waiting.pop()
            for name, about in theirs.list(below).items():
                if about.mode & 0o170000 == 0o040000:
                    waiting.append(f"{below}{name}/")
                elif name.lower().endswith((".jpeg", ".png")):
                    found[name] = (about.userdata[-1].offset, about.size)
    with sqlite3.connect(images.index) as index:
        rows = index.execute("SELECT name, start, size FROM images").fetchall()
    assert {name.rpartition("/")[2]: (start, size) for name, start, size in rows} == found
    assert len(found) == len(find_images(folder))


def test_webdataset_reads_the_shards_that_the_index_reads(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the shards' own library")
    shards(folder, tmp_path / "train")
    found = {}
    for path in sorted((tmp_path / "train").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            suffix = next(key for key in sample if key in ("jpeg", "png"))
            found[f"{sample['cls'].decode()}/{sample['__key__']}"] = sample[suffix]
    images = open_images(tmp_path / "train")
    ours = {name.rpartition(".")[0]: (images.source / name).read_bytes() for name in images.names}
    assert ours == found


def test_image_files_come_before_tars(folder, tmp_path, caplog):
    simple(tmp_path / "a.tar", "c/one.jpg")
    (tmp_path / "two.jpg").write_bytes(b"")
    assert find_images(tmp_path) == ["two.jpg"] and not (tmp_path / tars.INDEX).exists()
    assert "1 tars are left out, since there are image files: a.tar" in caplog.text


def test_an_index_is_built_once_and_again_when_a_tar_was_changed(folder, tmp_path, monkeypatch):
    scanned, scan = [], tars.scan
    monkeypatch.setattr(tars, "scan", lambda *a: scanned.append(a[-1].path) or scan(*a))
    monkeypatch.setattr(tars, "in_order", lambda work, items, processes: map(work, items))
    shards(folder, tmp_path / "train", count=2)
    images = open_images(tmp_path / "train")
    assert scanned == ["train-000000.tar", "train-000001.tar"]
    assert open_images(tmp_path / "train").names == images.names and len(scanned) == 2
    changed = tmp_path / "train/train-000001.tar"
    stamp = changed.stat().st_mtime_ns
    simple(changed, "c/new.jpg")
    os.utime(changed, ns=(stamp, stamp + 1))
    with pytest.raises(
        ValueError, match=r"train-000001.tar: it was changed after it was indexed; start again"
    ):
        for name in images.names:
            (images.source / name).read_bytes()
    assert "c/new.jpg" in find_images(tmp_path / "train") and len(scanned) == 4
    # Cut while it is open: the size is that of the index, the bytes are not there.
    images = open_images(tmp_path / "train")
    (images.source / "c/new.jpg").read_bytes()
    cut(changed, 600)
    with pytest.raises(ValueError, match=r"c/new.jpg cannot be read: .*train-000001.tar: it was cut short"):
        (images.source / "c/new.jpg").read_bytes()
    (tmp_path / "train/train-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: train-000000\.tar: No such file"):
        (images.source / next(n for n in images.names if n.startswith("n0"))).read_bytes()


def test_an_interrupted_index_goes_on(folder, tmp_path, monkeypatch):
    scanned, scan = [], tars.scan

    def fails_at_the_third(*arguments):
        scanned.append(arguments[-1].inner)
        if len(scanned) == 3:
            raise KeyboardInterrupt
        return scan(*arguments)

    monkeypatch.setattr(tars, "scan", fails_at_the_third)
    monkeypatch.setattr(tars, "SECONDS_PER_COMMIT", 0)
    monkeypatch.setattr(tars, "in_order", lambda work, items, processes: map(work, items))
    tar_of_tars(folder, tmp_path / "train")
    with pytest.raises(KeyboardInterrupt):
        open_images(tmp_path / "train")
    assert find_images(tmp_path / "train") == find_images(folder)
    assert scanned == ["", "n00000000.tar", "n00000001.tar", "n00000001.tar"]
    assert {path.name for path in (tmp_path / "train").iterdir()} == {"ILSVRC2012_img_train.tar", tars.INDEX}


def _build(train, go, rank):
    until(go.exists)
    return 0 if len(find_images(train)) == 400 else 1


def test_processes_that_come_at_once_build_one_index(tmp_path):
    from functools import partial

    for number in range(4):
        simple(tmp_path / f"train/{number}.tar", *(f"c/{number}-{n}.jpg" for n in range(100)))
    processes = start(partial(_build, tmp_path / "train", tmp_path / "go"), 3)
    (tmp_path / "go").touch()
    assert ended(processes) == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        "0.tar",
        "1.tar",
        "2.tar",
        "3.tar",
        "tars.sqlite",
    ]


def test_who_waits_for_the_index_does_not_keep_its_builder_from_it(tmp_path, monkeypatch):
    simple(tmp_path / "train/0.tar", "c/0.jpg")
    comes, lock = threading.Event(), tars._lock
    monkeypatch.setattr(tars, "_lock", lambda store: (comes.set(), lock(store)))
    monkeypatch.setattr(tars, "WAIT_SECONDS", 10.0)
    # Of three that came at once, one stood here, and the others shared what it wanted alone: for an hour.
    with closing(sqlite3.connect(beside(tmp_path / "train" / tars.INDEX), timeout=5)) as builder:
        builder.execute("BEGIN IMMEDIATE")
        builder.execute("CREATE TABLE of_its (own)")
        with ThreadPoolExecutor() as pool:
            found = pool.submit(find_images, tmp_path / "train")
            comes.wait()
            time.sleep(0.3)
            builder.commit()
            builder.close()
            assert found.result() == ["c/0.jpg"]


def test_where_tars_lie_read_only_the_index_lies_elsewhere(folder, tmp_path, monkeypatch, caplog):
    class_tars(folder, tmp_path / "in1k/train")
    access = os.access  # the tests may run as root, who may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "in1k" not in str(path) and access(path, mode))
    (tmp_path / "out").mkdir()
    for index_dir, where in ((tmp_path / "out", tmp_path / "out"), (None, None), (tmp_path / "none", None)):
        images = open_images(tmp_path / "in1k/train", index_dir)
        assert images.names == find_images(folder)
        assert images.source.tars.index.parent == where or (
            where is None and "segmae-tars-" in str(images.source.tars.index)
        )
        assert (where is None) == ("is kept for this process alone" in caplog.text)
    assert not (tmp_path / "in1k/train" / tars.INDEX).exists() and not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", ["cut", "of another version"])
def test_a_damaged_index_is_built_anew_and_a_strangers_file_is_not_replaced(folder, tmp_path, damage):
    shards(folder, tmp_path)
    index = open_images(tmp_path).source.tars.index
    if damage == "cut":
        cut(index, 5000)
    else:
        with sqlite3.connect(index) as connection:
            connection.execute("PRAGMA user_version = 99")
    assert find_images(tmp_path) == find_images(folder)
    index.write_text(json.dumps({"mine": 1}))
    with pytest.raises(ValueError, match=r"tars.sqlite is in the way"):
        open_images(tmp_path)
    assert index.read_text() == '{"mine": 1}'


def test_more_tars_than_a_process_may_open_are_read_in_turn(tmp_path, monkeypatch):
    for number in range(3):
        simple(tmp_path / f"{number}.tar", f"c/{number}.jpg")
    images = open_images(tmp_path)
    opened, real = [], tars.open_regular

    def at_most_two(path):
        if len(images.source.tars._files) == 2:
            raise OSError(24, "Too many open files")
        opened.append(path.name)
        return real(path)

    monkeypatch.setattr(tars, "open_regular", at_most_two)
    for _ in range(2):
        assert [(images.source / n).read_bytes()[:7].decode() for n in images.names] == images.names
    assert opened == ["0.tar", "1.tar", "2.tar", "0.tar", "1.tar", "2.tar"][: len(opened)]
