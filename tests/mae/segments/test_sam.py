"""Segments by Segment Anything: those of the transformers pipeline, however interrupted."""

import numpy as np
import pytest
from PIL import Image

from common.images import read_rgb
from mae.segments.generate import Shard, generate
from mae.segments.pack import merge
from mae.segments.sam import Sam
from mae.segments.settings import SamSettings
from mae.segments.store import PackedStore

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
    generate(images, out, sam, shard=Shard(index=index, count=count), processes=None)


@pytest.fixture(scope="session")
def tiny_sam(tmp_path_factory):
    """A random SAM in a folder, as `from_pretrained` reads it."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "image_size": 64, "patch_size": 16}
    config = transformers.SamConfig(
        vision_config={
            **size, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64, "num_pos_feats": 16,
        },
        prompt_encoder_config={**size, "mask_input_channels": 8},
        mask_decoder_config=DECODER,
    )  # fmt: skip
    processor = transformers.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    return save_random(transformers.SamModel(config), processor, tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="session")
def tiny_sam2(tmp_path_factory):
    """A random SAM 2 in a folder."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=16, num_attention_heads=1, blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4, 4, 4, 4], global_attention_blocks=[3], image_size=[64, 64],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32,
    )  # fmt: skip
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
    config = transformers.Sam2Config(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=DECODER
    )
    processor = transformers.Sam2ImageProcessor(
        size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16}
    )
    return save_random(transformers.Sam2Model(config), processor, tmp_path_factory.mktemp("sam2"))


DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}


def save_random(model, processor, folder):
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("model", "size"), [("tiny_sam", (40, 56)), ("tiny_sam2", (56, 56))])
def test_segments_are_those_of_the_transformers_pipeline(model, size, request, photograph):
    # A square for SAM 2: the pipeline spreads its points as if the image were padded, yet SAM 2
    # stretches it, so that on others the pipeline leaves a part of the image without points.
    from transformers import pipeline

    folder = str(request.getfixturevalue(model))
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = pipeline("mask-generation", model=folder, device="cpu")
    for overlap, fewest in ((1.0, 5), (0.9, 1)):
        settings = SamSettings(model=folder, **{**SAM_OPTIONS, "box_nms_thresh": overlap})
        expected = theirs(
            Image.fromarray(image),
            points_per_crop=settings.points_per_side,
            points_per_batch=settings.points_per_batch,
            pred_iou_thresh=settings.pred_iou_thresh,
            stability_score_thresh=settings.stability_score_thresh,
            stability_score_offset=settings.stability_score_offset,
            crops_nms_thresh=overlap,
        )["masks"]
        assert len(expected) >= fewest
        for segments in Sam(settings).segments([photograph(image), photograph(image)]):
            # Sets, as the pipeline keeps equal masks twice where boxes may overlap fully.
            assert {segment.decode().tobytes() for segment in segments} == {
                np.asarray(pixels, np.uint8).tobytes() for pixels in expected
            }


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
