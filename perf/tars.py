"""Images from a folder, from its tars, and from tars of images shrunk once: `python -m perf.tars --help`.

Processor time of a `patches` sample of 224 pixels on one core against bare decoding of the original
JPEG, as perf.loader measures it; files opened for each sample, counted by strace; bytes; and what
shrinking does to the pixels of a crop and to the loss of a short pretraining.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.io import ImageReadMode, decode_jpeg

from common.images import open_images
from common.options import Layer, make_all
from mae.config import GROUPS, PretrainConfig
from mae.pack import PackOptions, pack_images
from mae.pretrain import pretrain
from perf.loader import MODEL, REPOSITORY, _bytes, _ours, compare, make_ours

# Reads every image of a folder so often; what opens them is counted from outside.
READER = """
import sys
from pathlib import Path
from common.images import open_images
images = open_images(Path(sys.argv[1]))
for name in images.names * int(sys.argv[2]):
    source = images.source / name
    (source.read if hasattr(source, "read") else source.read_bytes)()
"""
SHORT = {
    "mask_method": "patches", "model": "vit_tiny", "decoder_width": 64, "decoder_depth": 2,
    "decoder_heads": 4, "effective_batch_size": 32, "batch_size": 32, "base_lr": 1e-3, "val_images": 0,
    "workers": 1, "device": "cpu", "use_unmasked_images": True, "log_with": ("none",),
}  # fmt: skip


def opens_per_sample(folder: Path) -> float:
    """Calls of openat below the folder, of each further read of an image."""
    counts, names = [], open_images(folder).names
    for passes in (1, 3):
        with tempfile.NamedTemporaryFile() as calls:
            traced = ["strace", "-f", "-qq", "-e", "trace=openat,open", "-o", calls.name]
            command = [*traced, sys.executable, "-c", READER, str(folder), str(passes)]
            subprocess.run(command, cwd=REPOSITORY, check=True)
            counts.append(sum(str(folder) in line for line in Path(calls.name).read_text().splitlines()))
    return (counts[1] - counts[0]) / (2 * len(names))


def losses(in1k_dir: Path, epochs: int, seed: int) -> list[float]:
    """train_loss of each epoch."""
    with tempfile.TemporaryDirectory() as out:
        given = {**SHORT, "in1k_dir": in1k_dir, "output_dir": Path(out), "epochs": epochs, "seed": seed}
        if not pretrain(PretrainConfig(**make_all(GROUPS, [Layer(given)]))):
            raise RuntimeError("stopped by a signal")
        return [json.loads(line)["train_loss"] for line in (Path(out) / "log.txt").read_text().splitlines()]


def measure(train: Path, scratch: Path, rounds: int, epochs: int, seeds: int) -> list[dict[str, Any]]:
    """A row for each form. train: a folder of JPEGs."""
    folders = {"folder": train}
    for form, side in (("tar", None), ("tar at 320", 320)):
        folders[form] = scratch / form / "train"
        pack_images(train, folders[form], PackOptions(short_side=side, processes=1))
    names = open_images(train).names
    encoded = [_bytes(train / name) for name in names]
    reference, rows = None, []
    for form, folder in folders.items():
        images = open_images(folder)
        ours = make_ours(images.source, images.names, None, MODEL, "patches")
        decode: Any = lambda index: decode_jpeg(encoded[index], ImageReadMode.RGB)  # noqa: E731
        row = compare(form, "JPEG decoding alone", partial(_ours, ours), decode, len(names), rounds)
        crops = torch.stack([ours[0, index].image.float() for index in range(len(names))])
        reference = crops if reference is None else reference
        files = folder.rglob("*.JPEG") if form == "folder" else folder.glob("*.tar")
        row |= {
            "opens": opens_per_sample(folder), "mib": sum(path.stat().st_size for path in files) / 2**20,
            "crops_differ": (crops - reference).abs().mean().item(),
            "losses": [losses(folder.parent, epochs, seed)[-1] for seed in range(seeds)] if epochs else [],
        }  # fmt: skip
        rows.append(row)
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs, such as IN1K/train")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=0, help="of the short pretraining; 0: none")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images.resolve()
        rows = measure(images, Path(scratch), arguments.rounds, arguments.epochs, arguments.seeds)
    print("form             ms decoding  ratio   best  opens     MiB  crops  losses")
    for row in rows:
        ratio, best = row["ours_ms"] / row["peer_ms"], row["ours_best_ms"] / row["peer_best_ms"]
        print(
            f"{row['work']:<12} {row['ours_ms']:6.2f} {row['peer_ms']:8.2f} {ratio:6.2f} {best:6.2f} "
            f"{row['opens']:6.2f} {row['mib']:7.1f} {row['crops_differ']:6.2f}  "
            f"{' '.join(f'{loss:.4f}' for loss in row['losses'])}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
