import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.schedule import BatchPlan
from engine.task import load
from segmenter.config import ProtocolConfig
from segmenter.data import TrainingCrops, WholeImages, collate, start_worker
from segmenter.dataset import read_description
from tests.segmenter.boxes import write_dataset

PROTOCOL = ProtocolConfig(
    image_size=40, crop_size=48, window_size=32, window_stride=24, normalization="imagenet"
)


def crops(path, seed=0, protocol=PROTOCOL):
    description = read_description(path)
    return TrainingCrops(description, description.pairs("train"), protocol, seed)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


def test_a_sample_depends_on_seed_epoch_and_index_only(dataset):
    first = crops(dataset)[3, 2]
    np.random.seed(99)
    random.seed(99)
    assert equal(first, crops(dataset)[3, 2])
    assert not equal(first, crops(dataset)[4, 2])
    assert not equal(first, crops(dataset, seed=1)[3, 2])


def red_squares(folder, *by_column):
    """A dataset of red images of 48 x 48 pixels; by_column: the labels [48] of each."""
    path = write_dataset(folder, train=len(by_column))
    for number, labels in enumerate(by_column):
        pixels = np.full((48, 48, 3), (120, 60, 60), np.uint8)
        Image.fromarray(pixels).save(folder / f"images/training/{number:03d}.jpg", quality=100)
        labels = np.repeat(np.array(labels, np.uint8)[None], 48, 0)
        Image.fromarray(labels).save(folder / f"annotations/training/{number:03d}.png")
    return path


def test_crops_are_scaled_mirrored_and_coloured_as_mmsegmentations_for_ade20k(tmp_path):
    """Half to twice the size, one of two mirrored, other colours; read as RGB."""
    stripes = np.arange(48) // 4 % 3  # 0, 1, 2 from left to right, each 4 pixels wide
    protocol = dataclasses.replace(PROTOCOL, image_size=48, crop_size=24)
    found = crops(red_squares(tmp_path, stripes), protocol=protocol)
    widths, mirrored, colours = [], [], []
    for epoch in range(60):
        crop = found[epoch, 0]
        row = crop.labels[0].int()
        steps = row.diff()
        at = steps.nonzero()[:, 0]
        widths.append((at[-1] - at[0]).item() / (len(at) - 1))
        mirrored.append(steps[at[0]].item() % 3 == 2)
        colours.append(crop.image.double().mean((1, 2)))
    assert 1.8 < min(widths) < 2.8
    assert 6 < max(widths) < 9
    assert 0.3 < np.mean(mirrored) < 0.7
    by_channel = torch.stack(colours).T
    assert (by_channel[0] > by_channel[1:].max(0).values).double().mean() > 0.9
    assert by_channel.std(1).min() > 8


def test_crops_of_one_class_are_drawn_again(tmp_path):
    """Three quarters of a class at most, if ten tries find that."""
    protocol = dataclasses.replace(PROTOCOL, image_size=48, crop_size=24)
    found = crops(red_squares(tmp_path, np.arange(48) // 34), protocol=protocol)
    shares = [(found[epoch, 0].labels == 0).double().mean().item() for epoch in range(60)]
    assert np.mean([0.2 < share < 0.8 for share in shares]) > 0.8


def test_drawing_a_sample_leaves_the_global_generators_alone(dataset):
    np.random.seed(1)
    random.seed(1)
    expected = np.random.rand(), random.random()
    np.random.seed(1)
    random.seed(1)
    crops(dataset)[0, 0]
    assert (np.random.rand(), random.random()) == expected


def test_padding_is_ignored_and_its_size_is_told(dataset):
    found = 0
    for index in range(7):
        image, labels, (height, width), valid_pixels, _ = crops(dataset)[0, index]
        assert image.shape == (3, 48, 48)
        assert image.dtype == labels.dtype == torch.uint8
        outside = torch.ones(48, 48, dtype=torch.bool)
        outside[:height, :width] = False
        assert (labels[outside] == 3).all()
        assert valid_pixels == (labels != 3).sum()
        found += int(outside.sum())
    assert found


def test_workers_and_processes_change_no_batch(dataset):
    def batches(rank=0, processes=1, workers=0, start=(0, 0)):
        plan = BatchPlan(
            num_images=7, effective_batch_size=3, processes=processes, micro_batch_size=3, seed=0
        )
        accelerator = SimpleNamespace(process_index=rank, device=torch.device("cpu"))
        task = SimpleNamespace(
            run=SimpleNamespace(loader_workers=workers), train_set=crops(dataset), collate=collate,
            start_worker=start_worker, example=lambda images: (torch.zeros(images),),
        )  # fmt: skip
        run = SimpleNamespace(plan=plan, accelerator=accelerator, task=task)
        return list(load(run, start, 2))

    whole = batches()
    assert len(whole) == 4
    for one, other in zip(whole, batches(workers=2), strict=True):
        assert torch.equal(one.inputs[0], other.inputs[0])
    for one, other in zip(whole[3:], batches(start=(1, 1)), strict=True):
        assert torch.equal(one.inputs[1], other.inputs[1])
    first, second = batches(0, 2), batches(1, 2)
    for one, *parts in zip(whole, first, second, strict=True):
        assert one.num_values == sum(part.num_values for part in parts)
        assert torch.equal(one.inputs[0][0::2], parts[0].inputs[0])
        assert torch.equal(one.inputs[0][1::2], parts[1].inputs[0])


def test_camvid_void_is_neither_class_nor_255(camvid):
    labels = torch.stack([crops(camvid)[0, index][1] for index in range(10)])
    assert set(labels.unique().tolist()) <= set(range(12))


def test_test_images_keep_their_ratio_and_the_labels_their_size(dataset):
    description = read_description(dataset)
    images = WholeImages(
        description, description.pairs("val"), dataclasses.replace(PROTOCOL, multi_scale=True)
    )
    sample = images[1]
    assert sample.labels.shape == (56, 40)  # the second size of the generated pairs
    assert [tuple(scaled.shape[1:]) for scaled in sample.scaled] == [
        (28, 20), (42, 30), (56, 40), (70, 50), (84, 60), (98, 70)
    ]  # fmt: skip


def test_ade20k_labels_are_shifted_and_0_is_ignored(ade20k):
    description = read_description(ade20k)
    pairs = description.pairs("val")
    images = WholeImages(description, pairs, PROTOCOL)
    for index, pair in enumerate(pairs):
        stored = np.array(Image.open(pair.annotation)).astype(int)
        expected = np.where(stored == 0, 255, stored - 1)
        assert np.array_equal(images[index].labels.numpy(), expected)


@pytest.mark.parametrize("broken", ["no image", "other size", "outside label"])
def test_a_pair_that_cannot_be_used_is_named_and_replaced_by_the_next(own_dataset, broken):
    whole = crops(own_dataset)[0, 5]
    image = own_dataset.parent / "images/training/004.jpg"
    annotation = own_dataset.parent / "annotations/training/004.png"
    if broken == "no image":
        image.write_bytes(b"not an image")
    elif broken == "other size":
        Image.new("L", (9, 9)).save(annotation)
    else:
        Image.new("L", Image.open(annotation).size, 77).save(annotation)
    crop = crops(own_dataset)[0, 4]
    assert len(crop.unreadable) == 1
    assert "004." in crop.unreadable[0]
    assert torch.equal(crop.image, whole.image)
    assert torch.equal(crop.labels, whole.labels)
