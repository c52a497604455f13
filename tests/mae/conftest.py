"""A tiny dataset of the real layout, and runs on it in processes of their own."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from tests import toy
from tests.processes import ended, start

NUM_TRAIN, NUM_VAL = 26, 5
SMALL_RUN = {
    "plugin": str(toy.PLUGIN),
    "model": "vit_toy",
    "image_size": 32,
    "patch_size": 16,
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 4,
    "epochs": 4,
    "effective_batch_size": 8,
    "batch_size": 8,
    "base_lr": 1e-2,
    "warmup_fraction": 0.25,
    "workers": 0,
    "device": "cpu",
    "mask_method": "four_channels",
}


@pytest.fixture(scope="session")
def in1k_dir(tmp_path_factory):
    """train/ with 26 images, 24 of them with segments, val/ with 5, masks/ as SAM's RLE JSON."""
    folder = tmp_path_factory.mktemp("in1k")
    rng = np.random.default_rng(0)
    for number in range(NUM_TRAIN):
        write_image(folder / f"train/class{number % 3}/image_{number}.jpg", rng)
        if number < NUM_TRAIN - 2:
            write_segments(folder / f"masks/class{number % 3}/image_{number}.json", rng)
    for number in range(NUM_VAL):
        write_image(folder / f"val/class0/held_out_{number}.jpg", rng)
        write_segments(folder / f"masks/class0/held_out_{number}.json", rng)
    pack_segments(folder / "masks")
    return folder


def pack_segments(masks_dir):
    """As `python -m segments pack` does."""
    from segments.pack import pack

    pack(masks_dir, None, overwrite=True, allow_damaged=False, processes=1)


def write_image(path: Path, rng: np.random.Generator, width=60, height=48):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


def write_segments(path: Path, rng: np.random.Generator, width=60, height=48):
    """Three boxes, of about 5, 15 and 40 percent."""
    segments = []
    for share in (0.05, 0.15, 0.40):
        box_height, box_width = round(height * share**0.5), round(width * share**0.5)
        top = int(rng.integers(height - box_height))
        left = int(rng.integers(width - box_width))
        inside = np.zeros((height, width), np.uint8, order="F")
        inside[top : top + box_height, left : left + box_width] = 1
        segments.append(as_annotation(inside))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(segments))


def as_annotation(inside):
    rle = coco.encode(np.asfortranarray(inside))
    return {
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
        "area": int(inside.sum()),
        "bbox": [0, 0, 1, 1],
        "predicted_iou": 0.9,
        "stability_score": 0.9,
    }


def make_config(in1k_dir, output_dir, **options):
    """The configuration that the command line would make of these options."""
    from common.options import Layer, make_all
    from mae.config import GROUPS, PretrainConfig

    paths = {"in1k_dir": Path(in1k_dir), "output_dir": Path(output_dir)}
    return PretrainConfig(**make_all(GROUPS, [Layer({**SMALL_RUN, **paths, **options})]))


def read_epochs(output_dir):
    """log.txt without what may differ between equal runs."""
    from tests.equal_runs import TIMING_KEYS

    lines = (Path(output_dir) / "log.txt").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in TIMING_KEYS} for record in records]


def assert_same_weights(one, other):
    import torch

    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    assert a["model"].keys() == b["model"].keys()
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name


class Processes:
    """Trainings in processes of their own."""

    def start(self, config, *, processes=1, sabotage=None):
        """Processes of one run; `sabotage(rank)` is called in each before it trains."""
        return start(partial(_train, config, sabotage), processes)

    def run(self, config, *, processes=1, sabotage=None):
        """Exit codes of the processes of a run; negative: killed by that signal."""
        return ended(self.start(config, processes=processes, sabotage=sabotage))


def _train(config, sabotage, rank):
    from common.console import EXIT_STOPPED
    from mae.pretrain import pretrain

    if sabotage is not None:
        sabotage(rank)
    try:
        return 0 if pretrain(config) else EXIT_STOPPED
    except (RuntimeError, ValueError) as error:
        (config.run.output_dir / f"error-{rank}.txt").write_text(str(error))
        return 1


@pytest.fixture(scope="session")
def processes():
    return Processes()
