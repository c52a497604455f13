"""What a whole run does beside computing steps of pretraining."""

import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor, nn

from common.formats import read_json
from common.step_files import RESULT
from engine.checkpoint import Saver
from engine.devices import peak_memory_mib
from engine.task import Run, load
from mae.config import PretrainConfig
from perf.campaign import Bench, Row, Table
from perf.rehearsal import afresh, build, divide, rehearse, stretch
from segmenter.config import ProbeConfig, TrainConfig

WARM_UP, MEASURED = 10, 20  # steps
AT_ONCE = 256  # as pretraining is measured: what it has compiled is compiled
# What is made, and what perf.masks says of it.
SEGMENTS = ("all", "for 15%"), ("images_per_s", "points_per_image", "imagenet_gpu_hours")
FEW = 8  # images, of which any dataset has so many
FINETUNING: dict[str, dict[str, Any]] = {  # options by name
    "eager": {"compile": "off"},
    "compiled": {},
    "compiled, interpolation": {},  # logits are upsampled as by F.interpolate
    "compiled, loss outside": {},  # it is no part of what is compiled
    "compiled, graphs": {"compile_mode": "reduce-overhead"},
}


def tables(bench: Bench, out: Path) -> list[Table]:
    """What decides most first. out: not used, rows are all that is left."""
    return [
        Table(
            title="finetuning steps, Segmenter ViT-L at 512, 150 classes", turn=6,
            columns=("images/s", "step ms", "first step s", "peak MiB"),
            rows=[
                _finetuning_row(bench, 8, name)
                for name in ("eager", "compiled", "compiled, interpolation")
            ],
        ),
        Table(
            title=f"pretraining with its loader, batch {AT_ONCE}", turn=7,
            columns=(
                "loader images/s", "resident images/s", "training images/s", "idle %", "waited %"
            ),
            rows=[
                Row(
                    work=f"{model} {method}", measure=partial(_with_loader, bench, model, method),
                    predicted="idle 0.1-2.8%",
                )
                for model, method in (("vit_base", "patches"), ("vit_base", "four_channels"))
            ],
        ),
        Table(
            title="checkpoint of ViT-L's pretraining", turn=9, columns=("copy s", "write s", "MB"),
            rows=[Row(work="weights and AdamW's moments", measure=partial(_checkpoint, bench))],
        ),
        Table(
            title="evaluation, Segmenter ViT-L at 512", turn=10, columns=("images/s", "peak MiB"),
            rows=[
                Row(
                    work=f"{group} image(s) together, at most {windows} windows",
                    measure=partial(_evaluation, bench, group, windows),
                )
                for group, windows in ((8, 32), (1, 8), (4, 8))
            ],
        ),
        Table(
            title="probe of ViT-L, 48 and 40 images", turn=11,
            columns=("tokens s", "linear s", "knn s", "all s"),
            rows=[Row(work="random weights", measure=partial(_probe, bench))],
        ),
        Table(
            title="finetuning steps in other ways", turn=19,
            columns=("images/s", "step ms", "first step s", "peak MiB"),
            rows=[
                *(_finetuning_row(bench, 8, name) for name in ("compiled, loss outside", "compiled, graphs")),
                *(_finetuning_row(bench, 1, name) for name in ("eager", "compiled")),
            ],
        ),
        *([_making_segments(bench)] if bench.sam else []),
    ]  # fmt: skip


def _finetuning_row(bench: Bench, batch: int, name: str) -> Row:
    return Row(work=f"batch {batch}, {name}", measure=partial(_finetuning, bench, batch, name))


def _with_loader(bench: Bench, model: str, method: str) -> dict[str, float]:
    """The loader alone, steps on one batch that is on the device, and both together.

    idle: of the device, by how much longer a step takes with the loader.
    """
    batch, warm_up, steps = bench.size(AT_ONCE), bench.size(WARM_UP), bench.size(MEASURED)
    run = build(
        bench.config(
            PretrainConfig, model=model, mask_method=method, batch_size=FEW,
            effective_batch_size=FEW, **bench.photographs,
        )
    )  # fmt: skip
    divide(run, passes=1, images=batch)
    stretch(run, (warm_up + steps) * batch)
    batches = load(run, (0, 0), 1)
    for _ in islice(batches, warm_up):
        pass
    began = time.monotonic()
    loaded = sum(len(loaded.inputs[0]) for loaded in batches) / (time.monotonic() - began)
    laps = {
        resident: rehearse(run, epochs=1, steps=warm_up + steps, resident=resident)
        for resident in (True, False)
    }
    alone, together = (statistics.mean(laps[resident].laps[warm_up:]) for resident in laps)
    return {
        "loader images/s": loaded, "resident images/s": batch / alone,
        "training images/s": batch / together, "idle %": 100 * max(0.0, 1 - alone / together),
        "waited %": 100 * laps[False].waited_share,
    }  # fmt: skip


def _segmenter(bench: Bench, batch: int, **options: Any) -> Run:
    """A finetuning of 150 classes, built."""
    return build(bench.config(TrainConfig, model="vit_large", batch_size=bench.size(batch, 1), **options))


def _finetuning(bench: Bench, batch: int, name: str) -> dict[str, float]:
    from segmenter.model import Segmenter

    run = _segmenter(bench, batch, workers=0, **FINETUNING[name])
    if "outside" in name:
        compiled = run.accelerator.prepare_model(run.model)
        run.prepared = _LossOutside(compiled, run.task.dataset.ignored)
    warm_up, steps = bench.size(WARM_UP), bench.size(MEASURED)
    interpolation = mock.patch.object(Segmenter, "upsample", _interpolated)
    with interpolation if "interpolation" in name else nullcontext():
        shown = rehearse(run, epochs=1, steps=warm_up + steps, resident=True)
    seconds = statistics.median(shown.laps[warm_up:])
    return {
        "images/s": run.plan.effective_batch_size / seconds, "step ms": seconds * 1e3,
        "first step s": shown.laps[0], "peak MiB": shown.peak_memory_mib,
    }  # fmt: skip


def _interpolated(model: Any, patch_logits: Tensor, height: int, width: int) -> Tensor:
    """In the place of `Segmenter.upsample`, which takes two products where gradients flow."""
    patch = model.shape.encoder.patch_size
    logits = nn.functional.interpolate(patch_logits.float(), scale_factor=patch, mode="bilinear")
    return logits[..., :height, :width]


class _LossOutside(nn.Module):
    """The model is compiled, its loss is not."""

    def __init__(self, model: nn.Module, ignore_index: int) -> None:
        super().__init__()
        self.model, self.ignore_index = model, ignore_index

    def forward(self, images: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        from segmenter.model import segmentation_loss

        return segmentation_loss(self.model(images, sizes), labels, self.ignore_index)


def _evaluation(bench: Bench, group: int, windows: int) -> dict[str, float]:
    """The second pass over the images is timed."""
    import segmenter.evaluate
    from segmenter.evaluate import evaluate_model

    run = _segmenter(bench, 8, eval_batch_size=group)
    with mock.patch.object(segmenter.evaluate, "MOST_WINDOWS", windows):
        for _ in range(2):
            began = time.monotonic()
            evaluate_model(run.accelerator, run.model, run.task.images, run.task.run)
            seconds = time.monotonic() - began
    return {
        "images/s": len(run.task.images) / seconds, "peak MiB": peak_memory_mib(bench.device)
    }  # fmt: skip


def _probe(bench: Bench) -> dict[str, float]:
    from segmenter.dataset import read_description
    from segmenter.probing import probe

    afresh()
    config = bench.config(ProbeConfig, model="vit_large", output_dir=bench.scratch / "timed-probe")
    began = time.monotonic()
    probe(config, read_description(config.run.dataset))
    whole = time.monotonic() - began
    seconds = read_json(config.run.output_dir / RESULT, dict[str, Any])["seconds"]
    return {"all s": whole, **{f"{name} s": took for name, took in seconds.items()}}


def _checkpoint(bench: Bench) -> dict[str, float]:
    """How long training stands still for it, and how long until it is on disk."""
    batch = bench.size(64)
    config = bench.config(
        PretrainConfig, model="vit_large", batch_size=batch, effective_batch_size=batch, workers=0,
        compile="off",
    )  # fmt: skip
    run: Any = build(config)
    rehearse(run, epochs=1, steps=1)  # AdamW's moments come with the first step
    path, marks = bench.scratch / "timed.pth", [time.monotonic()]
    with Saver(None) as saver:
        content = {
            "model": run.model.state_dict(), "optimizer": run.update.optimizer.state_dict()
        }  # fmt: skip
        saver.save(content, path)
        marks.append(time.monotonic())
        saver.settle(wait=True)
        marks.append(time.monotonic())
    return {
        "copy s": marks[1] - marks[0], "write s": marks[2] - marks[1],
        "MB": path.stat().st_size / 1e6,
    }  # fmt: skip


def _making_segments(bench: Bench) -> Table:
    """By checkpoint and points."""
    return Table(
        title="making segments", turn=20, columns=[f"{name}, {key}" for name, key in product(*SEGMENTS)],
        rows=[
            Row(
                work=f"{Path(model).name}, {points} x {points} points",
                measure=partial(_segments, bench, model, points),
            )
            for model in bench.sam
            for points in (16, 32)
        ],
    )  # fmt: skip


def _segments(bench: Bench, model: str, points: int) -> dict[str, Any]:
    """As perf.masks times it, for all segments and for those nearest to a coverage of 15%."""
    found, images = bench.scratch / "generators.json", bench.photographs["in1k_dir"] / "train"
    command = [
        sys.executable, "-m", "perf.masks", "--images", str(images), "--model", model,
        "--points-per-side", str(points), "--for-coverage", "15",
        "--most-images", str(bench.size(64)), "--json", str(found),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    rows = [row for row in read_json(found, list[dict[str, Any]]) if model in row["work"]]
    return {
        f"{'all' if row['for_coverage'] == 'all' else 'for 15%'}, {key}": row[key]
        for row in rows
        for key in SEGMENTS[1]
    }
