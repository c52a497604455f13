"""Images in tars are those of the folder that they would unpack to, or refused by name."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import subprocess
import tarfile
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
from tests.tar_forms import FORMS, class_tars, put, shards, tar_of_tars

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


def test_numbers_of_classes_make_folders_unless_the_name_tells_imagenets_class(tmp_path):
    with tarfile.open(tmp_path / "a-000000.tar", "w") as tar:
        for key, label in (("0001", b"7\n"), ("n01440764_18", b"0"), ("x.y", b"cat")):
            put(tar, f"{key}.jpg", b"")
            put(tar, f"{key.partition('.')[0]}.cls", label)
        put(tar, "alone.jpg", b"")
    assert find_images(tmp_path) == ["7/0001.jpg", "alone.jpg", "cat/x.y.jpg", "n01440764/n01440764_18.jpg"]


def test_the_validation_tar_gets_the_classes_of_the_development_kit(tmp_path, monkeypatch):
    """As torchvision, which is not ours, reads that kit."""
    from scipy.io import savemat
    from torchvision.datasets import imagenet

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(n, f"n0000000{9 - n}", f"thing {n}", "what it is", 0) for n in (1, 2, 3)] + [
        (4, "n00000099", "all", "it", 3)
    ]
    kit = tmp_path / "in1k" / tars.DEVKIT
    val = kit.parent / "val"
    val.mkdir(parents=True)
    with tarfile.open(val / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (1, 2, 3, 4):
            put(tar, f"ILSVRC2012_val_{number:08d}.JPEG", bytes([number]))
    flat = find_images(val)
    assert flat[0] == "ILSVRC2012_val_00000001.JPEG" and not has_classes(val)
    meta, truth = io.BytesIO(), b"3\n1\n2\n3\n"
    savemat(meta, {"synsets": np.array(rows, dtype=fields)[:, None]})
    with tarfile.open(kit, "w:gz") as tar:
        put(tar, f"{tars.DEVKIT[:-7]}/data/meta.mat", meta.getvalue())
        put(tar, f"{tars.DEVKIT[:-7]}/data/ILSVRC2012_validation_ground_truth.txt", truth)
    names = find_images(val)  # the kit has come: the index is built anew
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)  # this is not the true kit
    imagenet.parse_devkit_archive(str(kit.parent))
    _, theirs = imagenet.load_meta_file(str(kit.parent))
    assert [name.partition("/")[0] for name in sorted(names, key=os.path.basename)] == theirs
    assert has_classes(val) and sorted(map(os.path.basename, names)) == flat
    kit.write_bytes(kit.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{tars.DEVKIT} cannot be read"):
        find_images(val)


def simple(path: Path, *names: str, **about) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            put(tar, name, name.encode(errors="surrogateescape") * 300, **about)
    return path


def cut(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)


def two_shards(train: Path, *_) -> None:
    simple(train / "a.tar", "c/one.jpg")
    simple(train / "b.tar", "c/one.jpg")


def joined(train: Path) -> None:
    path, other = simple(train / "a.tar", "one.jpg"), simple(train.parent / "b.tar", "two.jpg")
    path.write_bytes(path.read_bytes() + other.read_bytes())


def overwritten(train: Path) -> None:
    path = simple(train / "a.tar", "one.jpg", "two.jpg")
    with path.open("rb+") as file:
        file.seek(3072)
        file.write(b"x" * 512)


def sparse(train: Path) -> None:
    with (train / "one.jpg").open("wb") as file:
        file.truncate(2**20)
    subprocess.run(["tar", "--sparse", "-cf", train / "a.tar", "-C", train, "one.jpg"], check=True)
    (train / "one.jpg").unlink()


def cut_inner(train: Path) -> None:
    inner = simple(train.parent / "n1.tar", "one.jpg").read_bytes()
    with tarfile.open(train / "a.tar", "w") as tar:
        put(tar, "n1.tar", inner[:1536])


def inner_gz(train: Path) -> None:
    with tarfile.open(train / "a.tar", "w") as tar:
        put(tar, "n1.tar.gz", gzip.compress(b""))


def link(kind: bytes, target: str):
    return lambda train: simple(train / "a.tar", "one.jpg", type=kind, linkname=target, size=0)


def shard_of_class(label: bytes):
    def make(train: Path) -> None:
        with tarfile.open(train / "a.tar", "w") as tar:
            put(tar, "one.jpg", b"")
            put(tar, "one.cls", label)

    return make


REFUSED = {
    "one of two": (two_shards, "c/one.jpg is in a.tar and in b.tar; rename or remove one"),
    "twice": (lambda t: simple(t / "a.tar", "one.jpg", "one.jpg"), "one.jpg is in .*a.tar twice"),
    "cut in a member": (lambda t: cut(simple(t / "a.tar", "one.jpg"), 1000), "it was cut short at byte 1000"),
    "cut in a header": (lambda t: cut(simple(t / "a.tar", "a.jpg", "b.jpg"), 2148), "a.tar is no whole tar"),
    "cut between members": (
        lambda t: cut(simple(t / "a.tar", "a.jpg", "b.jpg"), 2048),
        "it was cut short at byte 2048, where its end mark should be",
    ),
    "empty": (lambda t: (t / "a.tar").write_bytes(b""), "a.tar is no whole tar: empty file"),
    "another file": (lambda t: (t / "a.tar").write_bytes(b"#!/bin/sh\n" * 99), "a.tar is no whole tar"),
    "damaged in the middle": (overwritten, "there is no member's header at byte 3072"),
    "joined": (joined, "something comes after its end mark"),
    "sparse": (sparse, "one.jpg in it is sparse; pack it again without --sparse"),
    "an inner one cut": (cut_inner, "a.tar: n1.tar in it is no whole tar: it was cut short at byte 2048"),
    "absolute": (lambda t: simple(t / "a.tar", "/etc/one.jpg"), "/etc/one.jpg leads out of its folder"),
    "above": (lambda t: simple(t / "a.tar", "c/../../one.jpg"), "leads out of its folder"),
    "hard link": (link(tarfile.LNKTYPE, "two.jpg"), "one.jpg in it is a link to two.jpg, no image of"),
    "link to itself": (link(tarfile.SYMTYPE, "one.jpg"), "is a link to one.jpg"),
    "link out": (link(tarfile.SYMTYPE, "../../etc/two.jpg"), "is a link to ../../etc/two.jpg"),
    "class": (shard_of_class(b"../a"), "one.cls in it is no class: '../a'"),
    "link to nothing": (lambda t: (t / "a.tar").symlink_to("none.tar"), "a.tar cannot be read: No such"),
    "compressed nothing": (lambda t: (t / "a.tgz").symlink_to("none"), "a.tgz cannot be read: No such"),
    "no image": (lambda t: simple(t / "a.tar", "one.txt"), "no image below .*, nor in the 1 tars there"),
    "tar.gz in a tar": (inner_gz, "n1.tar.gz in it is compressed, .*Unpack a.tar into another folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_in_place_is_refused_by_name(tmp_path, case):
    make, said = REFUSED[case]
    train = tmp_path / "train"
    train.mkdir()
    make(train)
    for _ in range(2):  # what was seen before is no excuse
        with pytest.raises(ValueError, match=said) as caught:
            open_images(train)
        assert len(str(caught.value).splitlines()) == 1 and str(train) in str(caught.value)
    assert not (train / tars.INDEX).exists() or case == "no image"


@pytest.mark.parametrize(("name", "pack"), [
    ("a b.tar.gz", gzip.compress), ("a.tgz", gzip.compress), ("a.tar.bz2", bz2.compress),
    ("a.txz", lzma.compress), ("a.tar", gzip.compress),
])  # fmt: skip
def test_a_compressed_tar_is_refused_with_the_command_that_unpacks_it(tmp_path, name, pack):
    plain = simple(tmp_path / "plain.tar", "c/one.jpg")
    train = tmp_path / "train"
    train.mkdir()
    (train / name).write_bytes(pack(plain.read_bytes()))
    with pytest.raises(ValueError, match="is compressed, so that no image can be read by itself") as caught:
        open_images(train)
    command = str(caught.value).partition("This unpacks it: ")[2].partition("; then")[0]
    subprocess.run(command, shell=True, check=True)
    (train / name).unlink()
    assert find_images(train) == ["c/one.jpg"]


def test_what_is_no_image_of_the_folder_is_left_out(tmp_path, caplog):
    simple(
        tmp_path / "a.tar", "./c/one.jpg", "._one.jpg", ".cache/two.jpg", "__MACOSX/c/three.jpg",
        "c/\udcff.jpg", "c/four.txt", "five.gif",
    )  # fmt: skip
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        put(tar, "c/pipe.jpg", b"", type=tarfile.FIFOTYPE)
        put(tar, "c/folder.jpg", b"", type=tarfile.DIRTYPE)
    assert find_images(tmp_path) == ["c/one.jpg"]
    assert "5 members are left out" in caplog.text


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
