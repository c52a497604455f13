"""Pretraining sees the same samples whatever form its segments are kept in."""

import shutil

import pytest

from mae.segments.pack import pack

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


def samples_of(in1k, masks_dir, ratio):
    """Every sample of every epoch, as pretraining gets them."""
    from mae.config import DataConfig, MethodConfig, ModelConfig, make_method
    from mae.data import MaskedImages
    from mae.listing import make_listing

    wanted = MethodConfig(mask_method="segments", coverage_ratio=ratio)
    method = make_method(wanted, ModelConfig(model="vit_tiny", image_size=64))
    listing = make_listing(DataConfig(in1k_dir=in1k, masks_dir=masks_dir), method)
    images = MaskedImages(
        in1k / "train", listing.train, listing.source, method=method, wanted=wanted, seed=3
    )
    return [
        (images.relative_path(index), images[epoch, index])
        for epoch in range(EPOCHS)
        for index in range(len(images))
    ]


@pytest.mark.parametrize("ratio", [5.0, 15.0, 60.0])
def test_samples_are_the_same_whatever_the_form(in1k, tmp_path, ratio):
    import torch

    reference = samples_of(in1k, in1k / "masks", ratio)
    assert len(reference) == EPOCHS * 23
    assert any(sample.hidden_pixels for _, sample in reference)
    for form in ("table.sqlite", "json.sqlite", "in1k/masks-amg-rle"):
        for (path, one), (other_path, other) in zip(
            reference, samples_of(in1k, tmp_path / form, ratio), strict=True
        ):
            assert path == other_path
            assert torch.equal(one.image, other.image)
            assert (one.pattern == other.pattern).all()
            assert not one.unreadable
            assert not other.unreadable
