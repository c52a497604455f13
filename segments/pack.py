"""From files to a packed store and back, and several stores into one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_rle

from common.files import (
    NOTHING_WRITTEN,
    check_output_file,
    check_output_folder,
    open_regular,
    path_below,
    write_text,
)
from common.interruption import Interruption
from common.progress import Counter
from segments.config import check_made_alike
from segments.forms import SegmentSource, open_folder
from segments.parallel import in_order
from segments.segment import Segment, segment_from_counts
from segments.store import STORE_NAME, PackedImage, PackedStore
from segments.writing import MOST_FAILED, Failure, StoreWriter, Summary, pack_image

SQLITE_START = b"SQLite format 3\0"
SHARD_NAME = re.compile(r"-(?P<index>\d+)-of-(?P<count>\d+)$")  # of `generate`, without suffix


def pack(
    masks_dir: Path,
    out: Path | None,
    *,
    overwrite: bool,
    allow_damaged: bool,
    processes: int | None,
) -> Summary:
    """Write a packed store of a folder of any form, or go on writing it.

    Images whose files are damaged are named, recorded and left out. Raises ValueError if `out` is
    there, RuntimeError if more than 1% are damaged and that is not allowed, or the disk is full.
    """
    source = open_folder(masks_dir)
    out = out or masks_dir / STORE_NAME
    _refuse_to_overwrite(out, overwrite, reads=())
    keys = sorted(source.images() | source.listed_empty())
    with StoreWriter(out, source=source.name, settings={}) as writer:
        done = writer.keys()
        todo = [key for key in keys if key not in done]
        with closing(in_order(partial(_pack_one, source), todo, processes=processes)) as images:
            summary = writer.add_all(
                images, what="pack", total=len(keys), already_there=len(keys) - len(todo)
            )
        if summary.interrupted:
            return summary
        if summary.left_out > MOST_FAILED * len(keys) and not allow_damaged:
            raise RuntimeError(
                f"{summary.left_out} of {len(keys)} images are damaged, more than 1%, so {out} was "
                "not finished. Mend them and run again, or leave them out by "
                f"`python -m mae masks pack {masks_dir} --allow-damaged`"
            )
        writer.finish()
    return summary


def unpack(store_path: Path, out: Path, *, processes: int | None) -> Summary:
    """Write every image's segments as RLE JSON again; what is there is kept."""
    check_output_folder(out, "OUT")
    store = PackedStore(store_path)
    files = {
        key: path_below(out, f"{key}.json", str(store_path))
        for key in sorted(store.images() | store.listed_empty())
    }
    todo = [key for key, path in files.items() if not path.exists()]
    already_there = len(files) - len(todo)
    with (
        Interruption() as stop,
        Counter("unpack", total=len(files), done=already_there) as counter,
        closing(in_order(partial(_unpack_one, store, files), todo, processes=processes)) as written,
    ):
        for _ in written:
            counter.advance()
            if stop.requested:
                break
    return Summary(
        out=out,
        images=len(store.images()),
        without=len(store.listed_empty()),
        left_out=0,
        already_there=already_there,
        interrupted=stop.requested,
    )


def merge(shards: Sequence[Path], out: Path, *, overwrite: bool) -> Summary:
    """Join stores, say the shards of a generator, into one.

    Raises ValueError if their generators' settings differ, if they disagree about an image, or are
    shards by their names (`-I-of-N`) of which one is missing.
    """
    _refuse_to_overwrite(out, overwrite, reads=shards)
    _refuse_missing_shards(shards)
    stores = [PackedStore(path) for path in shards]
    first = stores[0]
    owner: dict[str, PackedStore] = {}
    failures: dict[str, str] = {}
    for store in stores:
        check_made_alike(store.path, store.settings, first.settings)
        failures |= store.failures()
        for key in store.images() | store.listed_empty():
            if key in owner and owner[key].packed(key) != store.packed(key):
                raise ValueError(f"{owner[key].path} and {store.path} disagree about {key}")
            owner.setdefault(key, store)
    with StoreWriter(out, source=first.meta["source"], settings=first.settings) as writer:
        todo = sorted(owner.keys() - writer.keys())
        left_out = [Failure(key, failures[key]) for key in sorted(failures.keys() - owner.keys())]
        summary = writer.add_all(
            chain(left_out, (owner[key].packed(key) for key in todo)),
            what="merge",
            total=len(owner) + len(left_out),
            already_there=len(owner) - len(todo),
        )
        if not summary.interrupted:
            writer.finish()
    return summary


def _pack_one(source: SegmentSource, key: str) -> PackedImage | Failure:
    """Read and compress one image's segments; what is wrong with them is returned, not raised."""
    try:
        return pack_image(key, source.segments(key))
    except ValueError as error:
        return Failure(key, str(error))


def _unpack_one(store: PackedStore, files: Mapping[str, Path], key: str) -> None:
    """Write one image in the form of `amg.py --convert-to-rle`."""
    try:
        annotations = [_annotation(segment) for segment in store.segments(key)]
    except ValueError as error:
        inside = str(store.path) in str(error)
        raise ValueError(f"{'' if inside else f'{store.path}: {key}: '}{error}") from None
    write_text(files[key], json.dumps(annotations))


def _annotation(segment: Segment) -> dict[str, Any]:
    # pycocotools checks nothing
    segment = segment_from_counts(segment.height, segment.width, segment.counts)
    rle = {"size": [segment.height, segment.width], "counts": segment.counts}
    return {
        "segmentation": {**rle, "counts": segment.counts.decode("ascii")},
        "area": int(coco_rle.area(rle)),
        "bbox": [int(value) for value in coco_rle.toBbox(rle)],
    }


def _refuse_to_overwrite(out: Path, overwrite: bool, reads: Sequence[Path]) -> None:
    """Raise ValueError if `out` is there, and is no store or is to be kept."""
    check_output_file(out, reads=reads)
    if out.exists():
        with open_regular(out) as file:
            if file.read(len(SQLITE_START)) != SQLITE_START:
                raise ValueError(f"--out {out} is no packed store; name another; {NOTHING_WRITTEN}")
        if not overwrite:
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
