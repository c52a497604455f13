import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from segmenter.dataset import DESCRIPTIONS, quiet_imports, read_classes, read_description
from segmenter.labels import check_labels, check_split, read_label_file
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
        ({"reduce_zero_label": True}, "ignore_index 3 is the class"),
        ({"reduce_zero_label": "no"}, "reduce_zero_label: .*boolean, not 'no'"),
        ({"images": {"tests": "x"}}, "images.*'train', 'val' or 'test', not 'tests'"),
        ({"label_map": {7: 3}, "ignore_index": 255}, "label_map has the class 3, and there are 0 to 2"),
        ({"label_map": {"road": 0}}, "label_map.*integer"),
        ({"label_map": {7: 0}, "reduce_zero_label": True, "ignore_index": 255}, "or reduce_zero_label"),
        ({"colour_labels": True}, "colour_labels needs a palette"),
        ({"colour_labels": True, "palette": [[1, 2, 3]] * 3}, r"two classes have the colour \[1, 2, 3\]"),
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


NUMBERS = {
    "ade20k": 150, "cityscapes": 19, "pascal_context": 60, "voc2012": 21, "coco_stuff164k": 171, "camvid": 11,
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), NUMBERS.items())
def test_the_datasets_that_come_along_have_their_classes(name, number):
    description = read_description(DESCRIPTIONS / f"{name}.yml")
    assert len(read_classes(description).names) == description.num_classes == number
    unknown_number = dataclasses.replace(description, classes="CocoStuff")  # asks mmsegmentation
    with pytest.raises(ValueError, match="mmsegmentation has no dataset CocoStuff"):
        _ = unknown_number.num_classes


def test_cityscapes_suffixes_and_city_folders_make_pairs(tmp_path):
    shutil.copy(DESCRIPTIONS / "cityscapes.yml", tmp_path / "dataset.yml")
    for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
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


# Each ready description against its own layout --------------------------------------------------

LAYOUTS = {
    "cityscapes": {
        "leftImg8bit/{split}/aachen/a_{n}_leftImg8bit.png": None,
        "gtFine/{split}/aachen/a_{n}_gtFine_labelIds.png": {0: 255, 7: 0, 8: 1, 26: 13, 33: 18},
    },
    "voc2012": {"JPEGImages/{split}{n}.jpg": None,
                "SegmentationClass/{split}{n}.png": {0: 0, 1: 1, 20: 20, 255: 255}},
    "pascal_context": {"JPEGImages/{split}{n}.jpg": None,
                       "SegmentationClassContext/{split}{n}.png": {0: 0, 1: 1, 59: 59, 255: 255}},
    "coco_stuff164k": {"images/{split}2017/{n}.jpg": None,
                       "annotations/{split}2017/{n}.png": {0: 0, 10: 10, 12: 11, 181: 170, 11: 255}},
    "camvid": {"{split}/{n}.png": None, "{split}annot/{n}.png": {0: 0, 1: 1, 10: 10, 11: 11}},
}  # fmt: skip
LISTS = {
    "voc2012": "ImageSets/Segmentation/{split}.txt",
    "pascal_context": "ImageSets/SegmentationContext/{split}.txt",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_of_a_known_layout_needs_no_file(tmp_path, name, command):
    for split in ("train", "val"):
        for number in "12":
            for pattern, labels in LAYOUTS[name].items():
                path = tmp_path / pattern.format(split=split, n=number)
                path.parent.mkdir(parents=True, exist_ok=True)
                values = np.array([list(labels or range(6))] * 4, np.uint8)
                image = Image.fromarray(values)
                if labels is None:
                    width = len(next(value for value in LAYOUTS[name].values() if value))
                    image = Image.new("RGB", (width, 4))
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        if name in LISTS:
            path = tmp_path / LISTS[name].format(split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{split}1\n{split}2\n")
    outcome = command("prepare", "check", tmp_path)
    assert (outcome.code, "all sound" in outcome.out) == (0, True), outcome.err
    description = read_description(tmp_path)
    assert description.name == name
    labels = next(value for value in LAYOUTS[name].values() if value)
    pair = description.val[0]
    found = description.as_classes(read_label_file(pair.annotation, description))[0]
    assert found.tolist() == list(labels.values())
    wanted = [number for number, label in labels.items() if label != description.ignored]
    assert [
        description.file_labels[label] for label in labels.values() if label != description.ignored
    ] == wanted


def test_a_folder_of_no_known_layout_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"has none of the layouts of ade20k, camvid, cityscapes"):
        read_description(tmp_path)


def test_the_map_of_cityscapes_is_that_of_its_scripts():
    """cityscapesscripts.helpers.labels: (name, id, trainId) of those that count."""
    ids = {"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
           "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25,
           "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33}  # fmt: skip
    description = read_description(DESCRIPTIONS / "cityscapes.yml")
    names = read_classes(description).names
    assert {names[label]: number for number, label in description.label_map.items()} == ids


def test_coco_stuff_skips_the_numbers_that_coco_never_used():
    """COCO's 182 ids less those of street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door,
    blender and hair brush; numbers in the files are ids less 1."""
    unused = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]
    description = read_description(DESCRIPTIONS / "coco_stuff164k.yml")
    names = read_classes(description).names
    kept = [number - 1 for number in range(1, 183) if number not in unused]
    assert description.label_map == {number: place for place, number in enumerate(kept)}
    assert [names[description.label_map[number]] for number in (0, 13, 89)] == [
        "person",
        "parking meter",
        "toothbrush",
    ]


def test_labels_are_merged_by_a_map_and_what_it_has_not_is_ignored(tmp_path):
    path = write_dataset(tmp_path, classes=["a", "b"], label_map={0: 0, 1: 0, 2: 1}, ignore_index=255)
    description = read_description(path)
    labels = np.array([0, 1, 2, 3, 255], np.uint8)
    assert description.as_classes(labels).tolist() == [0, 0, 1, 255, 255]
    assert description.file_labels.tolist() == [0, 2]  # as predictions are saved
    assert description.ignored == 255


def test_two_numbers_are_ignored_beside_a_reduced_zero(tmp_path):
    """As mmsegmentation: 0 and 255 become 255; ignore_index is the file's, too."""
    labels = np.array([0, 1, 2, 3, 200, 255], np.uint8)
    for ignore_index, expected in ((255, [255, 0, 1, 2, 199, 255]), (200, [255, 0, 1, 2, 255, 255])):
        path = write_dataset(tmp_path, reduce_zero_label=True, ignore_index=ignore_index)
        description = read_description(path)
        assert description.as_classes(labels).tolist() == expected
        assert np.flatnonzero(description.allowed).tolist() == sorted({0, 1, 2, 3, ignore_index, 255})
        assert description.file_labels.tolist() == [1, 2, 3]


def test_colours_are_labels_by_their_palette(tmp_path):
    palette = [[90, 0, 30], [200, 30, 40], [90, 160, 220]]
    path = write_dataset(tmp_path, palette=palette, colour_labels=True, ignore_index=255)
    numbers = {}
    for file in sorted((tmp_path / "annotations").rglob("*.png")):
        labels = np.asarray(Image.open(file))
        numbers[file] = np.where(labels == 3, 255, labels)
        Image.fromarray(np.array([*palette, [1, 2, 3]], np.uint8)[labels]).save(file)
    description = read_description(path)
    for split in ("train", "val"):
        check_labels(description, description.pairs(split), completely=True)
    for file, expected in numbers.items():
        assert np.array_equal(read_label_file(file, description), expected)
    assert description.ignored == 255


def test_a_test_split_is_scored_where_there_is_one(tmp_path, finished, command):
    folders = {"train": "training", "val": "validation", "test": "training"}
    path = write_dataset(
        tmp_path,
        images={split: f"images/{name}" for split, name in folders.items()},
        annotations={split: f"annotations/{name}" for split, name in folders.items()},
    )
    words = ("evaluate", finished / "best.pth", "--dataset", path, "--device", "cpu", "--split")
    outcome = command(*words, "test", "--out", tmp_path / "test.json")
    assert outcome.code == 0, outcome.err
    assert command(*words, "train", "--out", tmp_path / "train.json").code == 0
    assert (tmp_path / "test.json").read_text() == (tmp_path / "train.json").read_text()
    outcome = command("prepare", "check", path)
    assert "7 train pairs, 3 val pairs, 7 test pairs, all sound" in outcome.out
