"""Which images are held out, and whose segments hide them."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.images import open_images
from mae import listing
from mae.config import make_method
from mae.controls import SegmentSource
from mae.data import MaskedImages
from mae.listing import make_listing
from segments.config import FelzenszwalbSettings
from segments.felzenszwalb import Felzenszwalb
from segments.generate import generate, images_by_key
from segments.store import PackedStore
from tests.mae.conftest import make_config, pack_segments, write_image, write_segments


def draw_box(path, left):
    """A white box on black, which is the only segment that there is to find."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((48, 60, 3), np.uint8)
    pixels[10:30, left : left + 20] = 255
    Image.fromarray(pixels).save(path)


def make_segments(folder, *, val_dir):
    generator = Felzenszwalb(FelzenszwalbSettings(sigma=0.1, longest_side=60, max_coverage=50))
    out = folder / "masks/masks.sqlite"
    out.parent.mkdir()
    generate(images_by_key(folder / "train", val_dir), out, generator, processes=1)
    return PackedStore(out)


@pytest.fixture
def twins(tmp_path):
    """train/ and val/ whose images are called the same and look different."""
    folder = tmp_path / "in1k"
    for name in ("a", "b"):
        draw_box(folder / f"train/class0/{name}.png", left=2)
        draw_box(folder / f"val/class0/{name}.png", left=35)
    return folder


def listing_of(folder, out, mask_method="segments", **options):
    config = make_config(folder, out, mask_method=mask_method, **options)
    return make_listing(config.data, config.method), config


def test_a_held_out_image_hides_its_own_segment_though_a_training_image_has_its_name(twins, tmp_path):
    store = make_segments(twins, val_dir=twins / "val")
    assert store.images() == {"class0/a", "class0/b", "val/class0/a", "val/class0/b"}
    listing, config = listing_of(twins, tmp_path / "out")
    assert (len(listing.val), listing.val_left_out) == (2, 0)
    method = make_method(config.method, config.model)
    source = SegmentSource(store=store, donors=listing.train, options=config.method, seed=0)
    fixed = MaskedImages(
        folder=listing.val_folder, paths=listing.val, segments=source, method=method, seed=0,
        is_fixed=True,
    )  # fmt: skip
    for sample in (fixed[0, 0], fixed[0, 1]):
        white = sample.image[0].numpy() > 127
        assert white.any()
        assert ((sample.pattern == 0) == white).mean() > 0.97


def test_the_segments_of_a_training_image_are_lent_to_no_held_out_one(twins, tmp_path, caplog):
    make_segments(twins, val_dir=None)
    with caplog.at_level("INFO"):
        listing, _ = listing_of(twins, tmp_path / "out")
    assert (len(listing.val), listing.val_left_out) == (0, 2)
    assert "none of the 2 images" in caplog.text
    everything, _ = listing_of(twins, tmp_path / "out", "patches")
    assert (len(everything.val), everything.val_left_out) == (2, 0)


def test_segments_of_files_are_found_under_the_path_below_val(tmp_path):
    folder, rng = tmp_path / "in1k", np.random.default_rng(0)
    for split, name in (("train", "a"), ("train", "b"), ("val", "c"), ("val", "d"), ("val", "a")):
        write_image(folder / f"{split}/{name}.jpg", rng)
    for name in "abc":
        write_segments(folder / f"masks/{name}.json", rng)
    pack_segments(folder / "masks")
    listing, _ = listing_of(folder, tmp_path / "out")
    assert listing.val.tolist() == [b"c.jpg"], "d has none, and a's are of the training image"
    assert (listing.val_folder, listing.val_left_out) == (folder / "val", 2)


def test_before_the_segments_are_made_every_image_counts(twins, tmp_path):
    config = make_config(twins, tmp_path / "out", mask_method="segments")
    with pytest.raises(ValueError, match="is no folder of segments"):
        make_listing(config.data, config.method)
    listing = make_listing(config.data, config.method, packed=False)
    assert (len(listing.train), len(listing.val), listing.source) == (2, 2, None)


def test_images_are_listed_once_for_all_methods(twins, tmp_path, monkeypatch):
    walked, known = [], {}
    monkeypatch.setattr(listing, "open_images", lambda f, d: walked.append(f.name) or open_images(f, d))
    make_segments(twins, val_dir=twins / "val")
    for mask_method in ("patches", "segments", "segment_patches"):
        config = make_config(twins, tmp_path / "out", mask_method=mask_method)
        for ratio in (10.0, 30.0):
            options = replace(config.method, coverage_ratio=ratio)
            found = make_listing(config.data, options, known=known)
            assert (found.source is None) == (mask_method == "patches")
    assert walked == ["train", "val"]


def test_two_images_that_would_share_a_key_are_refused(twins):
    draw_box(twins / "train/val/class0/a.png", left=2)
    with pytest.raises(ValueError, match=r"val/class0/a; rename one"):
        make_segments(twins, val_dir=twins / "val")


def test_two_images_that_would_share_their_segments_are_refused_where_segments_are_used(twins, tmp_path):
    make_segments(twins, val_dir=None)
    draw_box(twins / "train/class0/a.jpg", left=30)
    with pytest.raises(
        ValueError, match=r"a\.jpg and class0/a\.png would have segments of the same name, class0/a"
    ):
        listing_of(twins, tmp_path / "out")
    assert len(listing_of(twins, tmp_path / "out", "patches", use_unmasked_images=True)[0].train) == 3
