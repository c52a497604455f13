import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from segmenter.config import ProtocolConfig
from segmenter.dataset import quiet_imports
from segmenter.encoder import EncoderShape
from segmenter.evaluate import predict_classes, spans, window_logits
from segmenter.metrics import Areas
from segmenter.model import Segmenter, SegmenterShape

PROTOCOL = ProtocolConfig(
    image_size=48, crop_size=32, window_size=32, window_stride=20, normalization="imagenet"
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    encoder = EncoderShape(model="vit_tiny", patch_size=16, in_channels=3, grid=2)
    model = Segmenter(
        SegmenterShape(
            encoder=encoder, decoder="mask_transformer", decoder_layers=1, num_classes=4,
            normalization="imagenet",
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def picture(height, width):
    rng = np.random.default_rng(height + width)
    return torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))


@pytest.mark.parametrize("length", [20, 32, 33, 51, 52, 53, 100])
def test_windows_cover_everything_and_stay_inside(length):
    covered = torch.zeros(length)
    for span in spans(length, PROTOCOL):
        assert span.stop <= length
        covered[span] += 1
    assert covered.min() >= 1


@torch.no_grad()
def test_sliding_equals_mmsegmentations(model):
    with quiet_imports():
        from mmengine.config import Config
        from mmseg.models import EncoderDecoder

    class Peer(EncoderDecoder):
        """mmsegmentation's slide inference over our model."""

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.test_cfg = Config({"crop_size": (32, 32), "stride": (20, 20)})
            self.out_channels = 4
            self.align_corners = False

        def encode_decode(self, inputs, _):
            return model.upsample(model.patch_logits(inputs), *inputs.shape[-2:])

    image = picture(50, 77)
    expected = Peer().slide_inference(model.normalise(image)[None], [{"img_shape": (50, 77)}])[0]
    (actual,) = window_logits(model, [image], PROTOCOL)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_images_of_a_group_do_not_disturb_each_other(model):
    pictures = [picture(50, 77), picture(24, 90), picture(32, 32), picture(77, 50)]
    together = window_logits(model, pictures, PROTOCOL)
    for image, logits in zip(pictures, together, strict=True):
        (alone,) = window_logits(model, [image], PROTOCOL)
        assert logits.shape == (4, *image.shape[-2:])
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_classes_are_chosen_at_the_original_size(model):
    scaled = picture(48, 60)
    (classes,) = predict_classes(model, [[scaled]], [(100, 125)], PROTOCOL)
    (logits,) = window_logits(model, [scaled], PROTOCOL)
    expected = F.interpolate(logits[None], (100, 125), mode="bilinear")[0].argmax(0)
    assert classes.dtype == torch.uint8
    assert torch.equal(classes.long(), expected)


@torch.no_grad()
def test_with_flips_a_mirrored_image_gives_the_mirrored_prediction(model):
    protocol = dataclasses.replace(PROTOCOL, multi_scale=True)
    versions = [picture(round(48 * scale), round(60 * scale)) for scale in protocol.scales]
    (one,) = predict_classes(model, [versions], [(48, 60)], protocol)
    mirrored = [version.flip(-1) for version in versions]
    (other,) = predict_classes(model, [mirrored], [(48, 60)], protocol)
    assert (one.flip(-1) == other).float().mean() > 0.999
    assert len(one.unique()) > 1


@torch.no_grad()
def test_with_scales_and_flips_probabilities_are_summed(model, monkeypatch):
    """Not logits: one version that is sure of a class would outvote all others."""
    as_they_are = model.patch_logits
    monkeypatch.setattr(model, "patch_logits", lambda pixels: 100 * as_they_are(pixels))
    protocol = dataclasses.replace(PROTOCOL, multi_scale=True)
    versions = [picture(round(48 * scale), round(60 * scale)) for scale in protocol.scales]
    total = torch.zeros(4, 48, 60)
    for version in versions:
        for flips in (False, True):
            (logits,) = window_logits(model, [version.flip(-1) if flips else version], protocol)
            probabilities = F.interpolate(logits[None], (48, 60), mode="bilinear")[0].softmax(0)
            total += probabilities.flip(-1) if flips else probabilities
    (classes,) = predict_classes(model, [versions], [(48, 60)], protocol)
    assert (classes == total.argmax(0)).float().mean() > 0.995


def test_scores_a_hand_can_compute():
    areas = Areas(1, 3, ignore_index=9)
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, 9, 9]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]], dtype=torch.uint8)
    areas.add(0, predicted, labels)
    scores = areas.scores(["a", "b", "c"])
    assert scores["pixel_accuracy"] == pytest.approx(100 * 4 / 6)
    assert scores["class_iou"] == {
        "a": pytest.approx(100 * 2 / 4), "b": pytest.approx(100 * 2 / 4), "c": None
    }  # fmt: skip
    assert scores["mean_iou"] == pytest.approx(50)
    assert scores["mean_accuracy"] == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)


def test_areas_equal_mmsegmentations_metric_on_all_predictions():
    with quiet_imports():
        from mmseg.evaluation import IoUMetric
    generator = torch.Generator().manual_seed(0)
    areas, peer = Areas(6, 5, 255), IoUMetric(ignore_index=255, iou_metrics=["mIoU"])
    peer.dataset_meta = {"classes": list("abcde")}
    for index in range(6):
        labels = torch.randint(0, 5, (30, 41), dtype=torch.uint8, generator=generator)
        predicted = torch.where(
            torch.rand(30, 41, generator=generator) < 0.6,
            labels,
            torch.randint(0, 5, (30, 41), dtype=torch.uint8, generator=generator),
        )
        labels[:3] = 255
        areas.add(index, predicted, labels)
        sample = {"pred_sem_seg": {"data": predicted[None]}, "gt_sem_seg": {"data": labels[None]}}
        peer.process({}, [sample])
    expected = peer.compute_metrics(peer.results)
    scores = areas.scores(list("abcde"))
    assert scores["pixel_accuracy"] == pytest.approx(expected["aAcc"], abs=0.006)  # they round
    assert scores["mean_iou"] == pytest.approx(expected["mIoU"], abs=0.006)
    assert scores["mean_accuracy"] == pytest.approx(expected["mAcc"], abs=0.006)
