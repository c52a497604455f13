"""Load training samples: this loader against the usual ways. `python -m perf.loader --help`.

Everything runs on one core in one process, a pass of ours over all samples and one of the peer's
in turn, in processor time. A sample's time is its median over the passes, and the figures are means
over the samples; beside them stand the same of each sample's best time, which a busy machine
disturbs less.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from common.images import find_images
from common.tars import TarImages
from engine.vit import IMAGE_MEAN, IMAGE_STD
from mae.config import MethodConfig, ModelConfig, make_method
from mae.controls import SegmentSource
from mae.data import MaskedImages
from mae.listing import encode_paths
from segments.forms import open_segments
from segments.store import PackedStore, segment_key

REPOSITORY = Path(__file__).resolve().parents[1]
SIZE = 224
COVERAGE_PERCENT = 15.0
MODEL = ModelConfig(model="vit_base", image_size=SIZE)


class PngSamples(Dataset[tuple[Tensor, Tensor]]):
    """The peer for masked samples: a PNG per segment, a text table, float tensors of full size."""

    def __init__(self, folder: Path, masks: Path, paths: list[str]) -> None:
        self.folder, self.masks, self.paths = folder, masks, paths
        self.crop = transforms.RandomResizedCrop(
            SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        self.flip = transforms.RandomHorizontalFlip()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.paths[index]
        image = vision.to_tensor(Image.open(self.folder / path).convert("RGB"))
        image = vision.normalize(image, IMAGE_MEAN, IMAGE_STD)
        folder = self.masks / segment_key(path)
        table = [line.split() for line in (folder / "table.txt").read_text().splitlines()]
        name = min(table, key=lambda row: abs(float(row[0]) - COVERAGE_PERCENT))[1]
        segment = vision.to_tensor(Image.open(folder / name).convert("L"))
        both = self.flip(self.crop(torch.cat([image, segment])))
        return both[:3], both[3:]


def make_peer_of_patches(folder: Path) -> ImageFolder:
    """The usual MAE loader: ImageFolder, PIL, ToTensor, Normalize."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGE_MEAN, IMAGE_STD),
        ]
    )
    return ImageFolder(str(folder), transform)


def make_ours(
    folder: Path | TarImages,
    paths: list[str],
    source: PackedStore | None,
    model: ModelConfig,
    mask_method: str,
) -> MaskedImages:
    """Our samples of one masking method."""
    wanted = MethodConfig(mask_method=mask_method, coverage_ratio=COVERAGE_PERCENT)
    method = make_method(wanted, model)
    listed, segments = encode_paths(paths), None
    if method.uses_segments and source is not None:
        segments = SegmentSource(store=source, donors=listed, options=wanted, seed=0)
    return MaskedImages(
        folder=folder, paths=listed, segments=segments, method=method, seed=0,
    )  # fmt: skip


def write_png_form(source: PackedStore, paths: list[str], masks: Path) -> None:
    """The segments as the peer reads them: PNGs and `<coverage percent> <file>` lines."""
    for path in paths:
        folder = masks / segment_key(path)
        folder.mkdir(parents=True)
        lines = []
        for number, segment in enumerate(source.segments(segment_key(path))):
            Image.fromarray(segment.decode() * 255).save(folder / f"{number}.png")
            lines.append(f"{segment.coverage_percent:.4f} {number}.png\n")
        (folder / "table.txt").write_text("".join(lines))


def compare(
    work: str,
    peer: str,
    ours: Callable[[int], Any],
    theirs: Callable[[int], Any],
    count: int,
    rounds: int,
) -> dict[str, Any]:
    """Passes of both in turn; milliseconds per sample, and how many times faster ours is."""
    seconds = np.zeros((rounds, count, 2))
    for number in range(-1, rounds):  # the first round warms the caches up
        for side, load in enumerate((ours, theirs)):
            for index in range(count):
                began = time.process_time()
                load(index)
                seconds[max(number, 0), index, side] = time.process_time() - began
    ours_ms, peer_ms = (np.median(seconds, axis=0).mean(axis=0) * 1e3).tolist()
    ours_best_ms, peer_best_ms = (seconds.min(axis=0).mean(axis=0) * 1e3).tolist()
    return {
        "work": work, "peer": peer, "ours_ms": ours_ms, "peer_ms": peer_ms,
        "ratio": peer_ms / ours_ms, "ours_best_ms": ours_best_ms, "peer_best_ms": peer_best_ms,
        "best_ratio": peer_best_ms / ours_best_ms,
    }  # fmt: skip


def measure(images: Path, masks: Path, rounds: int, limit: int) -> list[dict[str, Any]]:
    """All rows. images: a folder with train/, or with class folders; masks: its segments."""
    folder = images / "train" if (images / "train").is_dir() else images
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        store = pack(masks, Path(scratch, "masks.sqlite"))
        with_segments = store.images()
        paths = [path for path in find_images(folder) if segment_key(path) in with_segments][:limit]
        count = len(paths)
        print(f"{count} images of {folder}, segments of {masks}, {rounds} rounds, one core")
        write_png_form(store, paths, Path(scratch, "png"))
        peer = PngSamples(folder, Path(scratch, "png"), paths)
        ours = make_ours(folder, paths, store, MODEL, "four_channels")
        rows.append(
            compare("masked sample", "PIL, float tensors, PNG per segment",
                    partial(_ours, ours), partial(_theirs, peer), count, rounds)
        )  # fmt: skip
    patches = make_ours(folder, paths, None, MODEL, "patches")
    images_of_peer = make_peer_of_patches(folder)
    numbers = {path: number for number, (path, _) in enumerate(images_of_peer.samples)}
    order = [numbers[str(folder / path)] for path in paths]
    encoded = [_bytes(folder / path) for path in paths]
    for name, load in (
        ("torchvision ImageFolder", lambda index: images_of_peer[order[index]]),
        ("JPEG decoding alone", lambda index: decode_jpeg(encoded[index], ImageReadMode.RGB)),
    ):
        rows.append(compare("patches sample", name, partial(_ours, patches), load, count, rounds))
    return rows


def pack(masks: Path, store: Path) -> PackedStore:
    """The segments as a packed store."""
    if masks.suffix == ".sqlite":
        return open_segments(masks)
    command = [sys.executable, "-m", "segments", "pack", str(masks), "--out", str(store)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return open_segments(store)


def _ours(images: MaskedImages, index: int) -> Any:
    return images[(0, index)]


def _theirs(samples: PngSamples, index: int) -> Any:
    return samples[index]


def _bytes(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'work':<27} {'against':<38} {'ours ms':>8} {'peer ms':>8} {'ratio':>6} {'best':>17}")
    for row in rows:
        print(
            f"{row['work']:<27} {row['peer']:<38} {row['ours_ms']:8.2f} {row['peer_ms']:8.2f} "
            f"{row['ratio']:5.1f}x {row['ours_best_ms']:5.2f} {row['peer_best_ms']:5.2f} "
            f"{row['best_ratio']:4.1f}x"
        )


def sample_data(folder: Path) -> tuple[Path, Path]:
    """Generated images and their segments, by this repository's own benchmark.py."""
    command = [sys.executable, "benchmark.py", "sample", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return folder / "in1k", folder / "in1k/masks"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder with train/; default: generated images")
    parser.add_argument("--masks", type=Path, help="their segments; default: IMAGES/masks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=int, default=200, help="most images to use")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        images, masks = arguments.images, arguments.masks
        if images is None:
            images, masks = sample_data(Path(scratch) / "sample")
        rows = measure(images, masks or images / "masks", arguments.rounds, arguments.limit)
    print_rows(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
