"""The steps that come before a pretraining which reads segments: to make them, or to pack them.

Which of the two, if any, is seen by looking where the segments should be.
"""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.options import fields_of
from common.step_files import shard_path
from mae.check import segments_at
from mae.config import PretrainConfig
from mae.masking import METHODS
from pipeline.plan.layout import Layout
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step, step_of_words
from segments.config import GENERATORS, STORE_NAME, default_masks

MAKING = ("pack", "generate", "merge")  # kinds of steps; the last of them leaves the store


def with_segments(steps: Sequence[Step], settings: Settings, done: Collection[str] = ()) -> list[Step]:
    """The plan, begun by what leaves the segments that its pretrainings read.

    done: names of steps for which nothing is made. Raises ValueError for an unknown generator, also
    where none is needed.
    """
    data, paths = settings.data, Layout(settings.data.output_dir)
    generator = _find_generator(data.make_segments) if data.make_segments else None
    reading = [step for step in steps if reads_segments(step)]
    # Of a run only the first step that is left waits; those after it wait for that one.
    first = {step.run: step.name for step in reversed(reading) if step.name not in done}
    if not first or data.in1k_dir is None:
        return list(steps)
    source = data.masks_dir or default_masks(data.in1k_dir)
    # Where training finds them, unless it, or what it would be made in, cannot be written to.
    there = next(path for path in (source, *source.parents) if path.exists())
    store = source / STORE_NAME if os.access(there, os.W_OK) else paths.segments
    form = segments_at(source)
    if form == "loose":  # as Segment Anything's tools leave them
        words, what = (str(source), "--out", str(store)), "pack the segments into one file"
        folder = paths.bookkeeping / "pack"
        made = [step_of_words("segments", "pack", "segments", words, what, folder, store)]
    elif form == "none" and generator is not None:
        made = _generate(*generator, store, _wanted_ratios(reading), settings)
    else:
        return list(steps)
    planned, last = made, made[-1].name
    for step in steps:
        if store == paths.segments and reads_segments(step):
            # Its settings stay: they are the same segments in another place.
            step = step.with_options(data={"masks_dir": store})
        if first.get(step.run) == step.name:
            step = replace(step, needs=(*step.needs, last))
        planned.append(step)
    return planned


def reads_segments(step: Step) -> bool:
    """Whether it is a pretraining that hides segments, or leaves images out that have none."""
    config = step.config
    return isinstance(config, PretrainConfig) and not config.data.use_unmasked_images


def _generate(
    name: str, model: str | None, store: Path, ratios: Sequence[float], settings: Settings
) -> list[Step]:
    """One step, or as many as there are shards and one that joins what they leave."""
    data, here = settings.data, Layout(settings.data.output_dir).bookkeeping
    assert data.in1k_dir is not None
    val, count = data.in1k_dir / "val", data.segment_shards
    words = [name, "--images", str(data.in1k_dir / "train")]
    words += ["--val-dir", str(val)] if val.is_dir() else []
    words += ["--model", model] if model else []
    words += ["--for-coverage", ",".join(map(str, ratios))] if ratios else []
    # What another call has to ask for in the same way, to be done with what is made.
    decisive = {"generator": name, "model": model, "for_coverage": [*ratios]}
    more: dict[str, Any] = {"settings": decisive}
    if "device" in fields_of(GENERATORS[name]):  # Felzenszwalb runs on cores
        more["device"] = "cuda" if settings.compute.num_gpus else "cpu"
        words += ["--device", more["device"]]
        if settings.cluster.launcher == "local":
            more["gpus"] = settings.compute.pretrain_gpus or None
    parts = here / "segments" / store.name if count > 1 else store
    what, shards = f"make segments by {model or name}", list[Step]()
    for index in range(count):
        which = f"segments_{index}-of-{count}" if count > 1 else "segments"
        own = [*words, "--out", str(parts), "--shard", f"{index}/{count}"]
        out, folder = shard_path(parts, index, count), here / f"generate-{index}"
        shards += [step_of_words("segments", "generate", which, own, what, folder, out, **more)]
    if count == 1:
        return shards
    words = [*(str(step.outputs[0]) for step in shards), "--out", str(store), "--overwrite"]
    what, more = f"join the {count} parts of the segments", {"settings": decisive}
    more["needs"], folder = tuple(step.name for step in shards), here / "merge"
    shards += [step_of_words("segments", "merge", "segments", words, what, folder, store, **more)]
    return shards


def _wanted_ratios(reading: Sequence[Step]) -> list[float]:
    """The coverages to which every method needs the nearest segment; none: all segments."""
    told = [s.config.method for s in reading if isinstance(s.config, PretrainConfig)]
    if any(METHODS[m.mask_method].all_segments for m in told):
        return []  # the store that serves all serves the others, too
    takes_ratio = [m for m in told if "coverage_ratio" in METHODS[m.mask_method].settings]
    return sorted({m.coverage_ratio for m in takes_ratio})


def _find_generator(wanted: str) -> tuple[str, str | None]:
    """Which one, and the model where it takes any. Raises ValueError if it is not there."""
    if wanted in GENERATORS:
        return wanted, None
    folder = Path(wanted).expanduser().absolute()
    if (folder / "config.json").is_file():
        return "sam", str(folder)  # the one that takes a model's name or folder
    # owner/name; a path that is not there looks alike, and is taken for one.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", wanted) and not folder.exists():
        return "sam", wanted
    raise ValueError(
        f"--make-segments {wanted}: choose one of {', '.join(GENERATORS)}, or give the folder of a "
        "model that transformers saved (with a config.json), or its name on the hub (owner/name)"
    )
