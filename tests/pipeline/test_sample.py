from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as rle

from pipeline.plan.sample import CLASSES, write_sample

SIZE = {"train": 12, "val": 3, "segmentation_train": 6, "segmentation_val": 3}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, **SIZE)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_files(sample: Path, tmp_path: Path) -> None:
    write_sample(tmp_path / "again", **SIZE)
    write_sample(tmp_path / "other", **SIZE, seed=1)
    assert digest(tmp_path / "again") == digest(sample)
    assert digest(tmp_path / "other") != digest(sample)


def test_every_training_image_has_a_list_of_segments(sample: Path) -> None:
    images = sorted((sample / "in1k/train").rglob("*.JPEG"))
    assert len(images) == SIZE["train"]
    for image in images:
        relative = image.relative_to(sample / "in1k/train").with_suffix(".json")
        assert isinstance(json.loads((sample / "in1k/masks" / relative).read_text()), list)


def test_segments_are_what_sam_writes_and_overlap(sample: Path) -> None:
    lists = [json.loads(p.read_text()) for p in (sample / "in1k/masks").rglob("*.json")]
    overlapping = 0
    for segments in filter(None, lists):
        total = np.zeros(segments[0]["segmentation"]["size"])
        for segment in segments:
            decoded = rle.decode(segment["segmentation"])
            assert decoded.sum() == segment["area"]
            x, y, width, height = segment["bbox"]
            assert decoded[y : y + height + 1, x : x + width + 1].sum() == segment["area"]
            total += decoded
        overlapping += total.max() > 1
    assert overlapping == len(lists) - 1


def test_one_image_has_no_segment_and_is_listed(sample: Path) -> None:
    listed = (sample / "in1k/masks/emptyfiles.txt").read_text().split()
    empty = [p.stem for p in (sample / "in1k/masks").rglob("*.json") if p.read_text() == "[]\n"]
    assert [Path(name).stem for name in listed] == empty
    assert len(empty) == 1


def test_one_image_is_greyscale(sample: Path) -> None:
    modes = [Image.open(path).mode for path in (sample / "in1k/train").rglob("*.JPEG")]
    assert sorted(modes) == ["L", *["RGB"] * (SIZE["train"] - 1)]


def test_every_pixel_has_a_class(sample: Path) -> None:
    description = yaml.safe_load((sample / "segmentation/dataset.yml").read_text())
    assert tuple(description["classes"]) == CLASSES
    assert len(description["palette"]) == len(CLASSES)
    for split, count in (("train", SIZE["segmentation_train"]), ("val", SIZE["segmentation_val"])):
        root = sample / "segmentation"
        images = sorted((root / description["images"][split]).glob("*.jpg"))
        labels = sorted((root / description["annotations"][split]).glob("*.png"))
        assert len(images) == len(labels) == count
        assert [path.stem for path in images] == [path.stem for path in labels]
        for label in labels:
            assert np.asarray(Image.open(label)).max() < len(CLASSES)


def test_what_is_there_is_left_alone_and_nothing_half_made_stays(tmp_path: Path) -> None:
    (tmp_path / "in1k").mkdir()
    (tmp_path / "in1k/mine").write_text("x")
    write_sample(tmp_path, **SIZE)
    assert [path.name for path in (tmp_path / "in1k").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in1k", "segmentation"]
