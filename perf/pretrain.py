"""The speed of pretraining, by real steps of the real trainer.

`python -m perf.pretrain` alone compares them with those of transformers' ViTMAE: one process, both
in turn, the same sizes, batch, precision and fused AdamW, medians over the rounds. The peer's
images are normalised floats on the device, as its loaders make them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch._inductor.utils import clear_caches, fresh_cache
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.benchmark import Timer

from common.environment import peak_flops
from engine.devices import choose_precision, device_name
from engine.task import Run, load
from engine.vit import IMAGE_CHANNELS, VIT_SIZES
from mae.config import ModelConfig, PretrainConfig, make_method, training_flops
from mae.masking import METHODS
from perf.campaign import Bench, Row, Table
from perf.rehearsal import build, rehearse, steps_of

WARM_UP, MEASURED = 10, 20  # steps; the first one compiles
USUAL, BATCHES = 256, (64, 128)
JUDGED: dict[str, Any] = {"model": "vit_large", "mask_method": "four_channels"}
LEAST_MFU_PERCENT = 30.0  # of its steps
MOST = "auto"  # --batch-size by the card's memory
# images/s and share of the peak of an H100 SXM, by roofline arithmetic. By model, method, batch.
PREDICTED = {
    ("vit_base", "patches", 64): "3,550-4,020, 21-24%",
    ("vit_base", "patches", 256): "3,830-4,350, 23-26%",
    ("vit_base", "four_channels", 64): "1,820-2,050, 25-29%",
    ("vit_base", "four_channels", 256): "1,860-2,100, 26-29%",
    ("vit_large", "patches", 64): "1,960-2,200, 25-28%",
    ("vit_large", "patches", 256): "2,230-2,510, 28-32%",
    ("vit_large", "four_channels", 64): "770-860, 31-35%",
    ("vit_large", "four_channels", 256): "790-890, 32-36%",
}
LONGEST = 15  # kernels that are named
SPEED = ("images/s", "MFU %", "peak MiB", "step ms", "first step s", "images per pass", "graphs")


def tables(bench: Bench, out: Path) -> list[Table]:
    """What decides most first. out: for the traces."""
    return [
        Table(
            title="steps", turn=3, columns=SPEED,
            rows=[
                _speed_row(bench, model, method, USUAL, trace=out / f"trace-{model}-{method}.json.gz")
                for model, method in (
                    ("vit_large", "four_channels"), ("vit_large", "patches"),
                    ("vit_base", "patches"), ("vit_base", "four_channels"),
                )
            ],
        ),
        *_tables_of_levers(bench),
        Table(
            title="against transformers' ViTMAE", turn=15, columns=("ours ms", "peer ms", "ratio"),
            rows=[Row(work="vit_large patches at 128", measure=partial(_against_peer, bench))],
        ),
        Table(
            title="parts, forward and backward", turn=16, columns=("ms",), rows=list(_parts(bench))
        ),
        Table(title="steps of other sizes", turn=17, columns=SPEED, rows=list(_other_rows(bench))),
        Table(
            title="compiling", turn=18, columns=("cold s", "warm s"),
            rows=[
                Row(work=f"{model} four_channels", measure=partial(_compile_seconds, bench, model))
                for model in ("vit_large", "vit_base")
            ],
        ),
    ]  # fmt: skip


def _tables_of_levers(bench: Bench) -> list[Table]:
    """What may make ViT-L's step shorter, one by one."""
    judged = partial(speed, bench, **JUDGED)
    most = {"batch": MOST, "compile": "off"}
    return [
        Table(
            title="ViT-L four_channels, levers", turn=4, columns=SPEED,
            rows=[
                Row(
                    work=" ".join(f"{name} {value}" for name, value in options.items()), predicted=images,
                    measure=partial(judged, batch=USUAL, **options),
                )
                for options, images in (
                    ({"precision": "bf16-residual"}, "1,035; H200 1,130"),
                    ({"precision": "float8"}, "1,290; H200 1,430"),
                    ({"compile_regions": True}, ""),
                )
            ],
        ),
        Table(
            title="ViT-L four_channels, eager", turn=5, columns=SPEED,
            rows=[
                Row(work="as many images as fit", measure=partial(judged, **most)),
                *(
                    Row(
                        work=f"{attention} attention, {USUAL}",
                        measure=partial(judged, batch=USUAL, attention=attention, compile="off"),
                    )
                    for attention in ("flash", "cudnn")
                ),
            ],
        ),
        Table(
            title=f"ViT-L four_channels at {USUAL}", turn=13, columns=SPEED,
            rows=[
                Row(work="cudnn attention", measure=partial(judged, batch=USUAL, attention="cudnn")),
                *(
                    Row(work=mode, measure=partial(judged, batch=USUAL, compile_mode=mode))
                    for mode in ("max-autotune-no-cudagraphs", "reduce-overhead")
                ),
            ],
        ),
    ]  # fmt: skip


def _other_rows(bench: Bench) -> Iterator[Row]:
    others = [method for method in METHODS if method not in ("four_channels", "patches")]
    for model in ("vit_large", "vit_base"):
        for method in ("four_channels", "patches"):
            for batch in BATCHES:
                yield _speed_row(bench, model, method, batch)
        for method in others:
            yield _speed_row(bench, model, method, 128)


def _speed_row(bench: Bench, model: str, method: str, batch: int, **more: Any) -> Row:
    return Row(
        work=f"{model} {method}, {batch}",
        measure=partial(speed, bench, model=model, mask_method=method, batch=batch, **more),
        predicted=PREDICTED.get((model, method, batch), ""),
    )


def speed(bench: Bench, *, batch: int | str, trace: Path | None = None, **options: Any) -> dict[str, Any]:
    """Medians of real steps on a batch that is on the device; `MOST`: as many images as it holds.

    A step is one pass but for those, of which a step has 512.
    """
    size = batch if batch == MOST else bench.size(int(batch))
    effective = bench.size(512 if batch == MOST else int(batch))
    config = bench.config(
        PretrainConfig, batch_size=size, effective_batch_size=effective, workers=0, **options
    )
    run = build(config)
    warm_up, measured = bench.size(WARM_UP), bench.size(MEASURED)
    shown = rehearse(run, epochs=1, steps=warm_up + measured, resident=True)
    seconds = statistics.median(shown.laps[warm_up:])
    flops = training_flops(config.model, make_method(config.method, config.model))
    peak = peak_flops(device_name(bench.device), run.accelerator.mixed_precision)
    figures: dict[str, Any] = {
        "images/s": effective / seconds, "step ms": seconds * 1e3,
        "peak MiB": shown.peak_memory_mib, "first step s": shown.laps[0],
        "images per pass": effective // run.plan.accumulation_steps, "graphs": shown.graphs,
    }  # fmt: skip
    if peak:
        figures["MFU %"] = 100 * flops * effective / seconds / peak
    if peak and options == JUDGED and batch == USUAL:
        figures["passes"] = figures["MFU %"] >= LEAST_MFU_PERCENT
    if trace:
        try:
            figures["longest"] = _longest(run, trace)
        except Exception as error:  # the figures stand without it
            figures["longest"] = f"{type(error).__name__}: {error}"
    return figures


def _compile_seconds(bench: Bench, model: str) -> dict[str, float]:
    """The first step with nothing on disk, and with what it has left there."""
    config = _at_128(bench, model=model, mask_method="four_channels")
    with fresh_cache():
        cold = rehearse(build(config), epochs=1, steps=2, resident=True)
        clear_caches()
        warm = rehearse(build(config), epochs=1, steps=2, resident=True)
    return {"cold s": cold.laps[0], "warm s": warm.laps[0]}


def _at_128(bench: Bench, **options: Any) -> PretrainConfig:
    """Steps of one pass over 128 images."""
    batch = bench.size(128)
    return bench.config(PretrainConfig, batch_size=batch, effective_batch_size=batch, workers=0, **options)


def _longest(run: Run, path: Path) -> str:
    """What takes longest in three steps, of which a trace for chrome://tracing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile() as seen:
        rehearse(run, epochs=1, steps=3, resident=True)
    seen.export_chrome_trace(str(path))
    on_gpu = run.accelerator.device.type == "cuda"  # where operators count their kernels' time again
    busy = {
        e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total
        for e in seen.key_averages()
        if not (e.is_user_annotation or (on_gpu and e.device_type == DeviceType.CPU))
    }
    longest = sorted(busy, key=lambda name: busy[name], reverse=True)[:LONGEST]
    return "; ".join(f"{name[:60]} {busy[name] / sum(busy.values()):.1%}" for name in longest)


def _parts(bench: Bench) -> Iterator[Row]:
    """Layers that can be computed in more than one way, by themselves."""
    width, patch = VIT_SIZES["vit_large"].width, 16
    images = (bench.size(128), IMAGE_CHANNELS + 1, bench.size(224, 32), bench.size(224, 32))
    tiles = (images[0], (images[2] // patch) ** 2, images[1] * patch**2)
    layers: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "patch embedding, convolution": (
            partial(nn.Conv2d, images[1], width, patch, stride=patch), images
        ),
        "patch embedding, matrix product": (partial(nn.Linear, tiles[2], width), tiles),
        "preencoder's convolution": (
            partial(nn.Conv2d, images[1], IMAGE_CHANNELS, patch, padding="same"), images
        ),
    }  # fmt: skip
    for per_head in (64, 32):
        for tokens in (50, 197, 1025):
            layers[f"attention, heads of {per_head}, {tokens} tokens"] = (
                partial(Attention, width, num_heads=width // per_head, qkv_bias=True),
                (images[0], tokens, width) if not bench.tiny else (2, tokens // 5, width),
            )
    for name, (make, shape) in layers.items():
        yield Row(work=name, measure=partial(_layer_ms, bench, make, shape))


def _layer_ms(bench: Bench, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
    """Median of a forward and backward pass in the run's precision."""
    layer = make().to(bench.device)
    inputs = torch.randn(shape, device=bench.device, requires_grad=True)
    on_cuda = bench.device.type == "cuda"
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    low = kinds.get(choose_precision("auto", on_cuda=on_cuda))

    def both() -> None:
        with torch.autocast(bench.device.type, low, enabled=low is not None):
            outputs = layer(inputs)
        outputs.backward(outputs)

    found = Timer("both()", globals={"both": both}).blocked_autorange(min_run_time=0.2)
    return {"ms": found.median * 1e3}


def _against_peer(bench: Bench) -> dict[str, float]:
    config = _at_128(bench, model="vit_large", mask_method="patches")
    return compare(config, rounds=bench.size(5), steps=bench.size(10))


def compare(config: PretrainConfig, *, rounds: int, steps: int) -> dict[str, float]:
    """Both in turn, some steps each; medians in milliseconds of a step, and the peer's to ours.

    On a CPU in processor time, which others disturb less.
    """
    run: Any = build(config)
    device = run.accelerator.device
    ours = steps_of(run, steps)
    batch = next(load(run, (0, 0), 1)).inputs[0].to(device)
    theirs = make_peer(config.model, run.model.normalise(batch), run.accelerator, steps)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: list[tuple[float, ...]] = []
    for _ in range(rounds + 1):
        marks = [clock()]
        for work in (ours, theirs):
            work()
            _wait(device)
            marks.append(clock())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    warm = times[1:]  # the first round compiles
    return {
        "ours ms": statistics.median(a for a, _ in warm) / steps * 1e3,
        "peer ms": statistics.median(b for _, b in warm) / steps * 1e3,
        "ratio": statistics.median(b / a for a, b in warm),
    }


def make_peer(config: ModelConfig, images: Tensor, accelerator: Any, steps: int) -> Callable[[], None]:
    """Some training steps of transformers' ViTMAE on normalised images."""
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
    model.to(accelerator.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def train() -> None:
        for _ in range(steps):
            with accelerator.autocast():
                loss = model(images).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return train


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder with train/; default: generated images")
    parser.add_argument("--masks", type=Path, help="their segments; default: IMAGES/masks")
    parser.add_argument("--model", choices=list(VIT_SIZES), default="vit_base")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="steps per round")
    parser.add_argument("--json", type=Path, help="also write the row to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            wanted="auto", tiny=False, scratch=Path(scratch), images=arguments.images,
            masks=arguments.masks,
        )  # fmt: skip
        config = bench.config(
            PretrainConfig, model=arguments.model, image_size=arguments.image_size,
            mask_method="patches", batch_size=arguments.batch_size,
            effective_batch_size=arguments.batch_size, **bench.photographs,
        )  # fmt: skip
        row = {**bench.machine, **compare(config, rounds=arguments.rounds, steps=arguments.repeats)}
    print("  ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
