"""Time to fetch and decode one segment of the packed store, and the bytes that the forms take.

    python perf/masks.py --masks IN1K/masks [--json rows.json]

The peer is what people do today: one PNG per segment beside a text table of coverages; read the
table, choose the line nearest to the wanted coverage, open that PNG with Pillow. It and the store
take turns on the same images in one process. Without --masks, `benchmark.py sample` makes data.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python perf/masks.py` finds the packages beside perf/

from mae.segments.folders import PngTableFolder  # noqa: E402
from mae.segments.forms import SegmentSource, open_any_form  # noqa: E402
from mae.segments.pack import pack, unpack  # noqa: E402
from mae.segments.store import PackedStore  # noqa: E402

BLOCK = 4096
PEER = "PNG + table (Pillow)"


def main() -> None:
    """Measure, print a table, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--masks", type=Path, help="segments in any form")
    parser.add_argument("--most-images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--coverage-ratio", type=float, default=15.0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        source = open_any_form(arguments.masks or make_sample(scratch))
        keys = sorted(source.images())[: arguments.most_images]
        forms = write_forms(source, keys, scratch)
        rows = measure(forms, keys, arguments.coverage_ratio, arguments.rounds)
        rows += count_bytes(forms)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def make_sample(scratch: Path) -> Path:
    """Segments of generated images."""
    command = [sys.executable, str(ROOT / "benchmark.py"), "sample", str(scratch / "sample")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return scratch / "sample/in1k/masks"


def write_forms(source: SegmentSource, keys: list[str], scratch: Path) -> dict[str, Path]:
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
        (folder / PngTableFolder.table).write_text("\n".join(table) + "\n")
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


def measure(
    forms: dict[str, Path], keys: list[str], ratio: float, rounds: int
) -> list[dict[str, str | float]]:
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


def count_bytes(forms: dict[str, Path]) -> list[dict[str, str | float]]:
    """Files, and bytes in blocks of 4 KB, of every form against the PNGs with a table."""
    files = {
        name: [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        for name, path in forms.items()
    }
    sizes = {
        name: sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in paths)
        for name, paths in files.items()
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
