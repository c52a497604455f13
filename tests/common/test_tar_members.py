"""What a tar holds is taken as it would be unpacked, or refused by name."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from common import tars
from common.images import find_images, has_classes, open_images
from tests.tar_forms import cut, put, simple


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
