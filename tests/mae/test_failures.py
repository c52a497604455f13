"""Runs that must not go on, and what they leave behind."""

import json

import numpy as np
import pytest
import torch

from common.files import hold
from common.step_files import LOCK
from mae.listing import make_listing
from mae.pretrain import pretrain
from mae.weights import load_checkpoint
from tests.mae.conftest import (
    as_annotation,
    make_config,
    pack_segments,
    read_epochs,
    write_image,
    write_segments,
)
from tests.processes import until


def _blind(rank):
    """The second process does not see what is in the folder."""
    if rank == 1:
        import mae.pretrain

        mae.pretrain.find_resumable = lambda folder: None


def test_processes_that_would_go_on_from_different_epochs_do_not_start(in1k_dir, tmp_path, processes):
    config = make_config(in1k_dir, tmp_path, batch_size=4, stop_after=1)
    assert processes.run(config) == [0]
    before = (tmp_path / "log.txt").read_text()
    config = make_config(in1k_dir, tmp_path, batch_size=4)
    codes = processes.run(config, processes=2, sabotage=_blind)
    assert codes == [1, 1]
    for rank in (0, 1):
        message = (tmp_path / f"error-{rank}.txt").read_text()
        assert "process 0: epoch 1, step 0, process 1: epoch 0, step 0" in message
    assert (tmp_path / "log.txt").read_text() == before


def _poison_step_8_of_process_1(rank):
    """The loss of one forward pass turns to NaN: epoch 3, step 2."""
    from mae.model import MaskedAutoencoder

    forward, calls = MaskedAutoencoder.forward, []

    def poisoned(self, *arguments):
        loss = forward(self, *arguments)
        if self.training:
            calls.append(1)
        return loss * float("nan") if len(calls) == 8 and rank == 1 else loss

    MaskedAutoencoder.forward = poisoned


def test_a_loss_that_is_not_finite_names_epoch_step_and_process(in1k_dir, tmp_path, processes):
    config = make_config(in1k_dir, tmp_path, batch_size=4, val_images=0)
    codes = processes.run(config, processes=2, sabotage=_poison_step_8_of_process_1)
    assert codes == [1, 1]
    for rank in (0, 1):
        message = (tmp_path / f"error-{rank}.txt").read_text()
        assert "not finite on process 1, step 2 of 3 in epoch 3" in message
    assert [record["epoch"] for record in read_epochs(tmp_path)] == [1, 2]
    kept = load_checkpoint(tmp_path / "last.pth")
    assert kept["epochs_completed"] == 2
    assert all(torch.isfinite(weight).all() for weight in kept["model"].values())
    assert '"state": "failed"' in (tmp_path / "progress.json").read_text()


@pytest.fixture
def few_images(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        write_image(tmp_path / f"in1k/train/{number:02}.jpg", rng)
        write_segments(tmp_path / f"in1k/masks/{number:02}.json", rng)
    pack_segments(tmp_path / "in1k/masks")
    return tmp_path / "in1k"


def test_one_corrupt_image_is_named_counted_and_survived(few_images, tmp_path, caplog):
    (few_images / "train/03.jpg").write_bytes(b"\xff\xd8\xff")
    assert pretrain(make_config(few_images, tmp_path / "out", epochs=2, effective_batch_size=4))
    assert [record["unreadable_images"] for record in read_epochs(tmp_path / "out")] == [1, 1]
    assert caplog.text.count("skipped an unreadable image: 03.jpg") == 1


def test_more_than_one_percent_corrupt_stops_the_run(few_images, tmp_path):
    for number in (3, 5):
        (few_images / f"train/{number:02}.jpg").write_bytes(b"\xff\xd8\xff")
    config = make_config(few_images, tmp_path / "out", epochs=2, effective_batch_size=4)
    with pytest.raises(RuntimeError, match=r"2 of 12 images are unreadable .*03\.jpg"):
        pretrain(config)
    assert not (tmp_path / "out/last.pth").exists()


def test_an_image_whose_segment_file_is_empty_is_left_out(few_images, tmp_path):
    for number in (2, 3, 4):
        (few_images / f"masks/{number:02}.json").write_text("[]" + " " * 300)
    pack_segments(few_images / "masks")
    config = make_config(few_images, tmp_path / "out", effective_batch_size=4)
    assert len(make_listing(config.data, config.method).train) == 9


def test_the_wrong_folder_of_segments_is_refused(few_images, tmp_path):
    for number in range(9):
        (few_images / f"masks/{number:02}.json").unlink()
    pack_segments(few_images / "masks")
    config = make_config(few_images, tmp_path / "out", effective_batch_size=2)
    with pytest.raises(ValueError, match=r"9 of 12 images have no segment .*00\.jpg.*right --masks-dir"):
        pretrain(config)
    allowed = make_config(few_images, tmp_path / "out", effective_batch_size=2, allow_missing_segments=True)
    assert len(make_listing(allowed.data, allowed.method).train) == 3


def test_images_that_a_list_accounts_for_are_not_missing(few_images, tmp_path):
    for number in range(9):
        (few_images / f"masks/{number:02}.json").unlink()
    names = "".join(f"{number:02}\n" for number in range(9))
    (few_images / "masks/emptyfiles.txt").write_text(names)
    pack_segments(few_images / "masks")
    config = make_config(few_images, tmp_path / "out", effective_batch_size=2)
    assert len(make_listing(config.data, config.method).train) == 3


@pytest.fixture(scope="module")
def finished(in1k_dir, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("finished")
    assert pretrain(make_config(in1k_dir, output_dir, epochs=2, stop_after=1))
    return output_dir


@pytest.mark.parametrize(
    ("option", "value"),
    [("base_lr", 0.5), ("epochs", 3), ("mask_method", "segments"), ("seed", 1), ("image_size", 48),
     ("coverage_ratio", 30.0), ("effective_batch_size", 4), ("norm_pix_loss", True)],
)  # fmt: skip
def test_other_settings_are_refused_by_name(in1k_dir, finished, option, value):
    options = {"epochs": 2, option: value}
    with pytest.raises(ValueError, match=rf"other settings \(.*{option}: .* -> {value}"):
        pretrain(make_config(in1k_dir, finished, **options))


@pytest.mark.parametrize(
    "options",
    [{"workers": 1}, {"batch_size": 2}, {"mask_ratio": 0.5}, {"save_every_minutes": 9.0}],
)
def test_settings_that_change_nothing_are_not_compared(in1k_dir, finished, options):
    assert pretrain(make_config(in1k_dir, finished, epochs=2, stop_after=1, **options))


def test_other_images_are_refused(few_images, tmp_path):
    options = {"epochs": 2, "effective_batch_size": 4}
    assert pretrain(make_config(few_images, tmp_path / "out", stop_after=1, **options))
    write_image(few_images / "train/99.jpg", np.random.default_rng(0))
    write_segments(few_images / "masks/99.json", np.random.default_rng(0))
    pack_segments(few_images / "masks")
    with pytest.raises(ValueError, match="12 then, 13 now"):
        pretrain(make_config(few_images, tmp_path / "out", **options))


def test_resume_never_and_required_keep_their_word(in1k_dir, finished, tmp_path):
    with pytest.raises(ValueError, match=r"never: .*last\.pth is there already"):
        pretrain(make_config(in1k_dir, finished, epochs=2, resume="never"))
    with pytest.raises(ValueError, match="required: there is no checkpoint"):
        pretrain(make_config(in1k_dir, tmp_path, epochs=2, resume="required"))
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(in1k_dir, tmp_path, processes):
    config = make_config(in1k_dir, tmp_path, epochs=10000)
    (first,) = processes.start(config)
    try:
        until((tmp_path / "last.pth").exists)
        with pytest.raises(ValueError, match=f"process {first.pid} on .* already works in"):
            pretrain(config)
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    with hold(tmp_path / LOCK, tmp_path):
        pass


def test_an_epoch_that_hid_nothing_ends_the_run(tmp_path):
    folder, rng = tmp_path / "in1k", np.random.default_rng(0)
    for number in range(8):
        write_image(folder / f"train/image_{number}.jpg", rng)
        path = folder / f"masks/image_{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([as_annotation(np.ones((48, 60), np.uint8))]))
    pack_segments(folder / "masks")
    config = make_config(folder, tmp_path / "out", hide="background")  # of the whole image nothing is left
    with pytest.raises(RuntimeError, match="epoch 1 hid nothing of any image"):
        pretrain(config)
    assert not list((tmp_path / "out").glob("*.pth"))
