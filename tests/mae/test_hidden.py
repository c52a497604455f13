"""What log.txt says of what is hidden, against pixels counted one by one."""

import numpy as np
import pytest
from scipy import ndimage

from common.images import find_images
from mae.config import MethodConfig, ModelConfig, make_method
from mae.controls import SegmentSource
from mae.crops import Crop
from mae.data import MaskedImages
from mae.hidden import GRID, Hidden
from mae.listing import encode_paths
from segments.forms import open_segments
from segments.store import segment_key

MODEL = ModelConfig(model="vit_tiny", image_size=64, patch_size=16)


def images_of(in1k_dir, mask_method="segments", **options):
    options = MethodConfig(mask_method=mask_method, **options)
    store = open_segments(in1k_dir / "masks")
    found = find_images(in1k_dir / "train")
    paths = encode_paths([path for path in found if segment_key(path) in store.images()])
    source = SegmentSource(store=store, donors=paths, options=options, seed=3)
    method = make_method(options, MODEL)
    segments = source if method.uses_segments else None
    return MaskedImages(folder=in1k_dir / "train", paths=paths, segments=segments, method=method, seed=3)


def by_pixels(images, epochs):
    """Share of pixels ever hidden: each looked up in each crop of it, forwards."""
    shares = []
    for index in range(len(images)):
        ever = None
        for epoch in range(epochs):
            image, pattern = images.draw(epoch, index)
            visible = images.method.visible_map(np_to_torch(pattern))[0, 0].numpy()
            ever = np.zeros((image.height, image.width), bool) if ever is None else ever
            crop: Crop = image.crop
            for y in range(crop.height):
                for x in range(crop.width):
                    row = int((y + 0.5) * 64 / crop.height)
                    column = int((x + 0.5) * 64 / crop.width)
                    column = 63 - column if crop.flip else column
                    ever[crop.top + y, crop.left + x] |= visible[row, column] == 0
        shares.append(ever.mean())
    return 100 * np.mean(shares)


def np_to_torch(pattern):
    import torch

    return torch.from_numpy(pattern[None])


@pytest.mark.parametrize("options", [{}, {"segments_from": "blob"}, {"mask_method": "patches"}])
def test_the_share_ever_hidden_is_that_of_the_pixels(in1k_dir, options):
    images = images_of(in1k_dir, **options)
    hidden = Hidden(images)
    for epoch in range(3):
        told = hidden.in_epoch(epoch)
    assert told["ever_hidden_percent"] == pytest.approx(by_pixels(images, 3), abs=1.5)


def test_a_stopped_run_goes_on_with_what_was_hidden_before(in1k_dir):
    images = images_of(in1k_dir, segments_from="block")
    whole, late = Hidden(images), Hidden(images)
    told = [whole.in_epoch(epoch) for epoch in range(5)]
    assert late.in_epoch(4) == told[4]
    shares = [one["ever_hidden_percent"] for one in told]
    assert shares == sorted(shares)


def test_what_varies_hides_more_of_an_image_in_time(in1k_dir):
    shares = {}
    for source in ("own", "blob"):
        for variety in ("fixed", "nearest-1"):
            hidden = Hidden(images_of(in1k_dir, segments_from=source, segment_variety=variety))
            told = [hidden.in_epoch(epoch) for epoch in range(12)]
            shares[source, variety] = told[-1]["ever_hidden_percent"]
    assert shares["own", "fixed"] == shares["own", "nearest-1"]
    # A crop that shows more of the segment than of the noise takes more of that.
    assert shares["blob", "fixed"] < 3 * shares["own", "fixed"]
    assert shares["blob", "nearest-1"] > 1.8 * shares["blob", "fixed"]


def test_islands_and_edges_are_counted_in_the_crop(in1k_dir):
    images = images_of(in1k_dir)
    islands, at_edges = [], []
    for index in range(len(images)):
        hidden = images.draw(0, index)[1] == 0
        islands.append(ndimage.label(hidden, np.ones((3, 3)))[1])
        edges = [hidden[0], hidden[-1], hidden[:, 0], hidden[:, -1]]
        at_edges.append(sum(edge.any() for edge in edges) >= 2)
    told = Hidden(images).in_epoch(0)
    assert told["hidden_islands"] == np.median(islands)
    assert told["hidden_at_edges_percent"] == pytest.approx(100 * np.mean(at_edges))


def test_a_damaged_image_is_left_out_and_none_at_all_says_nothing(in1k_dir, monkeypatch):
    hidden = Hidden(images_of(in1k_dir))

    def damaged(self, epoch, index):
        raise ValueError("x")

    monkeypatch.setattr(MaskedImages, "draw", damaged)
    assert hidden.in_epoch(0) == {}
    assert not hidden.ever.any()
    assert hidden.ever.shape[1:] == (GRID, GRID)
