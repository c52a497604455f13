"""One real optimizer step of the trainer, however it is split: its loss and its gradients.

SGD's momentum after one step is the gradient, so the checkpoint tells it; the rate is so low that
the checkpoint's weights are those that the step began with.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from common.formats import read_log
from segmenter.data import TrainingCrops
from segmenter.dataset import read_description
from segmenter.loading import load_segmenter
from tests.segmenter.boxes import IGNORE, run, train_arguments, write_dataset

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Four training images, in which very different numbers of pixels count."""
    dataset = write_dataset(tmp_path_factory.mktemp("uneven"), train=4)
    for number, share in ((1, 0.9), (2, 0.5)):
        path = dataset.parent / f"annotations/training/{number:03d}.png"
        labels = np.array(Image.open(path))
        labels[: int(share * len(labels))] = IGNORE
        Image.fromarray(labels).save(path)
    return dataset


@pytest.mark.parametrize(
    ("decoder", "device_batch_size", "processes"),
    [("linear", 4, 1), ("mask_transformer", 1, 1), ("linear", 2, 2), ("mask_transformer", 1, 2)],
)
def test_a_step_is_cross_entropy_over_the_valid_pixels_of_the_whole_batch(
    uneven, tmp_path, decoder, device_batch_size, processes
):
    arguments = train_arguments(
        uneven, tmp_path / "run", epochs=1, batch_size=4, device_batch_size=device_batch_size,
        decoder=decoder, optimizer="sgd", lr=1e-20, warmup_fraction=0.0, weight_decay=0.0,
        layer_decay=1.0, drop_path=0.0, decoder_dropout=0.0, seed=3,
    )  # fmt: skip
    run(arguments, tmp_path / "output.txt", processes)

    loaded, description = load_segmenter(tmp_path / "run/checkpoint.pth"), read_description(uneven)
    crops = TrainingCrops(description, description.pairs("train"), loaded.protocol, seed=3)
    batch = [crops[0, index] for index in range(4)]
    images = torch.stack([crop.image for crop in batch]) / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    images = (images - mean) / deviation
    for image, crop in zip(images, batch, strict=True):
        image[:, crop.size[0] :], image[:, :, crop.size[1] :] = 0, 0  # padding is the mean
    labels = torch.stack([crop.labels for crop in batch]).long()
    assert (labels != IGNORE).sum(dim=(1, 2)).double().std() > 100
    model = loaded.model
    logits = model.upsample(model.patch_logits(images), 32, 32)
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE)
    expected.backward()

    (record,) = read_log(tmp_path / "run/log.txt")
    assert record["train_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert_gradients(tmp_path / "run/checkpoint.pth", model)


def assert_gradients(checkpoint, model):
    """The momentum in the checkpoint is the gradient of the model."""
    stored = torch.load(checkpoint, weights_only=True)["optimizer"]
    assert len(stored["param_groups"]) == 1  # so they are in the order of the model
    largest = 0.0
    for (name, parameter), state in zip(model.named_parameters(), stored["state"].values(), strict=True):
        assert torch.allclose(state["momentum_buffer"], parameter.grad, atol=1e-5), name
        largest = max(largest, parameter.grad.abs().max().item())
    assert largest > 1e-2
