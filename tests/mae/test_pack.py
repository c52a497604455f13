"""Shards hold the images of the folder or parquet files that they were made of, perhaps shrunk."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.images import find_images, open_images, read_content, read_rgb
from mae import pack
from mae.data import Sample
from mae.pack import PackOptions, pack_images, shrink
from mae.pretrain import Pretraining
from segments.check import check
from tests.mae.conftest import make_config
from tests.tar_forms import tar_of_tars

FEW = PackOptions(images_per_shard=10, processes=1)


def photograph(path: Path, width: int, height: int, seed=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.mark.parametrize("form", ["folder", "tars"])
def test_shards_hold_the_names_bytes_and_classes_of_the_folder(in1k_dir, tmp_path, form):
    source = in1k_dir / "train"
    if form == "tars":
        tar_of_tars(source, tmp_path / "tars")
        source = tmp_path / "tars"
    said = pack_images(source, tmp_path / "packed/train", FEW)
    assert said.startswith(f"{tmp_path / 'packed/train'}: 26 images in 3 shards")
    images = open_images(tmp_path / "packed/train")
    assert images.names == find_images(in1k_dir / "train")
    for name in images.names:
        assert read_content(images.source / name) == (in1k_dir / "train" / name).read_bytes()
    shards = sorted((tmp_path / "packed/train").glob("*.tar"))
    assert [path.name for path in shards] == [f"train-00000{n}.tar" for n in range(3)]
    with tarfile.open(shards[1]) as tar:
        members = tar.getnames()
        label = tar.extractfile(
            next(name for name in members if name.startswith("class1/") and ".cls" in name)
        )
        assert label.read() == b"1" and len(members) == 2 * 9
    assert {name.split("/")[0] for name in members} == {"class0", "class1", "class2"}


def test_webdataset_reads_image_and_class(in1k_dir, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the shards' own library")
    pack_images(in1k_dir / "train", tmp_path / "train", FEW)
    found = {}
    for path in sorted((tmp_path / "train").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
            found[sample["__key__"]] = sample["cls"]
    assert found == {
        name.removesuffix(".jpg"): int(name[len("class")]) for name in find_images(in1k_dir / "train")
    }


def test_a_killed_packing_goes_on_and_other_settings_are_refused(in1k_dir, tmp_path):
    out, words = tmp_path / "train", ["--images-per-shard", "2", "--processes", "1"]
    command = [
        sys.executable,
        "-m",
        "mae",
        "images",
        "pack",
        str(in1k_dir / "train"),
        "--out",
        str(out),
        *words,
    ]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 2 and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(before) >= 2
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "26 images in 13 shards" in done.stdout, done.stderr
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}.items()
    assert find_images(out) == find_images(in1k_dir / "train")
    assert {path.suffix for path in out.iterdir()} == {".tar", ".json", ".sqlite"}
    for options, said in (
        (PackOptions(images_per_shard=3), "images_per_shard: 2 -> 3"),
        (PackOptions(images_per_shard=2, short_side=32), "short_side: None -> 32"),
    ):
        with pytest.raises(ValueError, match=f"was packed otherwise: .*{said}"):
            pack_images(in1k_dir / "train", out, options)
    with pytest.raises(ValueError, match="was packed otherwise: images: "):
        pack_images(in1k_dir / "val", out, PackOptions(images_per_shard=2))


def test_a_signal_ends_it_after_a_shard(in1k_dir, tmp_path, monkeypatch):
    write = pack._write_shard

    def write_and_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(pack, "_write_shard", write_and_signal)
    assert pack_images(in1k_dir / "train", tmp_path / "train", FEW) is None
    assert len(list((tmp_path / "train").glob("*.tar"))) == 1


@pytest.mark.parametrize("there", ["a stranger's file", "the source"])
def test_nothing_of_others_is_written_into(in1k_dir, tmp_path, there):
    out = tmp_path if there == "a stranger's file" else in1k_dir / "train/packed"
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="--out"):
        pack_images(in1k_dir / "train", out, FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert not (in1k_dir / "train/packed").exists()


def test_what_does_not_come_back_from_the_disk_is_no_shard(in1k_dir, tmp_path, monkeypatch):
    check, calls = pack._check, []

    def damage_and_check(path, written):
        content = bytearray(path.read_bytes())
        content[2000] ^= 1
        path.write_bytes(content)
        calls.append(path)
        check(path, written)

    monkeypatch.setattr(pack, "_check", damage_and_check)
    with pytest.raises(RuntimeError, match="does not hold what was written into it"):
        pack_images(in1k_dir / "train", tmp_path / "train", FEW)
    assert calls and not list((tmp_path / "train").glob("*.tar*"))


def test_images_are_shrunk_to_the_short_side_and_smaller_ones_left_alone(tmp_path):
    source, out = tmp_path / "train", tmp_path / "packed"
    sizes = {
        "c/wide.jpg": (500, 200),
        "c/high.JPEG": (150, 333),
        "c/small.jpg": (90, 100),
        "c/drawn.png": (300, 400),
    }
    for seed, (name, size) in enumerate(sizes.items()):
        photograph(source / name, *size, seed=seed)
    (source / "c/broken.jpg").write_bytes(b"no image")
    said = pack_images(source, out, PackOptions(short_side=100, processes=1))
    assert "5 images in 1 shards" in said and "3 shrunk now" in said
    images = open_images(out)
    assert images.names == ["c/broken.jpg", "c/drawn.jpg", "c/high.JPEG", "c/small.jpg", "c/wide.jpg"]
    shapes = {name: read_rgb(images.source / name).shape[:2] for name in images.names[1:]}
    assert shapes == {
        "c/drawn.jpg": (133, 100), "c/high.JPEG": (222, 100), "c/small.jpg": (100, 90),
        "c/wide.jpg": (100, 250),
    }  # fmt: skip
    for name in ("c/small.jpg", "c/broken.jpg"):
        assert read_content(images.source / name) == (source / name).read_bytes()
    # As Pillow's own reduction has it, to what JPEG loses.
    with Image.open(source / "c/wide.jpg") as whole:
        expected = np.asarray(whole.resize((250, 100), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(read_rgb(images.source / "c/wide.jpg") - expected).mean() < 4


def test_too_many_that_cannot_be_read_are_said(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / f"train/{name}.jpg").write_bytes(b"no image")
    with pytest.raises(
        RuntimeError, match=r"2 of 2 images cannot be read: a\.jpg .*they are packed as they were"
    ):
        pack_images(tmp_path / "train", tmp_path / "out", PackOptions(short_side=100, processes=1))
    photograph(tmp_path / "two/a.png", 300, 300)
    photograph(tmp_path / "two/a.jpg", 300, 300)
    with pytest.raises(ValueError, match=r"two images would be called a\.jpg: rename one"):
        pack_images(tmp_path / "two", tmp_path / "out2", PackOptions(short_side=100, processes=1))


@pytest.mark.parametrize("method", ["four_channels", "segment_patches"])
@pytest.mark.parametrize("source", ["own", "blob", "block", "borrowed"])
def test_segments_made_before_images_were_shrunk_are_cut_where_they_were(in1k_dir, tmp_path, method, source):
    """The crop of a shrunk image shows the same part; what is hidden differs by rounding only."""
    shrunk = tmp_path / "in1k"
    pack_images(in1k_dir / "train", shrunk / "train", PackOptions(short_side=32, processes=1))
    (shrunk / "masks").symlink_to(in1k_dir / "masks")
    made = [
        Pretraining(
            make_config(folder, tmp_path / "out", mask_method=method, segments_from=source, val_images=0)
        ).train_set
        for folder in (in1k_dir, shrunk)
    ]
    assert made[0].paths.tolist() == made[1].paths.tolist()
    agree, pixels = [], []
    for index in range(len(made[0])):
        one, other = (images[0, index] for images in made)
        assert isinstance(one, Sample) and not other.unreadable
        agree.append(np.mean(one.pattern == other.pattern) if method == "four_channels" else 1)
        pixels.append((one.image.float() - other.image.float()).abs().mean().item())
    assert np.mean(agree) > 0.93  # a segment's edge of a pixel, on 32 x 32
    assert np.mean(pixels) < 6  # of 255


def test_segments_of_another_image_are_still_refused(in1k_dir, tmp_path):
    shrunk = tmp_path / "in1k"
    pack_images(in1k_dir / "train", shrunk / "train", PackOptions(short_side=32, processes=1))
    checked, left = check(shrunk, in1k_dir / "masks", tmp_path / "offenders.txt", processes=1)
    assert left == 0 and sum("segments" in said for said in checked.values()) == 2  # those that have none
    assert not any("pixels" in said for said in checked.values())
    photograph(tmp_path / "other/train/class0/image_0.jpg", 60, 40)
    checked, _ = check(tmp_path / "other", in1k_dir / "masks", tmp_path / "o.txt", processes=1)
    assert "its segments are 60x48" in checked["class0/image_0.jpg"]


def _parquet(path: Path, rows) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [{"bytes": content, "path": name} for name, content, _ in rows],
        "label": [r[2] for r in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def test_parquet_files_of_imagenet_become_its_class_folders(in1k_dir, tmp_path):
    pytest.importorskip("pyarrow", reason="it reads parquet files")
    content = [(in1k_dir / "train" / name).read_bytes() for name in find_images(in1k_dir / "train")]
    names = [f"n0144076{n % 2}_{n}_n0144076{n % 2}.JPEG" for n in range(5)]
    rows = [(name, one, n % 2) for n, (name, one) in enumerate(zip(names, content, strict=False))]
    _parquet(tmp_path / "data/train-00000-of-00002.parquet", rows[:3])
    _parquet(tmp_path / "data/train-00001-of-00002.parquet", rows[3:])
    val = [("ILSVRC2012_val_00000293_n01440764.JPEG", content[5], 0), (None, content[6], 1)]
    _parquet(tmp_path / "data/validation-00000-of-00001.parquet", val)
    with pytest.raises(ValueError, match="has parquet files of train, validation: choose one by --split"):
        pack_images(tmp_path / "data", tmp_path / "train", FEW)
    assert "5 images in 2 shards" in pack_images(
        tmp_path / "data", tmp_path / "train", PackOptions(split="train")
    )
    images = open_images(tmp_path / "train")
    assert images.names == [f"n0144076{n % 2}/n0144076{n % 2}_{n}.JPEG" for n in (0, 2, 4, 1, 3)]
    assert read_content(images.source / images.names[1]) == content[2]
    pack_images(tmp_path / "data", tmp_path / "val", PackOptions(split="validation"))
    assert find_images(tmp_path / "val") == [
        "1/validation-00000-of-00001-000001.jpg", "n01440764/ILSVRC2012_val_00000293.JPEG"
    ]  # fmt: skip
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"train-0\.parquet has no rows with `image`"):
        pack_images(tmp_path / "bad", tmp_path / "out", FEW)
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_without_pyarrow_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="read by pyarrow, which is not installed: pip install pyarrow"):
        pack_images(tmp_path, tmp_path.parent / "out", FEW)


def test_a_shrunk_image_is_upright():
    stored, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (400, 200)).save(stored, "JPEG", exif=exif)
    smaller = Image.open(io.BytesIO(shrink(stored.getvalue(), 100, 90)))
    assert smaller.size == (100, 200) and not smaller.getexif()
