"""Time to fetch and decode one segment, the bytes that the forms take, and what making them costs.

    python perf/masks.py --masks IN1K/masks [--json rows.json]
    python perf/masks.py --images IN1K/train --model FOLDER,... [--for-coverage 15]

The peer is what people do today: one PNG per segment beside a text table of coverages; read the
table, choose the line nearest to the wanted coverage, open that PNG with Pillow. It and the store
take turns on the same images in one process. Without --masks, `benchmark.py sample` makes data.
With --images, generators are timed: Felzenszwalb on one core, and each --model by its parts.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python perf/masks.py` finds the packages beside perf/


from segments.config import FelzenszwalbSettings, SamSettings  # noqa: E402
from segments.felzenszwalb import Felzenszwalb  # noqa: E402
from segments.forms import AnyForm, open_any_form  # noqa: E402
from segments.generate import Generator, Work, images_by_key  # noqa: E402
from segments.pack import pack, unpack  # noqa: E402
from segments.sam import Sam  # noqa: E402
from segments.store import PackedStore  # noqa: E402

BLOCK = 4096
IMAGENET_IMAGES = 1_281_167
PARTS = {
    "encoder": ["encode"], "decoder": ["decode"], "post_processing": ["judge"],
    "encoding": ["run_lengths"],
}  # fmt: skip
Row = dict[str, Any]
PEER = "PNG + table (Pillow)"


def main() -> None:
    """Measure, print a table, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--masks", type=Path, help="segments in any form")
    parser.add_argument("--most-images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--coverage-ratio", type=float, default=15.0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--images", type=Path, help="time the generators on these instead")
    parser.add_argument("--model", default="", help="checkpoints for mask generation")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--for-coverage", type=float, nargs="*", default=[])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.images:
        report(time_generators(arguments), arguments.json)
        return
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        source = open_any_form(arguments.masks or make_sample(scratch))
        keys = sorted(source.images())[: arguments.most_images]
        forms = write_forms(source, keys, scratch)
        rows = measure(forms, keys, arguments.coverage_ratio, arguments.rounds)
        rows += count_bytes(forms)
    report(rows, arguments.json)


def report(rows: list[Row], path: Path | None) -> None:
    """Print the rows, and write them."""
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def time_generators(arguments: argparse.Namespace) -> list[Row]:
    """Images/s and the price of ImageNet for all segments and for the wanted coverages."""
    rows = []
    for ratios in dict.fromkeys([(), tuple(arguments.for_coverage)]):
        generators: list[Generator] = [Felzenszwalb(FelzenszwalbSettings(for_coverage=ratios))]
        for model in filter(None, arguments.model.split(",")):
            options = {"model": model, "points_per_side": arguments.points_per_side}
            generators.append(Sam(SamSettings(for_coverage=ratios, **options)))
        for generator in generators:
            rows.append(time_generator(arguments.images, generator, arguments.most_images, ratios))
    return rows


def time_generator(folder: Path, generator: Generator, most_images: int, ratios: tuple[float, ...]) -> Row:
    """One row; the GPU's column stays empty where there is none."""
    work = Work(images_by_key(folder, None), generator)
    batches = work.batches[: -(-most_images // generator.batch_size)]
    work.segment(work.read(batches[0]))
    seconds: Counter[str] = Counter()
    for part, methods in PARTS.items():
        for method in methods:
            if hasattr(generator, method):
                setattr(generator, method, timed(getattr(generator, method), part, seconds))
    generator.tally.clear()
    started = time.perf_counter()
    for paths in batches:
        work.segment(work.read(paths))
    whole = time.perf_counter() - started
    images = sum(map(len, batches))
    hours = round(whole / images * IMAGENET_IMAGES / 3600, 1)
    on_gpu = isinstance(generator, Sam) and generator.device.type == "cuda"
    points = generator.tally["points"]
    return {
        "work": f"generate {generator.settings.get('model', generator.name)}",
        "for_coverage": ",".join(f"{ratio:g}" for ratio in ratios) or "all",
        "images_per_s": round(images / whole, 3),
        **{f"{part}_percent": round(100 * seconds[part] / whole) for part in PARTS},
        "points_per_image": round(points / images),
        "imagenet_cpu_hours": "" if on_gpu else hours,
        "imagenet_gpu_hours": hours if on_gpu else "",
    }


def timed(method: Callable[..., Any], part: str, seconds: Counter[str]) -> Callable[..., Any]:
    """The method, which adds what it took to its part, once the GPU is done."""

    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = method(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[part] += time.perf_counter() - started  # type: ignore[assignment]
        return result

    return call


def make_sample(scratch: Path) -> Path:
    """Segments of generated images."""
    command = [sys.executable, str(ROOT / "benchmark.py"), "sample", str(scratch / "sample")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return scratch / "sample/in1k/masks"


def write_forms(source: AnyForm, keys: list[str], scratch: Path) -> dict[str, Path]:
    """The same segments in every form, in folders of their own."""
    forms = {
        "packed store": scratch / "store/masks.sqlite",
        "RLE JSON": scratch / "json",
        "PNG + table": scratch / "table",
    }
    for key in keys:
        folder = forms["PNG + table"] / key
        folder.mkdir(parents=True)
        table = []
        for number, segment in enumerate(source.segments(key)):
            Image.fromarray(segment.decode() * 255).save(folder / f"{number}.png")
            table.append(f"{segment.coverage_percent:.6f} {number}.png")
        (folder / "table.txt").write_text("\n".join(table) + "\n")
    forms["packed store"].parent.mkdir()
    pack(forms["PNG + table"], forms["packed store"], overwrite=False, allow_damaged=False,
         processes=1)  # fmt: skip
    unpack(forms["packed store"], forms["RLE JSON"], processes=1)
    return forms


def read_as_today(folder: Path, key: str, ratio: float) -> np.ndarray:
    """The peer: [H, W] uint8, 1 inside."""
    lines = (folder / key / "table.txt").read_text().splitlines()
    entries = [line.split() for line in lines]
    nearest = min(entries, key=lambda entry: abs(float(entry[0]) - ratio))
    with Image.open(folder / key / nearest[1]) as image:
        return (np.asarray(image) > 0).astype(np.uint8)


def measure(forms: dict[str, Path], keys: list[str], ratio: float, rounds: int) -> list[Row]:
    """Milliseconds per segment, the median of the rounds, of the store and of the peer."""
    store = PackedStore(forms["packed store"])

    def read_ours(key: str) -> np.ndarray:
        segment = store.nearest(key, ratio)
        assert segment is not None, key
        return segment.decode()

    def read_peer(key: str) -> np.ndarray:
        return read_as_today(forms["PNG + table"], key, ratio)

    for key in keys:  # they agree, and everything is in the page cache
        assert (read_ours(key) == read_peer(key)).all(), key
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for name, read in (("ours", read_ours), ("peer", read_peer)):
            start = time.perf_counter()
            for key in keys:
                read(key)
            times[name].append((time.perf_counter() - start) / len(keys) * 1000)
    ours, peer = statistics.median(times["ours"]), statistics.median(times["peer"])
    return [
        {
            "work": "fetch and decode one segment: packed store",
            "peer": PEER,
            "ours_ms": round(ours, 4),
            "peer_ms": round(peer, 4),
            "ratio": round(peer / ours, 2),
        }
    ]


def count_bytes(forms: dict[str, Path]) -> list[Row]:
    """Files, and bytes in blocks of 4 KB, of every form against the PNGs with a table."""
    files = {
        name: [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        for name, path in forms.items()
    }
    sizes = {
        name: sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in paths) for name, paths in files.items()
    }
    return [
        {
            "work": f"bytes on disk: {name}",
            "peer": "PNG + table",
            "ours_bytes": sizes[name],
            "peer_bytes": sizes["PNG + table"],
            "ratio": round(sizes["PNG + table"] / sizes[name], 2),
            "files": len(files[name]),
        }
        for name in forms
    ]


if __name__ == "__main__":
    main()
