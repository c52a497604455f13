"""A run on tars is the run on the folder that they would unpack to."""

import os
import signal
from functools import partial

import pytest
import torch

from mae.check import check_pretraining
from mae.pretrain import Pretraining
from mae.reconstruct import reconstruct_files
from segments.check import check
from segments.config import FelzenszwalbSettings
from segments.felzenszwalb import Felzenszwalb
from segments.generate import generate, images_by_key
from segments.store import PackedStore
from tests.mae.conftest import assert_same_weights, make_config, read_epochs
from tests.tar_forms import shards, tar_of_tars, trees


@pytest.fixture(scope="module")
def in_tars(in1k_dir, tmp_path_factory):
    """The same images: train/ as ILSVRC2012's tar of tars, val/ as shards; the same masks/."""
    folder = tmp_path_factory.mktemp("in_tars")
    tar_of_tars(in1k_dir / "train", folder / "train")
    shards(in1k_dir / "val", folder / "val", count=2)
    (folder / "masks").symlink_to(in1k_dir / "masks")
    return folder


@pytest.mark.parametrize("method", ["patches", "four_channels", "segment_patches"])
def test_listing_order_and_samples_are_the_folders(in1k_dir, in_tars, tmp_path, method):
    of_folder, of_tars = (
        Pretraining(make_config(folder, tmp_path / "out", mask_method=method))
        for folder in (in1k_dir, in_tars)
    )
    assert of_tars.listing.digest == of_folder.listing.digest
    assert of_tars.listing.val.tolist() == of_folder.listing.val.tolist()
    assert of_tars.plan(2).__dict__ == of_folder.plan(2).__dict__
    for ours, theirs in ((of_tars.train_set, of_folder.train_set), (of_tars.heldout, of_folder.heldout)):
        for index in range(len(theirs)):
            one, other = ours[1, index], theirs[1, index]
            assert torch.equal(one.image, other.image) and (one.pattern == other.pattern).all()
            assert not one.unreadable


def killed_after(tars, steps):
    """Ends the process, as nobody can prevent, after some reads of images."""
    read, count = tars.Tars.read, []

    def read_or_die(self, name):
        count.append(name)
        if len(count) > steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, name)

    tars.Tars.read = read_or_die


def sabotage(steps, rank):
    from common import tars

    killed_after(tars, steps)


@pytest.mark.slow
def test_weights_and_log_are_the_folders_also_killed_and_resumed(in1k_dir, in_tars, tmp_path, processes):
    whole, resumed = (make_config(at, tmp_path / at.name) for at in (in1k_dir, in_tars))
    assert processes.run(whole) == [0]
    # In the third of four epochs: 24 images and 5 held out in each, some looked at for the log.
    assert processes.run(resumed, sabotage=partial(sabotage, 150)) == [-signal.SIGKILL]
    assert 1 <= len(read_epochs(resumed.run.output_dir)) < 4
    assert processes.run(resumed) == [0]
    assert read_epochs(resumed.run.output_dir) == read_epochs(whole.run.output_dir)
    for name in ("checkpoint-4.pth", "last.pth"):
        assert_same_weights(resumed.run.output_dir / name, whole.run.output_dir / name)


@pytest.mark.slow
def test_two_processes_with_workers_train_the_same(in1k_dir, in_tars, tmp_path, processes):
    more = {"batch_size": 2, "workers": 1, "epochs": 2}
    both = [make_config(at, tmp_path / at.name, **more) for at in (in1k_dir, in_tars)]
    assert [processes.run(config, processes=2) for config in both] == [[0, 0], [0, 0]]
    one, other = (config.run.output_dir for config in both)
    assert read_epochs(one) == read_epochs(other)
    assert_same_weights(one / "checkpoint-2.pth", other / "checkpoint-2.pth")
    # Their pictures: of an image as the tars call it, and of the file.
    name = "train/class0/image_0.jpg"
    for folder, out in ((in1k_dir, one), (in_tars, other)):
        masks = folder / "masks"
        reconstruct_files(one / "checkpoint-2.pth", [folder / name], out=out / "a.png", masks_dir=masks)
    assert (one / "a.png").read_bytes() == (other / "a.png").read_bytes()
    with pytest.raises(ValueError, match=r"train/class0/none\.jpg is in none of the tars there"):
        reconstruct_files(
            one / "checkpoint-2.pth", [in_tars / "train/class0/none.jpg"], out=other / "b.png", masks_dir=None
        )


def test_segments_are_made_and_checked_alike(in1k_dir, in_tars, tmp_path):
    generator = Felzenszwalb(FelzenszwalbSettings())
    stores = []
    for folder in (in1k_dir, in_tars):
        out = tmp_path / f"{folder.name}.sqlite"
        generate(images_by_key(folder / "train", folder / "val"), out, generator, processes=1)
        stores.append(PackedStore(out))
    one, other = stores
    assert one.images() == other.images() and one.images()
    assert all(one.segments(key) == other.segments(key) for key in one.images())
    found = [
        check(folder, folder / "masks", tmp_path / f"{folder.name}.txt", processes=1)
        for folder in (in1k_dir, in_tars)
    ]
    assert found[0] == found[1]


def test_a_damaged_image_in_a_tar_is_named_and_replaced(in1k_dir, tmp_path, processes):
    import shutil

    shutil.copytree(in1k_dir / "train", tmp_path / "images")
    (tmp_path / "images/class0/image_0.jpg").write_bytes(b"no image")
    trees(tmp_path / "images", tmp_path / "in1k/train")
    facts = check_pretraining(
        config := make_config(tmp_path / "in1k", tmp_path / "out", mask_method="patches", epochs=1),
        processes=1,
    )
    assert facts.train == 26
    assert processes.run(config) == [0]
    assert read_epochs(tmp_path / "out")[0]["unreadable_images"] == 1
