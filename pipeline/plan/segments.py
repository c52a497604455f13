"""The steps that come before a pretraining which reads segments: to make them, or to pack them.

Pure as pipeline/plan.py, but for a look whether the model that was named is there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.step_files import shard_path
from pipeline.plan.layout import Layout
from pipeline.plan.parts import Facts
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Step

MAKING = ("pack", "generate", "merge")  # kinds of steps; the last of them leaves the store
_ANY_MODEL = "sam"  # the generator that takes a model's name or folder
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def with_segments(
    steps: Sequence[Step], settings: Settings, facts: Facts, done: Collection[str] = ()
) -> list[Step]:
    """The plan, begun by what leaves the segments that its pretrainings read.

    done: names of steps; nothing is made for those. Raises ValueError for a generator that there is
    not, whether it is needed or not.
    """
    data, paths = settings.data, Layout(settings.data.output_dir)
    generator = _generator(data.make_segments, facts) if data.make_segments else None
    reading = [step for step in steps if reads_segments(step)]
    first = {step.run: step.name for step in reversed(reading) if step.name not in done}
    if first and facts.packing is not None:
        source, store = facts.packing
        made = [_pack(source, store, paths)]
    elif first and facts.making is not None and generator is not None:
        store = facts.making
        made = _generate(generator, store, _wanted_ratios(reading, facts), settings, facts)
    else:
        return list(steps)
    planned = []
    for step in steps:
        if reads_segments(step) and store == paths.segments:
            # Its settings stay: they are the same segments in another place.
            step = replace(step, options={**step.options, "masks_dir": store})
        if first.get(step.run) == step.name:
            step = replace(step, needs=(*step.needs, made[-1].name))
        planned.append(step)
    return [*made, *planned]


def reads_segments(step: Step) -> bool:
    """Whether it is a pretraining that hides segments, or leaves images out that have none."""
    return step.kind == "pretrain" and not step.options.get("use_unmasked_images")


def before_segments(step: Step, waiting: Sequence[Step], settings: Settings) -> Step:
    """The step as it can be checked before those that wait have made the segments."""
    if not reads_segments(step) or all(other.kind not in MAKING for other in waiting):
        return step
    place = settings.data.masks_dir
    return replace(step, options={**step.options, "masks_dir": place, "will_make": True})


def _pack(source: Path, store: Path, paths: Layout) -> Step:
    return Step(
        name="pack_segments", kind="pack", run="segments", epochs=0,
        program=("mae", "masks", "pack", str(source)), options={"out": store},
        processes=1, needs=(), folder=paths.bookkeeping / "pack", outputs=(store,),
    )  # fmt: skip


def _generate(
    generator: tuple[str, str | None],
    store: Path,
    ratios: Sequence[float],
    settings: Settings,
    facts: Facts,
) -> list[Step]:
    """One step, or as many as there are shards and one that joins what they leave."""
    (name, model), data, compute = generator, settings.data, settings.compute
    assert data.in1k_dir is not None
    paths, count = Layout(data.output_dir), data.segment_shards
    decided: dict[str, Any] = {"generator": name, "model": model, "for_coverage": [*ratios]}
    known = facts.generators[name]
    own = {"model": model, "for_coverage": ratios, "device": "cuda" if compute.num_gpus else "cpu"}
    on_gpus = "device" in known and settings.cluster.launcher == "local"
    parts = paths.bookkeeping / "segments" / store.name if count > 1 else store
    shards = [
        Step(
            name="generate_segments" + (f"_{index}-of-{count}" if count > 1 else ""),
            kind="generate", run="segments", epochs=0, program=("mae", "masks", "generate", name),
            options={
                "images": data.in1k_dir / "train", "val_dir": facts.val_dir, "out": parts,
                "shard": f"{index}/{count}",
                **{option: value for option, value in own.items() if option in known},
            },
            processes=1, gpus=compute.pretrain_gpus or None if on_gpus else None, needs=(),
            folder=paths.bookkeeping / f"generate-{index}",
            outputs=(shard_path(parts, index, count),), settings=decided,
        )
        for index in range(count)
    ]  # fmt: skip
    if count == 1:
        return shards
    left = [str(path) for step in shards for path in step.outputs]
    merge = Step(
        name="merge_segments", kind="merge", run="segments", epochs=0,
        program=("mae", "masks", "merge", *left), options={"out": store, "overwrite": True},
        processes=1, needs=tuple(step.name for step in shards),
        folder=paths.bookkeeping / "merge", outputs=(store,), settings=decided,
    )  # fmt: skip
    return [*shards, merge]


def _wanted_ratios(reading: Sequence[Step], facts: Facts) -> list[float]:
    """The coverages to which every method needs the nearest segment; none: all segments."""
    if any(facts.methods[step.options["mask_method"]]["all_segments"] for step in reading):
        return []
    ratios = {step.options.get("coverage_ratio") for step in reading}
    return sorted(ratio for ratio in ratios if ratio is not None)


def _generator(wanted: str, facts: Facts) -> tuple[str, str | None]:
    """Which one, and the model where it takes any. Raises ValueError if it is not there."""
    if wanted in facts.generators:
        return wanted, None
    folder = Path(wanted).expanduser().absolute()
    if (folder / "config.json").is_file():
        return _ANY_MODEL, str(folder)
    if _HUB_NAME.fullmatch(wanted) and not folder.exists():
        return _ANY_MODEL, wanted
    known = ", ".join(facts.generators)
    what = "is a folder without a config.json" if folder.is_dir() else "is unknown"
    raise ValueError(
        f"--make-segments {wanted} {what}; choose one of {known}, or give the folder of a model "
        "that transformers saved, or its name on the hub (owner/name)"
    )
