from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pipeline.datasets import SegmentationData, image_files, link_image_subset, link_pair_subset

from pipeline.doctor import Finding, examine, findings_text
from pipeline.estimate import EvaluationCost, PretrainCost
from pipeline.sample import SampleSize, write_sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    size = SampleSize(train=8, val=2, segmentation_train=4, segmentation_val=2)
    write_sample(folder, size)
    return folder


def subjects_to_fix(**given: object) -> list[str]:
    return [f.subject for f in examine({"masks_dir": None, **given}) if f.fix]


def test_a_machine_without_flags_is_examined() -> None:
    subjects = [finding.subject for finding in examine({})]
    assert {"python", "torch", "devices", "processors", "memory"} <= set(subjects)


def test_good_folders_need_no_fixing(sample: Path) -> None:
    assert subjects_to_fix(in1k_dir=sample / "in1k", mask_method=("segments",)) == []
    assert subjects_to_fix(eval_dataset=sample / "segmentation/dataset.yml") == []


def test_missing_segments_are_found(sample: Path, tmp_path: Path) -> None:
    given = {"in1k_dir": sample / "in1k", "mask_method": ("segments",)}
    assert subjects_to_fix(**given, masks_dir=tmp_path / "nowhere") == ["segments"]
    assert subjects_to_fix(**given, masks_dir=tmp_path) == ["segments"]


def test_broken_images_and_missing_annotations_are_found(tmp_path: Path) -> None:
    size = SampleSize(train=4, val=1, segmentation_train=3, segmentation_val=1)
    write_sample(tmp_path, size)
    image_files(tmp_path / "in1k/train")[0].write_bytes(b"\xff\xd8 no image")
    (tmp_path / "segmentation/annotations/training/training_0001.png").unlink()
    assert subjects_to_fix(in1k_dir=tmp_path / "in1k") == ["images"]
    found = subjects_to_fix(eval_dataset=tmp_path / "segmentation/dataset.yml")
    assert found == ["sample, train"]


def test_an_incomplete_ade20k_is_found(tmp_path: Path) -> None:
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        for split in ("training", "validation"):
            file = tmp_path / kind / split / f"ADE_1.{suffix}"
            file.parent.mkdir(parents=True)
            Image.new("L", (8, 8)).save(file)
    found = [finding for finding in examine({"ade20k_dir": tmp_path}) if finding.fix]
    assert [finding.subject for finding in found] == ["ADE20K, train", "ADE20K, val"]
    assert "20210" in found[0].fix


def test_more_gpus_than_there_are_is_found() -> None:
    assert subjects_to_fix(num_gpus=64, num_processes=1) == ["devices"]


def test_more_workers_than_cores_is_found() -> None:
    assert subjects_to_fix(num_gpus=0, pretrain={"workers": 10_000}) == ["processors"]


def test_what_to_fix_is_marked_with_its_remedy() -> None:
    found = [Finding(subject="a", text="good"), Finding(subject="bb", text="bad", fix="do it")]
    assert findings_text(found).splitlines() == [
        *("ok   a   good", "FIX  bb  bad", "         -> do it", "1 to fix"),
    ]


def test_subsets_are_links_in_the_same_layout(sample: Path, tmp_path: Path) -> None:
    assert link_image_subset(sample / "in1k", 3, tmp_path / "in1k") == 3
    assert len(image_files(tmp_path / "in1k/train")) == 3
    assert (tmp_path / "in1k/masks/emptyfiles.txt").exists()
    data = SegmentationData.open(sample / "segmentation/dataset.yml")
    path = link_pair_subset(data, {"train": 2, "val": 1}, tmp_path / "pairs")
    subset = SegmentationData.open(path)
    assert [len(list(subset.pairs(split))) for split in ("train", "val")] == [2, 1]
    assert all(label.exists() for _, label in subset.pairs("train"))


def test_splits_that_are_lists_of_one_folder_are_kept_apart(sample: Path, tmp_path: Path) -> None:
    """As Pascal Context has them."""
    lists = ("train", "val")
    description = yaml.safe_load((sample / "segmentation/dataset.yml").read_text())
    for kind in ("images", "annotations"):
        description[kind] = dict.fromkeys(lists, description[kind]["train"])
    there = SegmentationData.open(sample / "segmentation/dataset.yml").pairs("train")
    names = [image.stem for image, _ in there]
    description["splits"] = {split: f"{split}.txt" for split in lists}
    folder = tmp_path / "data"
    shutil.copytree(sample / "segmentation", folder)
    for split, chosen in zip(lists, (names[:3], names[3:4]), strict=True):
        (folder / f"{split}.txt").write_text("\n".join(chosen))
    (folder / "dataset.yml").write_text(yaml.safe_dump(description))
    data = SegmentationData.open(folder / "dataset.yml")
    assert [image.stem for image, _ in data.pairs("train")] == names[:3]
    assert [image.stem for image, _ in data.pairs("val")] == names[3:4]
    subset = SegmentationData.open(
        link_pair_subset(data, {"train": 2, "val": 1}, tmp_path / "subset")
    )
    assert [len(list(subset.pairs(split))) for split in ("train", "val")] == [2, 1]
    assert all(label.exists() for split in lists for _, label in subset.pairs(split))
    (folder / "val.txt").unlink()
    with pytest.raises(ValueError, match="list of val names"):
        list(data.pairs("val"))


def test_costs_grow_with_images_epochs_and_scorings() -> None:
    assert PretrainCost(fixed=5, per_image=0.01).seconds(images=100, epochs=3) == 8
    cost = EvaluationCost(fixed=5, per_train_image=0.01, per_val_image=0.1)
    assert cost.seconds(train=100, epochs=2, val=10, evaluations=3) == 10
