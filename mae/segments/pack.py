"""From files to a packed store and back, and several stores into one."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_rle

from mae.interruption import Interruption
from mae.segments import open_folder
from mae.segments.forms import SegmentSource
from mae.segments.parallel import in_order
from mae.segments.progress import Progress
from mae.segments.segment import Segment, verify_all
from mae.segments.store import STORE_NAME, PackedImage, PackedStore, store_settings
from mae.segments.writing import StoreWriter, Summary, pack_image

logger = logging.getLogger(__name__)

SHARD_NAME = re.compile(r"-(?P<index>\d+)-of-(?P<count>\d+)$")  # of `generate`, without suffix
MOST_DAMAGED = 0.01  # a larger share is no accident


def pack(
    masks_dir: Path, out: Path | None, *, overwrite: bool, allow_damaged: bool, processes: int
) -> Summary:
    """Write a packed store of a folder of any form, or go on writing it.

    Images whose files are damaged are named, recorded and left out. Raises ValueError if `out` is
    there, RuntimeError if more than 1% are damaged and that is not allowed, or the disk is full.
    """
    source: SegmentSource = (
        PackedStore(masks_dir) if masks_dir.is_file() else open_folder(masks_dir)
    )
    out = out or masks_dir / STORE_NAME
    _refuse_to_overwrite(out, overwrite)
    keys = sorted(source.images() | source.listed_empty())
    settings = store_settings(source.meta) if isinstance(source, PackedStore) else {}
    with (
        StoreWriter(out, source=source.name, settings=settings) as writer,
        Interruption() as interruption,
    ):
        done = writer.keys()
        todo = [key for key in keys if key not in done]
        failed = 0
        with Progress("pack", total=len(keys), done=len(keys) - len(todo)) as progress:
            for result in in_order(PackOne(source), todo, processes=processes):
                if isinstance(result, Failure):
                    failed += 1
                    writer.add_failure(result.key, result.reason)
                    logger.warning("left out %s: %s", result.key, result.reason)
                else:
                    writer.add(result)
                progress.advance()
                if interruption.requested:
                    break
        writer.commit()
        summary = writer.summary(
            already_there=len(keys) - len(todo), interrupted=interruption.requested
        )
        if interruption.requested:
            logger.warning("stopped; run the same command again to go on")
            return summary
        if failed > MOST_DAMAGED * len(keys) and not allow_damaged:
            raise RuntimeError(
                f"{failed} of {len(keys)} images are damaged, more than 1%, so {out} was not "
                "finished. Mend them and run again, or add --allow-damaged to leave them out"
            )
        writer.finish()
    return summary


def unpack(store_path: Path, out: Path, *, processes: int) -> Summary:
    """Write every image's segments as RLE JSON again; what is there is kept."""
    store = PackedStore(store_path)
    keys = sorted(store.images() | store.listed_empty())
    todo = [key for key in keys if not (out / f"{key}.json").exists()]
    progress = Progress("unpack", total=len(keys), done=len(keys) - len(todo))
    with progress, Interruption() as interruption:
        for _ in in_order(_UnpackOne(store, out), todo, processes=processes):
            progress.advance()
            if interruption.requested:
                break
    return Summary(
        out=out,
        images=len(store.images()),
        without=len(store.listed_empty()),
        left_out=0,
        already_there=len(keys) - len(todo),
        interrupted=interruption.requested,
    )


def merge(shards: Sequence[Path], out: Path, *, overwrite: bool) -> Summary:
    """Join stores, say the shards of a generator, into one.

    Raises ValueError if they were made in different ways, disagree about an image, or are shards by
    their names (`-I-of-N`) of which one is missing.
    """
    _refuse_to_overwrite(out, overwrite)
    _refuse_missing_shards(shards)
    stores = [PackedStore(path) for path in shards]
    settings = _common_settings(stores)
    owner: dict[str, PackedStore] = {}
    failures: dict[str, str] = {}
    for store in stores:
        failures |= store.failures()
        for key in store.images() | store.listed_empty():
            if key in owner and owner[key].packed(key) != store.packed(key):
                raise ValueError(f"{owner[key].path} and {store.path} disagree about {key}")
            owner.setdefault(key, store)
    with (
        StoreWriter(out, source=stores[0].meta["source"], settings=settings) as writer,
        Interruption() as interruption,
    ):
        todo = sorted(owner.keys() - writer.keys())
        with Progress("merge", total=len(owner), done=len(owner) - len(todo)) as progress:
            for key in todo:
                writer.add(owner[key].packed(key))
                progress.advance()
                if interruption.requested:
                    break
        for key in sorted(failures.keys() - owner.keys()):
            writer.add_failure(key, failures[key])
        writer.commit()
        summary = writer.summary(
            already_there=len(owner) - len(todo), interrupted=interruption.requested
        )
        if interruption.requested:
            logger.warning("stopped; run the same command again to go on")
            return summary
        writer.finish()
    return summary


@dataclass(frozen=True)
class Failure:
    """An image that could not be done, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class PackOne:
    """Reads and compresses one image's segments, in a worker."""

    source: SegmentSource

    def __call__(self, key: str) -> PackedImage | Failure:
        """All segments verified; what is wrong is returned, not raised."""
        try:
            return pack_image(key, self.source.segments(key))
        except ValueError as error:
            return Failure(key, str(error))


@dataclass(frozen=True)
class _UnpackOne:
    """Writes one image's JSON file, in a worker."""

    store: PackedStore
    out: Path

    def __call__(self, key: str) -> None:
        write_json(self.out, key, verify_all(self.store.segments(key)))


def write_json(out: Path, key: str, segments: Sequence[Segment]) -> None:
    """Write `<out>/<key>.json` in the form of `amg.py --convert-to-rle`, complete or not at all."""
    path = out / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps([_annotation(segment) for segment in segments]))
    aside.replace(path)


def _annotation(segment: Segment) -> dict[str, Any]:
    rle = {"size": [segment.height, segment.width], "counts": segment.counts}
    return {
        "segmentation": {"size": rle["size"], "counts": segment.counts.decode("ascii")},
        "area": int(coco_rle.area(rle)),
        "bbox": [int(value) for value in coco_rle.toBbox(rle)],
    }


def _refuse_to_overwrite(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file, such as {out / STORE_NAME}")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a folder")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is finished; add --overwrite to replace it")


def _refuse_missing_shards(shards: Sequence[Path]) -> None:
    named = [match for path in shards if (match := SHARD_NAME.search(path.stem))]
    if len(named) < len(shards) or len({match["count"] for match in named}) > 1:
        return  # stores of other origin
    count, there = int(named[0]["count"]), {int(match["index"]) for match in named}
    missing = sorted(set(range(count)) - there)
    if missing:
        raise ValueError(
            f"of the {count} shards {', '.join(map(str, missing))} are missing (they count from "
            "0); finish them first, or rename the others to merge what there is"
        )


def _common_settings(stores: Sequence[PackedStore]) -> dict[str, Any]:
    first = stores[0]
    for store in stores[1:]:
        for name in ("source", "settings"):
            if store.meta.get(name) != first.meta.get(name):
                raise ValueError(
                    f"{first.path} and {store.path} were made in different ways: {name} "
                    f"{first.meta.get(name)} and {store.meta.get(name)}"
                )
    return store_settings(first.meta)
