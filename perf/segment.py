"""Segmentation: training step and evaluation against mmsegmentation. `python -m perf.segment`.

One process, ours and the peer's in turn, the same sizes, precision, weights' shapes and files;
medians over the rounds.

- A training step against mmsegmentation's own Segmenter (its VisionTransformer and
  SegmenterMaskTransformerHead), from uint8 pixels to updated weights.
- Evaluation from files to mean IoU against the same, and against our model used the usual way: one
  image and one window at a time, all predictions kept to the end.
- Peak memory of evaluating 10 and 100 images, each in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import segmenter.evaluate
from engine.config import DeviceConfig
from engine.devices import make_accelerator, peak_memory_mib
from engine.vit import VIT_SIZES
from perf.campaign import Bench
from perf.rehearsal import build, steps_of
from segmenter.config import ProtocolConfig, ScoringConfig, TrainConfig
from segmenter.data import TestImage, WholeImages, start_worker
from segmenter.dataset import (
    TRAIN,
    VAL,
    DatasetDescription,
    Pair,
    quiet_imports,
    read_classes,
    read_description,
)
from segmenter.encoder import EncoderShape
from segmenter.evaluate import evaluate_model, evaluating, predict_classes
from segmenter.metrics import Areas
from segmenter.model import Segmenter, SegmenterShape

with quiet_imports():
    from mmcv.transforms import Compose, LoadImageFromFile
    from mmengine.config import ConfigDict
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs, Resize
    from mmseg.evaluation import IoUMetric
    from mmseg.models import EncoderDecoder
    from mmseg.structures import SegDataSample

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
IMAGE_HEIGHT, IMAGE_WIDTH = 375, 500  # the usual photograph
IGNORED = 255


def write_images(folder: Path, number: int, num_classes: int) -> Path:
    """A dataset of smooth random pictures; returns its YAML file."""
    for kind in ("images", "annotations"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index in range(number):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        labels = rng.integers(0, num_classes, (6, 8), dtype=np.uint8)
        size = IMAGE_WIDTH, IMAGE_HEIGHT
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).save(
            folder / f"images/{index:04d}.jpg", quality=90
        )
        Image.fromarray(labels).resize(size, Image.Resampling.NEAREST).save(
            folder / f"annotations/{index:04d}.png"
        )
    path = folder / "dataset.yml"
    description = {
        "images": {TRAIN: "images", VAL: "images"},
        "annotations": {TRAIN: "annotations", VAL: "annotations"},
        "classes": [f"class {number}" for number in range(num_classes)],
    }
    path.write_text(yaml.safe_dump(description))
    return path


def make_ours(model: str, crop_size: int, num_classes: int) -> Segmenter:
    """Our Segmenter with random weights."""
    patch = VIT_SIZES[model].patch_size
    encoder = EncoderShape(model=model, patch_size=patch, in_channels=3, grid=crop_size // patch)
    shape = SegmenterShape(
        encoder=encoder, decoder="mask_transformer", decoder_layers=2, num_classes=num_classes,
        normalization="imagenet",
    )  # fmt: skip
    return Segmenter(shape)


def make_peer(model: str, protocol: ProtocolConfig, num_classes: int) -> EncoderDecoder:
    """mmsegmentation's Segmenter of the same size."""
    size = VIT_SIZES[model]
    heads = size.width // 64
    init_default_scope("mmseg")
    with quiet_imports():
        return EncoderDecoder(
            data_preprocessor={
                "type": "SegDataPreProcessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True,
                "pad_val": 0, "seg_pad_val": IGNORED,
                "size": (protocol.crop_size, protocol.crop_size),
            },
            backbone={
                "type": "VisionTransformer", "img_size": (protocol.crop_size,) * 2,
                "patch_size": size.patch_size, "in_channels": 3, "embed_dims": size.width,
                "num_layers": size.depth, "num_heads": size.heads, "final_norm": True,
                "norm_cfg": {"type": "LN", "eps": 1e-6}, "with_cls_token": True,
                "interpolate_mode": "bicubic",
            },
            decode_head={
                "type": "SegmenterMaskTransformerHead", "in_channels": size.width,
                "channels": size.width, "num_classes": num_classes, "num_layers": 2,
                "num_heads": heads, "embed_dims": size.width, "dropout_ratio": 0.0,
                "drop_path_rate": 0.0, "loss_decode": {"type": "CrossEntropyLoss"},
            },
            test_cfg=ConfigDict(
                mode="slide", crop_size=(protocol.window_size,) * 2,
                stride=(protocol.window_stride,) * 2,
            ),
        )  # fmt: skip


def our_step(arguments: argparse.Namespace, dataset: Path) -> Callable[[], None]:
    """One step of the real trainer, without dropout, as the peer has none."""
    size = dict.fromkeys(("image_size", "crop_size", "window_size", "window_stride"), arguments.size)
    bench = Bench(wanted=arguments.device, tiny=False, scratch=dataset.parent)
    config = bench.config(
        TrainConfig, dataset=dataset, model=arguments.model, batch_size=arguments.batch,
        precision=arguments.precision, drop_path=0.0, decoder_dropout=0.0, **size,
    )  # fmt: skip
    return steps_of(build(config), 1)


def peer_step(accelerator: Accelerator, peer: EncoderDecoder, images: Tensor, labels: Tensor) -> Any:
    """The same by mmsegmentation, with the same fused optimizer."""
    optimizer = torch.optim.SGD(peer.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step() -> None:
        samples = []
        for label in labels:
            size = tuple(label.shape)
            sample = SegDataSample(metainfo={"img_shape": size})
            sample.gt_sem_seg = PixelData(data=label[None].long())
            samples.append(sample)
        data = {"inputs": list(images), "data_samples": samples}
        data = peer.data_preprocessor(data, training=True)
        with accelerator.autocast():
            losses = peer.loss(data["inputs"], data["data_samples"])
        loss = losses["decode.loss_ce"]
        loss.backward()
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def evaluate_ours(accelerator: Accelerator, model: Segmenter, images: WholeImages, group_size: int) -> float:
    """Mean IoU, as `segmenter evaluate` gets it."""
    areas = evaluate_model(accelerator, model, images, ScoringConfig(eval_batch_size=group_size))
    assert areas is not None
    return areas.scores([str(number) for number in range(areas.num_classes)])["mean_iou"]


def evaluate_one_by_one(accelerator: Accelerator, model: Segmenter, images: WholeImages) -> float:
    """The usual way: one image, one window at a time; all predictions are kept to the end."""
    kept: list[tuple[Tensor, Tensor]] = []
    loader: DataLoader[TestImage] = DataLoader(
        images, batch_size=None, num_workers=DeviceConfig().loader_workers,
        worker_init_fn=start_worker,
    )  # fmt: skip
    with evaluating(accelerator, model), mock.patch.object(segmenter.evaluate, "MOST_WINDOWS", 1):
        for sample in loader:
            scaled, size = [sample.scaled], [sample.labels.shape]
            (predicted,) = predict_classes(model, scaled, size, images.protocol)
            kept.append((predicted.cpu(), sample.labels))
    areas = Areas(len(images), model.shape.num_classes, images.description.ignored)
    for index, (predicted, labels) in enumerate(kept):
        areas.add(index, predicted, labels)
    return areas.scores([str(number) for number in range(areas.num_classes)])["mean_iou"]


def evaluate_peer(
    accelerator: Accelerator,
    peer: EncoderDecoder,
    description: DatasetDescription,
    pairs: list[Pair],
    protocol: ProtocolConfig,
) -> float:
    """mmsegmentation's own way from files to mean IoU: its test loop without the runner."""
    scale = 4 * protocol.image_size, protocol.image_size
    load = Compose(
        [LoadImageFromFile(), Resize(scale=scale, keep_ratio=True), LoadAnnotations(),
         PackSegInputs()]
    )  # fmt: skip
    metric = IoUMetric(ignore_index=IGNORED, iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": read_classes(description).names}
    peer.eval()
    with torch.inference_mode(), accelerator.autocast():
        for pair in pairs:
            packed = load(
                {"img_path": str(pair.image), "seg_map_path": str(pair.annotation),
                 "label_map": None, "reduce_zero_label": False, "seg_fields": []}
            )  # fmt: skip
            batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
            outputs = peer.test_step(batch)
            metric.process({}, [output.to_dict() for output in outputs])
    metrics = metric.total_area_to_metrics(*(sum(parts) for parts in zip(*metric.results, strict=True)))
    return float(np.nanmean(metrics["IoU"])) * 100


def measure(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Milliseconds of both, in turn, after one round to warm up: medians.

    On a CPU in processor time, which other users of the machine disturb less.
    """
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for work, found in zip((ours, peer), times, strict=True):
            if on_gpu:
                torch.cuda.synchronize()
            began = clock()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            if number:
                found.append((clock() - began) * 1000)
    return statistics.median(times[0]), statistics.median(times[1])


def memory_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak MiB of processes that evaluate 10 and 100 images."""
    peaks = {}
    for number in (10, 100):
        command = [
            sys.executable, "-m", "perf.segment", "--only-memory", str(number),
            *_shared(arguments),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[number] = int(done.stdout.split()[-1])
    return {"work": "peak memory, MiB", "images_10": peaks[10], "images_100": peaks[100]}


def _shared(arguments: argparse.Namespace) -> list[str]:
    names = ("model", "size", "stride", "classes", "device", "precision", "group")
    return [text for name in names for text in (f"--{name}", str(getattr(arguments, name)))]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="vit_tiny", choices=list(VIT_SIZES))
    parser.add_argument("--size", type=int, default=128, help="scale, crop and window")
    parser.add_argument("--stride", type=int, default=96, help="of the window")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4, help="images of a training step")
    parser.add_argument("--group", type=int, default=4, help="images evaluated together")
    parser.add_argument("--images", type=int, default=8, help="images of an evaluation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only-memory", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print a table."""
    arguments = _parse()
    accelerator = make_accelerator(DeviceConfig(device=arguments.device, precision=arguments.precision))
    protocol = ProtocolConfig(
        image_size=arguments.size, crop_size=arguments.size, window_size=arguments.size,
        window_stride=arguments.stride, normalization="imagenet",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        number = arguments.only_memory or arguments.images
        description = read_description(write_images(Path(folder), number, arguments.classes))
        pairs = description.pairs(VAL)
        images = WholeImages(description, pairs, protocol)
        torch.manual_seed(0)
        model = make_ours(arguments.model, arguments.size, arguments.classes).to(accelerator.device)
        if arguments.only_memory:
            evaluate_ours(accelerator, model, images, arguments.group)
            print(peak_memory_mib(accelerator.device))
            return
        peer = make_peer(arguments.model, protocol, arguments.classes).to(accelerator.device)
        rows = _time_rows(arguments, accelerator, model, peer, images, Path(folder, "dataset.yml"))
    rows.append(memory_row(arguments))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _time_rows(
    arguments: argparse.Namespace,
    accelerator: Accelerator,
    model: Segmenter,
    peer: EncoderDecoder,
    images: WholeImages,
    dataset: Path,
) -> list[dict[str, Any]]:
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    labels = torch.randint(0, arguments.classes, (shape[0], *shape[2:]), dtype=torch.uint8)
    mmseg = "mmsegmentation's Segmenter"
    ours = our_step(arguments, dataset)
    theirs = peer_step(accelerator, peer.train(), pixels, labels)
    pairs, description, protocol = list(images.pairs), images.description, images.protocol

    def score() -> float:
        return evaluate_ours(accelerator, model, images, arguments.group)

    works: list[tuple[str, str, Callable[[], Any], Callable[[], Any]]] = [
        ("training step", mmseg, ours, theirs),
        (
            f"evaluation of {len(images)} images", mmseg, score,
            lambda: evaluate_peer(accelerator, peer, description, pairs, protocol),
        ),
        (
            f"evaluation of {len(images)} images", "one image and window at a time, all kept",
            score, lambda: evaluate_one_by_one(accelerator, model, images),
        ),
    ]  # fmt: skip
    rows = []
    for work, name, ours_work, peer_work in works:
        ours_ms, peer_ms = measure(ours_work, peer_work, arguments.rounds)
        rows.append(
            {"work": work, "peer": name, "ours_ms": round(ours_ms, 1),
             "peer_ms": round(peer_ms, 1), "ratio": round(peer_ms / ours_ms, 2)}
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
