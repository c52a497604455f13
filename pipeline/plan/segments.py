"""The steps that come before a pretraining which reads segments: to make them, or to pack them.

Which of the two, if any, is seen by looking where the segments should be.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.options import fields_of
from common.step_files import shard_path
from engine.config import DeviceConfig
from mae.check import segments_at, store_in
from mae.config import PretrainConfig
from mae.masking import METHODS
from pipeline.plan.layout import Layout
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Arguments, Step
from segments.config import GENERATORS

MAKING = ("pack", "generate", "merge")  # kinds of steps; the last of them leaves the store
_ANY_MODEL = "sam"  # the generator that takes a model's name or folder
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class _Generator:
    """What makes segments. name: of its command; model: where it takes any."""

    name: str
    model: str | None = None


def with_segments(
    steps: Sequence[Step], settings: Settings, done: Collection[str] = ()
) -> list[Step]:
    """The plan, begun by what leaves the segments that its pretrainings read.

    done: names of steps; nothing is made for those. Raises ValueError for a generator that there is
    not, whether it is needed or not.
    """
    data, paths = settings.data, Layout(settings.data.output_dir)
    generator = _find_generator(data.make_segments) if data.make_segments else None
    reading = [step for step in steps if reads_segments(step)]
    # Of a run only the first step that is left waits; those after it wait for that one.
    first = {step.run: step.name for step in reversed(reading) if step.name not in done}
    if not first or data.in1k_dir is None:
        return list(steps)
    source = data.masks_dir or data.in1k_dir / "masks"
    form, store = segments_at(source), store_in(source) or paths.segments
    if form == "loose":
        made = [_pack(source, store, paths)]
    elif form == "none" and generator is not None:
        made = _generate(generator, store, _wanted_ratios(reading), settings)
    else:
        return list(steps)
    planned = []
    for step in steps:
        if store == paths.segments and reads_segments(step):
            # Its settings stay: they are the same segments in another place.
            step = with_store(step, store)
        if first.get(step.run) == step.name:
            step = replace(step, needs=(*step.needs, made[-1].name))
        planned.append(step)
    return [*made, *planned]


def reads_segments(step: Step) -> bool:
    """Whether it is a pretraining that hides segments, or leaves images out that have none."""
    config = step.config
    return isinstance(config, PretrainConfig) and not config.data.use_unmasked_images


def with_store(step: Step, masks_dir: Path | None) -> Step:
    """A pretraining that reads its segments there."""
    assert isinstance(step.config, PretrainConfig)
    data = replace(step.config.data, masks_dir=masks_dir)
    return replace(step, config=replace(step.config, data=data))


def _pack(source: Path, store: Path, paths: Layout) -> Step:
    words = (str(source), "--out", str(store))
    return Step(
        name="pack_segments", kind="pack", run="segments", epochs=0, program=("segments", "pack"),
        config=Arguments(words=words, what="pack the segments into one file"), processes=1,
        needs=(), folder=paths.bookkeeping / "pack", outputs=(store,), settings={},
    )  # fmt: skip


def _generate(
    generator: _Generator, store: Path, ratios: Sequence[float], settings: Settings
) -> list[Step]:
    """One step, or as many as there are shards and one that joins what they leave."""
    data, compute = settings.data, settings.compute
    paths, count = Layout(data.output_dir), data.segment_shards
    decisive = {"generator": generator.name, "model": generator.model, "for_coverage": [*ratios]}
    runs_on_gpus = "device" in fields_of(GENERATORS[generator.name])
    run = DeviceConfig(device="cuda" if compute.num_gpus else "cpu")
    run = run if runs_on_gpus else DeviceConfig()
    is_local = settings.cluster.launcher == "local"
    parts = paths.bookkeeping / "segments" / store.name if count > 1 else store
    shared: dict[str, Any] = {"run": "segments", "epochs": 0, "processes": 1, "settings": decisive}
    shards = [
        Step(
            name="generate_segments" + (f"_{index}-of-{count}" if count > 1 else ""),
            kind="generate", program=("segments", "generate"), needs=(),
            config=Arguments(
                words=_words(generator, ratios, settings, parts, f"{index}/{count}", run),
                what=f"make segments by {generator.model or generator.name}", run=run,
            ),
            gpus=compute.pretrain_gpus or None if runs_on_gpus and is_local else None,
            folder=paths.bookkeeping / f"generate-{index}",
            outputs=(shard_path(parts, index, count),), **shared,
        )
        for index in range(count)
    ]  # fmt: skip
    if count == 1:
        return shards
    left = [str(path) for step in shards for path in step.outputs]
    config = Arguments(
        words=(*left, "--out", str(store), "--overwrite"),
        what=f"join the {count} parts of the segments",
    )
    merge = Step(
        name="merge_segments", kind="merge", program=("segments", "merge"), config=config,
        needs=tuple(step.name for step in shards), folder=paths.bookkeeping / "merge",
        outputs=(store,), **shared,
    )  # fmt: skip
    return [*shards, merge]


def _words(
    generator: _Generator,
    ratios: Sequence[float],
    settings: Settings,
    out: Path,
    shard: str,
    run: DeviceConfig,
) -> tuple[str, ...]:
    """What follows `python -m segments generate`."""
    assert settings.data.in1k_dir is not None
    images, val = (settings.data.in1k_dir / folder for folder in ("train", "val"))
    words = [generator.name, "--images", str(images), "--out", str(out), "--shard", shard]
    words += ["--val-dir", str(val)] if val.is_dir() else []
    words += ["--model", generator.model] if generator.model else []
    words += ["--for-coverage", ",".join(map(str, ratios))] if ratios else []
    words += ["--device", run.device] if run.device != "auto" else []
    return tuple(words)


def _wanted_ratios(reading: Sequence[Step]) -> list[float]:
    """The coverages to which every method needs the nearest segment; none: all segments."""
    methods = [s.config.method for s in reading if isinstance(s.config, PretrainConfig)]
    known = [METHODS[method.mask_method] for method in methods]
    if any(method.all_segments for method in known):
        return []
    pairs = zip(methods, known, strict=True)
    return sorted({m.coverage_ratio for m, k in pairs if "coverage_ratio" in k.settings})


def _find_generator(wanted: str) -> _Generator:
    """Which one. Raises ValueError if it is not there."""
    if wanted in GENERATORS:
        return _Generator(wanted)
    folder = Path(wanted).expanduser().absolute()
    if (folder / "config.json").is_file():
        return _Generator(_ANY_MODEL, str(folder))
    if _HUB_NAME.fullmatch(wanted) and not folder.exists():
        return _Generator(_ANY_MODEL, wanted)
    what = "is a folder without a config.json" if folder.is_dir() else "is unknown"
    raise ValueError(
        f"--make-segments {wanted} {what}; choose one of {', '.join(GENERATORS)}, or give the "
        "folder of a model that transformers saved, or its name on the hub (owner/name)"
    )
