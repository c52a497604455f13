"""The smallest real run: both parts, on a handful of generated images, in seconds."""

from __future__ import annotations

import csv
from pathlib import Path

from pipeline.plan.sample import write_sample
from tests import toy

TIMES = ("minutes", "device_hours", "device_hours_with_segments")
SIZE = {"train": 12, "val": 4, "segmentation_train": 8, "segmentation_val": 6}
_CONFIG = f"""
plugin: {toy.PLUGIN}
model: vit_toy
recipe: fast
baselines: none # the sample run has them, and probes
probe_freq: 0
num_gpus: 0
coverage_ratio: 15
pretrain:
  image_size: 32
  patch_size: 16
  decoder_width: 32
  decoder_depth: 1
  decoder_heads: 2
  batch_size: 4
  effective_batch_size: 4
  base_lr: 0.06 # x 4 / 256 = 9.4e-4
  workers: 0
finetune:
  epochs: 2
  batch_size: 4
  image_size: 32
  crop_size: 32
  window_size: 32
  window_stride: 32
  eval_every: 2
  workers: 0
"""


def write_inputs(folder: Path) -> Path:
    """Writes the data and a config that names them; returns the config's path."""
    write_sample(folder, **SIZE)
    config = folder / "tiny.yml"
    config.write_text(f"in1k_dir: {folder}/in1k\neval_dataset: {folder}/segmentation/dataset.yml\n{_CONFIG}")
    return config


def scores(output_dir: Path) -> list[dict[str, str]]:
    """The finetunings of results.csv without the times: what equal runs have in common."""
    with (output_dir / "results.csv").open() as stream:
        rows = [r for r in csv.DictReader(stream) if (r["row"], r["measure"]) == ("score", "finetuning")]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
