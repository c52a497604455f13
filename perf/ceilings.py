"""What the card can do at most: copying, matrix products, attention by each kernel."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from engine.devices import ATTENTION
from perf.campaign import Bench, Row, Table

SIDE = 8192  # of a square matrix
IMAGES, HEADS = 256, 16  # of attention: ViT-L's encoder has heads of 64, its decoder of 32
FORWARD_AND_BACKWARD = 3.5  # products, as many times as a forward pass has


def tables(bench: Bench, out: Path) -> list[Table]:
    """Copies and products, then attention. out: not used, rows are all that is left."""
    return [
        Table(
            title="ceilings", turn=1, columns=("GB/s", "TFLOP/s"),
            rows=[
                Row(work="copy of 4 GB", measure=partial(_copy, bench)),
                Row(work=f"bf16 product, {SIDE}", measure=partial(_product, bench)),
            ],
        ),
        Table(
            title="attention of 256 images, 16 heads, forward and backward", turn=1,
            columns=("ms", "TFLOP/s"),
            rows=[
                Row(
                    work=f"{tokens} tokens, heads of {per_head}, {kernel}",
                    measure=partial(_attention, bench, tokens, per_head, kernel),
                )
                for tokens in (197, 50)
                for per_head in (64, 32)
                for kernel in ("flash", "cudnn")
            ],
        ),
    ]  # fmt: skip


def _seconds(work: Callable[[], Any]) -> float:
    """Median; the timer waits for the device."""
    work()
    return Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=0.3).median


def _copy(bench: Bench) -> dict[str, float]:
    """Bytes read and written."""
    source = torch.ones(bench.size(2**32), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return {"GB/s": 2 * source.nbytes / _seconds(lambda: target.copy_(source)) / 1e9}


def _product(bench: Bench) -> dict[str, float]:
    side = bench.size(SIDE)
    left, right = torch.randn(2, side, side, device=bench.device, dtype=torch.bfloat16)
    return {"TFLOP/s": 2 * side**3 / _seconds(lambda: left @ right) / 1e12}


def _attention(bench: Bench, tokens: int, per_head: int, kernel: str) -> dict[str, float]:
    images = bench.size(IMAGES)
    projected = torch.randn(
        images, tokens, 3, HEADS, per_head, device=bench.device, dtype=torch.bfloat16, requires_grad=True
    )
    query, key, value = projected.permute(2, 0, 3, 1, 4).unbind()
    gradient = torch.randn(images, HEADS, tokens, per_head, device=bench.device, dtype=torch.bfloat16)

    def both() -> None:
        with sdpa_kernel(ATTENTION[kernel]):
            scaled_dot_product_attention(query, key, value).backward(gradient, retain_graph=True)
        projected.grad = None

    seconds = _seconds(both)
    flops = FORWARD_AND_BACKWARD * 4 * images * HEADS * tokens**2 * per_head
    return {"ms": seconds * 1e3, "TFLOP/s": flops / seconds / 1e12}
