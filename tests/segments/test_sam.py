"""Segments by Segment Anything: those of the transformers pipeline, however interrupted."""

import functools
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import read_rgb
from common.parallel import Failure
from segments.config import PRESETS, SamSettings
from segments.generate import Work, generate, images_by_key
from segments.pack import merge
from segments.sam import Sam
from segments.store import PackedStore
from tests.segments.tiny_models import MODELS, make_tiny_model

SAM_OPTIONS = {
    "points_per_side": 3,
    "points_per_batch": 4,
    "pred_iou_thresh": -1000.0,
    "stability_score_thresh": 0.5,
    "stability_score_offset": 0.1,
    "box_nms_thresh": 1.0,
    "batch_size": 2,
    "device": "cpu",
}


def generate_all(images, out, sam, index=0, count=1):
    generate(images_by_key(images, None), out, sam, shard=(index, count), processes=None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny model, made when first asked for."""
    pytest.importorskip("transformers")
    return functools.cache(lambda kind: make_tiny_model(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture
def tiny_sam(tiny_model):
    return tiny_model("sam")


def test_every_type_of_model_for_mask_generation_is_tested():
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES

    assert set(MODELS) == set(MODEL_FOR_MASK_GENERATION_MAPPING_NAMES)


@pytest.mark.parametrize("kind", MODELS)
def test_segments_are_those_of_the_transformers_pipeline(kind, tiny_model, photograph):
    # Squares for models that stretch: the pipeline spreads its points as if the image were padded,
    # which leaves a part of any other without points.
    from transformers import pipeline

    rng = np.random.default_rng(1)
    size = (40, 56) if kind in ("sam", "sam_hq") else (56, 56)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(2)]
    for overlap, fewest in ((1.0, 5), (0.9, 1)):
        settings = SamSettings(model=str(tiny_model(kind)), **{**SAM_OPTIONS, "box_nms_thresh": overlap})
        made = Sam(settings)
        theirs = pipeline("mask-generation", model=made.model, image_processor=made.processor, device="cpu")
        found = made.segments([photograph(image) for image in images])
        for image, segments in zip(images, found, strict=True):
            expected = theirs(
                Image.fromarray(image),
                points_per_crop=settings.points_per_side,
                points_per_batch=settings.points_per_batch,
                pred_iou_thresh=settings.pred_iou_thresh,
                stability_score_thresh=settings.stability_score_thresh,
                stability_score_offset=settings.stability_score_offset,
                crops_nms_thresh=overlap,
            )["masks"]
            # Sets, as the pipeline keeps equal masks twice where boxes may overlap fully.
            expected = {np.asarray(pixels, np.uint8).tobytes() for pixels in expected}
            ours = {segment.decode().tobytes() for segment in segments}
            # Other batches round differently: a pixel at the cutoff, a mask at a threshold.
            assert len(without_a_twin(ours, expected)) <= 1
            assert len(without_a_twin(expected, ours)) <= 1
            assert len(expected) >= fewest


def without_a_twin(masks, others):
    """Those that differ from each of the others in more than two pixels."""
    pixels = [np.frombuffer(other, np.uint8) for other in others]
    return [
        mask for mask in masks if min((np.frombuffer(mask, np.uint8) != other).sum() for other in pixels) > 2
    ]


def test_sam_leaves_equal_stores_whether_killed_or_not(images, tmp_path, tiny_sam, dump):
    # One process after another, as fork and torch's threads do not go together.
    def sam():
        return Sam(SamSettings(model=str(tiny_sam), **SAM_OPTIONS))

    generate_all(images, tmp_path / "whole.sqlite", sam())
    broken, calls = sam(), []
    segments = broken.segments

    def fail_later(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segments(batch)

    broken.segments = fail_later
    with pytest.raises(KeyboardInterrupt):
        generate_all(images, tmp_path / "stopped.sqlite", broken)
    generate_all(images, tmp_path / "stopped.sqlite", sam())
    assert dump(tmp_path / "stopped.sqlite") == dump(tmp_path / "whole.sqlite")
    for index in (0, 1):
        generate_all(images, tmp_path / "masks.sqlite", sam(), index=index, count=2)
    shards = [tmp_path / f"masks-{index}-of-2.sqlite" for index in (0, 1)]
    merge(shards, tmp_path / "merged.sqlite", overwrite=False)
    assert dump(tmp_path / "merged.sqlite") == dump(tmp_path / "whole.sqlite")
    settings = PackedStore(tmp_path / "merged.sqlite").settings
    assert settings["pred_iou_thresh"] == -1000
    assert settings["model"] == str(tiny_sam)


def test_thresholds_take_segments_away(images, tiny_sam, photograph):
    image = photograph(read_rgb(images / "a/two.png"))

    def count(**changed):
        settings = SamSettings(model=str(tiny_sam), **{**SAM_OPTIONS, **changed})
        return len(Sam(settings).segments([image])[0])

    everything = count()
    assert count(pred_iou_thresh=1000.0) == 0
    assert count(box_nms_thresh=0.1) < everything
    assert count(points_per_side=1) < everything


def test_a_missing_transformers_is_named(images, tmp_path, masks_command, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    code, said = masks_command("generate", "sam", "--images", images, "--out", tmp_path / "out")
    assert code == 2
    assert "pip install transformers" in said


def test_a_folder_that_is_no_model_is_named(images, tmp_path, masks_command):
    code, said = masks_command(
        "generate", "sam", "--images", images, "--out", tmp_path / "out", "--model", tmp_path
    )
    assert code == 2
    assert f"--model {tmp_path} cannot be loaded" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"x" * 100), ("model.safetensors", b""), ("config.json", b"{"),
        ("preprocessor_config.json", b"[]"), ("config.json", b'{"model_type": "sam", "vision_config": 7}'),
    ],
)  # fmt: skip
def test_a_damaged_model_is_named_in_a_line(tiny_model, tmp_path, file, content):
    folder = shutil.copytree(tiny_model("sam"), tmp_path / "model")
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"--model .*/model cannot be loaded \(.*\): .+") as refused:
        Sam(SamSettings(model=str(folder), device="cpu"))
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize("part", ["mask_decoder.iou_prediction_head", "vision_encoder"])
def test_masks_that_are_no_numbers_are_an_error_and_not_an_image_without_segments(
    tiny_model, photograph, part
):
    sam = Sam(SamSettings(model=str(tiny_model("sam2")), **SAM_OPTIONS))
    for name, weight in sam.model.named_parameters():
        if name.startswith(part):
            weight.data.fill_(torch.nan)
    image = photograph(np.zeros((40, 60, 3), np.uint8))
    with pytest.raises(RuntimeError, match=f"{image.key}: the model's masks are not finite in fp32"):
        sam.segments([image])


def test_an_image_that_is_thinner_than_the_model_sees_is_left_out(tiny_model, tmp_path):
    paths = {name: tmp_path / f"{name}.png" for name in ("thin", "usual")}
    for name, shape in (("thin", (1, 2000, 3)), ("usual", (40, 60, 3))):
        Image.fromarray(np.full(shape, 90, np.uint8)).save(paths[name])
    sam = Sam(SamSettings(model=str(tiny_model("sam")), **{**SAM_OPTIONS, "batch_size": 2}))
    work = Work(paths, sam)
    thin, usual = work.segment(work.read(["thin", "usual"]))
    assert isinstance(thin, Failure)
    assert "2000 x 1 pixels are too thin for segments" in thin.reason
    assert usual.key == "usual"


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model("sam2"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*: mask_decoder\.iou_token\.weight"):
        Sam(SamSettings(model=str(folder), device="cpu"))


def test_presets_are_listed_with_size_and_licence_and_choose_the_model(
    masks_command, monkeypatch, images, tmp_path
):
    code, said = masks_command("generate", "--help")
    assert code == 0
    for name, (model, millions) in PRESETS.items():
        assert re.search(rf"{name} +{model}, {millions}M parameters, Apache", said)
    loaded = []

    def load(name):
        loaded.append(name)
        raise ValueError("stop here")

    monkeypatch.setattr("segments.sam._load", load)
    masks_command("generate", "sam2-tiny", "--images", images, "--out", tmp_path / "masks.sqlite")
    assert loaded == [PRESETS["sam2-tiny"][0]]


def test_parameters_of_presets_are_counted():
    """Of those whose sizes are the defaults of a configuration, or known changes of them."""
    import torch
    import transformers

    def millions(vision):
        with torch.device("meta"):
            model = transformers.SamModel(transformers.SamConfig(vision_config=vision))
        return sum(parameter.numel() for parameter in model.parameters()) / 1e6

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
             "global_attn_indexes": [5, 11, 17, 23]}  # fmt: skip
    for name, vision in {"sam-base": {}, "sam-large": large}.items():
        assert round(millions(vision)) == PRESETS[name][1]
