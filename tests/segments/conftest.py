"""The sample's segments in all forms, and a small folder of them to damage."""

import json
import multiprocessing
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SAMPLE = Path(__file__).resolve().parents[2] / "../shared/data/imagenet-sample"
IMAGES_TO_DAMAGE = 6


@pytest.fixture(scope="session")
def sample():
    if not SAMPLE.is_dir():
        pytest.skip("the sample of ImageNet is not beside this repository")
    return SAMPLE.resolve()


@pytest.fixture(scope="session")
def packed_table(sample, tmp_path_factory):
    """The PNGs with a table, packed."""
    from segments.pack import pack

    out = tmp_path_factory.mktemp("packed") / "table.sqlite"
    pack(sample / "masks", out, overwrite=False, allow_damaged=False, processes=2)
    return out


@pytest.fixture
def json_folder(sample, tmp_path):
    """Six images' RLE JSON, writable."""
    return copy_images(sample / "masks-amg-rle", tmp_path / "masks", "*/*.json")


@pytest.fixture
def table_folder(sample, tmp_path):
    """Six images' PNGs with a table, writable."""
    return copy_images(sample / "masks", tmp_path / "masks", "*/*")


@pytest.fixture
def images(tmp_path):
    """Five images of boxes, in two class folders and one more level."""
    rng = np.random.default_rng(0)
    names = ["a/one.jpg", "a/two.png", "b/three.jpg", "b/deep/four.jpg", "b/five.jpg"]
    for name in names:
        pixels = np.full((48, 64, 3), rng.integers(0, 256, 3), np.uint8)
        for _ in range(3):
            y, x = rng.integers(0, 30), rng.integers(0, 40)
            pixels[y : y + 16, x : x + 20] = rng.integers(0, 256, 3)
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def copy_images(source, target, pattern):
    found = sorted(path for path in source.glob(pattern) if path.is_file() or path.is_dir())
    for path in found[:IMAGES_TO_DAMAGE]:
        to = target / path.relative_to(source)
        if path.is_dir():
            shutil.copytree(path, to)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755)
    return target


@pytest.fixture
def masks_command(capsys, caplog):
    """Run `python -m segments ...` in this process: exit code, and all it said."""
    from segments.cli import main

    def run(*arguments):
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err + caplog.text

    return run


@pytest.fixture
def in_child():
    """Call a function in a forked process; its exit code, negative: the signal that killed it."""

    def call(function, *arguments):
        process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        process.start()
        process.join(240)
        assert process.exitcode is not None
        return process.exitcode

    return call


@pytest.fixture(scope="session")
def photograph():
    """Pixels as a generator gets them."""
    from segments.generate import InputImage

    def make(pixels, key="image", ratios=()):
        height, width = pixels.shape[:2]
        return InputImage(key=key, pixels=pixels, height=height, width=width, ratios=ratios)

    return make


@pytest.fixture(scope="session")
def dump():
    """All that a store says, by key: what equal stores have in common."""

    def read(path):
        with sqlite3.connect(path) as connection:
            images = connection.execute(
                "SELECT key, height, width, segments FROM images ORDER BY key"
            ).fetchall()
            segments = connection.execute(
                "SELECT key, coverage, counts FROM segments JOIN images ON image = images.id "
                "ORDER BY key, segments.id"
            ).fetchall()
            failures = connection.execute("SELECT * FROM failures ORDER BY key").fetchall()
        connection.close()
        return images, segments, failures

    return read


@pytest.fixture(scope="session")
def read_json():
    return lambda path: json.loads(path.read_text())
