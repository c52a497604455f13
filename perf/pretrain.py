"""Pretraining steps: this model against transformers' ViTMAE. `python -m perf.pretrain --help`.

One process, our steps and the peer's in alternation, the same sizes, batch and precision; medians
over the rounds. The peer gets the same fused AdamW and scaled-dot-product attention; its images
arrive as normalised floats, as its loaders make them, ours as uint8. On a GPU all four methods are
measured besides, with model FLOPs utilisation and peak memory, against the plain form of this code
(no compile, float32 input).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.devices import peak_flops
from common.images import find_images
from common.update import GuardedUpdate
from common.vit import VIT_SIZES
from mae.config import MethodConfig, ModelConfig, OptimisationConfig, make_method
from mae.data import collate
from mae.listing import segment_key
from mae.masking import METHODS
from mae.model import MaskedAutoencoder, training_flops
from mae.optimisation import make_optimizer
from mae.segments.store import PackedStore
from perf.loader import make_ours, pack, sample_data

OPTIMISATION = OptimisationConfig(effective_batch_size=256)
Step = Callable[[], None]


def make_our_step(
    config: ModelConfig,
    mask_method: str,
    batch: tuple[Tensor, Tensor, int],
    device: torch.device,
    *,
    bf16: bool,
    compiled: bool,
    as_float: bool = False,
) -> Step:
    """A step as `common.training` takes it, on a batch of images, patterns, hidden pixels."""
    torch.manual_seed(0)
    method = make_method(MethodConfig(mask_method=mask_method), config)
    model = MaskedAutoencoder(config, method).to(device)
    update = GuardedUpdate(make_optimizer(model, OPTIMISATION), None, scales_loss=False)
    images, pattern, hidden_pixels = batch
    hidden_values = torch.tensor(float(hidden_pixels * 3), device=device)
    if as_float:
        images = model.cpu().normalise(images)
        model.to(device)
    run: Callable[..., Tensor] = model.squared_error if as_float else model
    run = torch.compile(run) if compiled else run
    if device.type == "cuda":
        images, pattern = images.pin_memory(), pattern.pin_memory()

    def step() -> None:
        on_device = [part.to(device, non_blocking=True) for part in (images, pattern)]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            error = run(*on_device).sum()
        error.backward()
        update.step(error.detach() / hidden_values, hidden_values, 1e-4)

    return step


def make_their_step(
    config: ModelConfig, batch: Tensor, device: torch.device, *, bf16: bool
) -> Step:
    """One training step of transformers' ViTMAE on normalised images."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    encoder = config.encoder
    model: Any = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=encoder.width,
            num_hidden_layers=encoder.depth,
            num_attention_heads=encoder.heads,
            intermediate_size=4 * encoder.width,
            image_size=config.image_size,
            patch_size=config.patch_pixels,
            decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=4 * config.decoder_width,
        )
    )
    model.set_attn_implementation("sdpa")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    if device.type == "cuda":
        batch = batch.pin_memory()

    def step() -> None:
        images = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def load_batch(
    folder: Path, source: PackedStore, config: ModelConfig, mask_method: str, size: int
) -> tuple[Tensor, Tensor, int]:
    """One batch of real samples: images uint8, patterns, and how many pixels are hidden."""
    usable = source.images()
    paths = [path for path in find_images(folder) if segment_key(path) in usable]
    images = make_ours(folder, paths, source, config, mask_method)
    batch = collate([images[(0, index % len(paths))] for index in range(size)])
    return batch.images, batch.pattern, int(batch.hidden_pixels.sum())


def seconds(step: Step, repeats: int, device: torch.device) -> float:
    """Time of one step, mean over some; on a CPU processor time, which others disturb less."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    _wait(device)
    began = clock()
    for _ in range(repeats):
        step()
    _wait(device)
    return (clock() - began) / repeats


def compare(
    ours: Step, theirs: Step, rounds: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Both in turn; medians in milliseconds, and how many times faster ours is."""
    times: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        pair = seconds(ours, repeats, device), seconds(theirs, repeats, device)
        if number:  # the first round warms up and compiles
            times.append(pair)
    return {
        "ours_ms": statistics.median(pair[0] for pair in times) * 1e3,
        "peer_ms": statistics.median(pair[1] for pair in times) * 1e3,
        "ratio": statistics.median(pair[1] / pair[0] for pair in times),
    }


def measure(
    arguments: argparse.Namespace, folder: Path, source: PackedStore
) -> list[dict[str, Any]]:
    """All rows for one model size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    config = ModelConfig(model=arguments.model, image_size=arguments.image_size)
    size = arguments.batch_size
    rounds, repeats = arguments.rounds, arguments.repeats
    name = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    print(f"{arguments.model}, {config.image_size} pixels, batch {size}, {name}", flush=True)
    batch = load_batch(folder, source, config, "patches", size)
    normalised = MaskedAutoencoder(config, make_method(MethodConfig(), config)).normalise(batch[0])
    ours = make_our_step(config, "patches", batch, device, bf16=on_gpu, compiled=on_gpu)
    theirs = make_their_step(config, normalised, device, bf16=on_gpu)
    row = compare(ours, theirs, rounds, repeats, device)
    rows = [{"work": f"{arguments.model} patches", "peer": "transformers ViTMAE", **row}]
    if not on_gpu:
        return rows
    del ours, theirs
    for method in METHODS:
        batch = load_batch(folder, source, config, method, size)
        plain = make_our_step(
            config, method, batch, device, bf16=True, compiled=False, as_float=True
        )
        ours = make_our_step(config, method, batch, device, bf16=True, compiled=True)
        row = compare(ours, plain, rounds, repeats, device)
        del plain  # or its weights would count as ours
        rows.append(
            {
                "work": f"{arguments.model} {method}",
                "peer": "no compile, float input",
                **row,
                **_gpu_figures(config, method, ours, size, row["ours_ms"], device),
            }
        )
        del ours
    return rows


def _gpu_figures(
    config: ModelConfig,
    method: str,
    step: Step,
    size: int,
    milliseconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """Images per second, model FLOPs utilisation and peak memory of a step."""
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _wait(device)
    images_per_second = size / milliseconds * 1e3
    flops = training_flops(config, make_method(MethodConfig(mask_method=method), config))
    peak = peak_flops(device, "bf16")
    return {
        "images_per_second": images_per_second,
        "mfu": flops * images_per_second / peak if peak else None,
        "peak_memory_mib": torch.cuda.max_memory_allocated(device) // 2**20,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'work':<24} {'against':<24} {'ours ms':>9} {'peer ms':>9} {'ratio':>6}")
    for row in rows:
        line = (
            f"{row['work']:<24} {row['peer']:<24} {row['ours_ms']:9.1f} {row['peer_ms']:9.1f} "
            f"{row['ratio']:5.2f}x"
        )
        if "images_per_second" in row:
            mfu = f"{row['mfu']:.0%}" if row["mfu"] else "?"
            line += f"  {row['images_per_second']:.0f} images/s, {mfu} of peak, "
            line += f"{row['peak_memory_mib']} MiB"
        print(line)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder with train/; default: generated images")
    parser.add_argument("--masks", type=Path, help="their segments; default: IMAGES/masks")
    parser.add_argument("--model", choices=list(VIT_SIZES), default="vit_base")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="steps per round")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        images, masks = arguments.images, arguments.masks
        if images is None:
            images, masks = sample_data(Path(scratch) / "sample")
        store = pack(masks or images / "masks", Path(scratch, "masks.sqlite"))
        rows = measure(arguments, images / "train", store)
    print_rows(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
