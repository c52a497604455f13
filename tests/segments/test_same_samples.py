"""Pretraining sees the same samples whatever form its segments were packed from."""

import shutil

import pytest

from segments.forms import open_any_form
from segments.pack import pack
from segments.segment import nearest

pytestmark = pytest.mark.slow

EPOCHS = 2


@pytest.fixture
def in1k(sample, tmp_path):
    """The images that have PNGs with a table, beside those, RLE JSON, and a store of each."""
    masks = tmp_path / "in1k/masks"
    shutil.copytree(sample / "masks", masks)
    for path in [masks, *masks.rglob("*")]:
        path.chmod(0o755)
    for folder in masks.glob("*/*"):
        name = f"{folder.parent.name}/{folder.name}"
        for source, kind in (("train", "JPEG"), ("masks-amg-rle", "json")):
            to = tmp_path / "in1k" / source / f"{name}.{kind}"
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sample / source / f"{name}.{kind}", to)
    pack(masks, tmp_path / "table.sqlite", overwrite=False, allow_damaged=False, processes=1)
    pack(
        tmp_path / "in1k/masks-amg-rle", tmp_path / "json.sqlite",
        overwrite=False, allow_damaged=False, processes=1,
    )  # fmt: skip
    return tmp_path / "in1k"


class Files:
    """What a store is asked, answered from the files."""

    def __init__(self, folder):
        self.folder = open_any_form(folder)

    def nearest(self, key, ratio):
        return nearest(self.folder.segments(key), ratio)


def samples_of(in1k, masks_dir, ratio, files=None):
    """Every sample of every epoch, as pretraining gets them; files: read them instead."""
    from mae.config import DataConfig, MethodConfig, ModelConfig, make_method
    from mae.controls import SegmentSource
    from mae.data import MaskedImages
    from mae.listing import make_listing

    wanted = MethodConfig(mask_method="segments", coverage_ratio=ratio)
    method = make_method(wanted, ModelConfig(model="vit_tiny", image_size=64))
    listing = make_listing(DataConfig(in1k_dir=in1k, masks_dir=masks_dir), wanted)
    segments = SegmentSource(store=files or listing.source, donors=listing.train, options=wanted, seed=3)
    images = MaskedImages(
        folder=in1k / "train", paths=listing.train, segments=segments, method=method, seed=3
    )
    return [
        (images.paths[index], images[epoch, index]) for epoch in range(EPOCHS) for index in range(len(images))
    ]


@pytest.mark.parametrize("ratio", [5.0, 15.0, 60.0])
def test_samples_are_the_same_whatever_form_was_packed(in1k, tmp_path, ratio):
    import torch

    table = tmp_path / "table.sqlite"
    reference = samples_of(in1k, table, ratio, Files(in1k / "masks"))
    assert len(reference) == EPOCHS * 23
    assert any(sample.hidden_pixels for _, sample in reference)
    for others in (
        samples_of(in1k, table, ratio),
        samples_of(in1k, tmp_path / "json.sqlite", ratio),
        samples_of(in1k, table, ratio, Files(in1k / "masks-amg-rle")),
    ):
        for (path, one), (other_path, other) in zip(reference, others, strict=True):
            assert path == other_path
            assert torch.equal(one.image, other.image)
            assert (one.pattern == other.pattern).all()
            assert not one.unreadable
            assert not other.unreadable
