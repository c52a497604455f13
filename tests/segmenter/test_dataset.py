import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from segmenter.dataset import (
    DESCRIPTIONS,
    check_labels,
    check_split,
    quiet_imports,
    read_classes,
    read_description,
)
from tests.segmenter.boxes import write_dataset


def change(path, **changes):
    path.write_text(json.dumps({**yaml.safe_load(path.read_text()), **changes}))  # is YAML, too


def test_pairs_come_sorted_with_their_annotations(dataset):
    pairs = read_description(dataset).pairs("train")
    assert [pair.name for pair in pairs] == [f"{number:03d}" for number in range(7)]
    assert all(pair.image.is_file() and pair.annotation.is_file() for pair in pairs)


def test_an_empty_split_is_named(own_dataset):
    shutil.rmtree(own_dataset.parent / "images/validation")
    with pytest.raises(ValueError, match="the val images are missing"):
        read_description(own_dataset).pairs("val")
    (own_dataset.parent / "images/validation").mkdir()
    with pytest.raises(ValueError, match=r"no \*\.jpg in .*validation"):
        read_description(own_dataset).pairs("val")


def test_a_file_of_0_bytes_is_named(own_dataset):
    (own_dataset.parent / "images/training/001.jpg").write_bytes(b"")
    description = read_description(own_dataset)
    with pytest.raises(ValueError, match=r"001\.jpg cannot be read as an image: it is empty"):
        check_labels(description, description.pairs("train"), completely=True)


def test_a_colour_annotation_is_refused(own_dataset):
    path = own_dataset.parent / "annotations/training/000.png"
    Image.open(path).convert("RGB").save(path)
    description = read_description(own_dataset)
    with pytest.raises(ValueError, match="labels have one channel"):
        check_labels(description, description.pairs("train"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clases": ["a", "b"]}, "there is no 'clases'; did you mean classes"),
        ({"classes": []}, "classes.*at least 2 items"),
        ({"classes": "NoSuchDataset"}, "mmsegmentation has no dataset NoSuchDataset"),
        ({"palette": [[1, 2, 3]]}, "1 colours for 3 classes"),
        ({"palette": [[1, 2, 300]] * 3}, "palette.*less than or equal to 255"),
        ({"ignore_index": 999}, "ignore_index: .*, not 999"),
        ({"ignore_index": 1}, "ignore_index 1 is the class .* reduce_zero_label"),
        ({"reduce_zero_label": True}, "ignore_index has to be 255"),
        ({"reduce_zero_label": "no"}, "reduce_zero_label: .*boolean, not 'no'"),
        ({"images": {"test": "x"}}, "images.*'train' or 'val', not 'test'"),
    ],
)
def test_a_wrong_description_is_explained(own_dataset, changes, message):
    change(own_dataset, **changes)
    with pytest.raises(ValueError, match=message):
        read_classes(read_description(own_dataset))


def test_classes_without_a_palette_get_distinct_colours(dataset):
    palette = read_classes(read_description(dataset)).palette
    assert len({tuple(colour) for colour in palette}) == 3


def test_camvid_keeps_its_own_void_label(camvid):
    description = read_description(camvid)
    assert (description.ignore_index, len(description.classes)) == (11, 11)
    assert len(description.pairs("train")) == 100
    assert len(description.pairs("val")) == 30


def test_an_ade20k_folder_is_used_where_it_lies(ade20k):
    description = read_description(ade20k)
    assert len(description.pairs("val")) == 3
    classes = read_classes(description)
    assert len(classes.names) == 150
    assert classes.names[:4] == ("wall", "building", "sky", "floor")
    with pytest.raises(ValueError, match="the train images are missing"):
        description.pairs("train")


@pytest.mark.parametrize(("name", "number"), [("ade20k", 150), ("cityscapes", 19), ("pascal_context", 60)])
def test_the_datasets_that_come_along_have_their_classes(name, number):
    description = read_description(DESCRIPTIONS / f"{name}.yml")
    assert len(read_classes(description).names) == description.num_classes == number
    unknown_number = dataclasses.replace(description, classes="CocoStuff")  # asks mmsegmentation
    with pytest.raises(ValueError, match="mmsegmentation has no dataset CocoStuff"):
        _ = unknown_number.num_classes


def test_cityscapes_suffixes_and_city_folders_make_pairs(tmp_path):
    shutil.copy(DESCRIPTIONS / "cityscapes.yml", tmp_path / "dataset.yml")
    for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelTrainIds")):
        path = tmp_path / kind / "train/aachen" / f"aachen_000001_{suffix}.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (4, 4)).save(path)
    (pair,) = read_description(tmp_path / "dataset.yml").pairs("train")
    assert pair.name == "aachen/aachen_000001"


def test_several_suffixes_make_pairs_of_one_split(tmp_path):
    path = write_dataset(tmp_path, train=4, val=0, image_suffix=[".jpg", ".JPG"])
    first, second = (tmp_path / f"images/training/00{number}.jpg" for number in (0, 1))
    first.rename(first.with_suffix(".JPG"))
    pairs = read_description(path).pairs("train")
    assert [pair.image.name for pair in pairs] == ["000.JPG", "001.jpg", "002.jpg", "003.jpg"]
    second.rename(second.with_name("000.jpg"))
    with pytest.raises(ValueError, match=r"000\.JPG and 000\.jpg have the same name"):
        read_description(path).pairs("train")


def test_images_and_annotations_may_share_a_folder(tmp_path):
    path = write_dataset(tmp_path, train=2, val=0)
    for image in (tmp_path / "images/training").iterdir():
        (tmp_path / f"annotations/training/{image.stem}.png").rename(image.with_name(f"{image.stem}_L.png"))
        Image.open(image).save(image.with_suffix(".png"))
        image.unlink()
    folder = {"train": "images/training"}
    change(path, annotations=folder, image_suffix=".png", annotation_suffix="_L.png")
    assert [pair.name for pair in read_description(path).pairs("train")] == ["000", "001"]


def test_one_percent_of_the_files_may_be_left_over_and_is_named(tmp_path, caplog):
    path = write_dataset(tmp_path, train=101, val=0)
    (tmp_path / "images/training/050.jpg").unlink()
    assert len(read_description(path).pairs("train")) == 100
    assert "left out: 1 of 101 train annotations have no image *.jpg: 050.png" in caplog.text


def test_classes_that_never_occur_are_named_with_how_many_pairs_were_looked_at(own_dataset, caplog):
    change(own_dataset, classes=["ground", "box", "sky", "sea"], ignore_index=255)
    description = read_description(own_dataset)
    check_split(description, "train", description.train, most=2)
    assert "3 of 7 train annotations were looked at; 1 of 4" not in caplog.text  # the ignored 3 is sea
    change(own_dataset, classes=["ground", "box", "sky", "-", "sea"])
    description = read_description(own_dataset)
    check_split(description, "train", description.train, most=2)
    assert "3 of 7 train annotations were looked at; 1 of 5 classes are in none of them: sea." in caplog.text


def test_with_reduce_zero_label_0_and_255_are_both_ignored_as_mmsegmentation_has_it(own_dataset):
    change(own_dataset, classes=["box", "sky"], reduce_zero_label=True, ignore_index=255)
    description = read_description(own_dataset)
    labels = np.array([0, 1, 2, 255], np.uint8)
    with quiet_imports():
        from mmseg.datasets.transforms import LoadAnnotations
    peer, path = LoadAnnotations(imdecode_backend="pillow"), own_dataset.with_name("labels.png")
    Image.fromarray(labels[None]).save(path)
    loaded = peer({"seg_map_path": str(path), "reduce_zero_label": True, "seg_fields": []})
    assert description.as_classes(labels).tolist() == loaded["gt_seg_map"].tolist() == [255, 0, 1, 255]
    assert np.flatnonzero(description.allowed).tolist() == [0, 1, 2, 255]


def test_lossy_annotations_are_taken_when_told(own_dataset):
    for path in (own_dataset.parent / "annotations/training").iterdir():
        Image.new("L", Image.open(path).size, 1).save(path, "JPEG")
    change(own_dataset, lossy_annotations=True)
    description = read_description(own_dataset)
    assert check_labels(description, description.train)[:, 1].all()


def test_split_lists_choose_from_a_shared_folder(tmp_path):
    path = write_dataset(tmp_path, train=4, val=0, splits={"train": "train.txt"})
    (tmp_path / "train.txt").write_text("\ufeff003\n001\n")  # as Windows' editors begin a file
    assert [pair.name for pair in read_description(path).pairs("train")] == ["003", "001"]
    (tmp_path / "train.txt").write_text("003\n009\n")
    with pytest.raises(ValueError, match=r"lists 1 images that are not there: .*009\.jpg"):
        read_description(path).pairs("train")
