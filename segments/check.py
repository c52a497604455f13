"""Checking a dataset before a long run: every image opens, and its segments fit it."""

from __future__ import annotations

import json
from contextlib import closing
from functools import partial
from pathlib import Path

from common.files import HEAD_BYTES, check_output_file, write_text
from common.images import find_images, read_rgb
from common.interruption import Interruption
from common.parsed import read_json_lines
from common.progress import Counter
from segments.forms import SegmentSource, open_any_form
from segments.parallel import in_order
from segments.segment import Segment, segment_from_counts
from segments.store import segment_key


def check(
    in1k_dir: Path, masks_dir: Path, offenders_path: Path, *, processes: int | None
) -> tuple[dict[str, str], int]:
    """Check every training image and its segments; offenders are written, one per line.

    Returns what is wrong with each image by its path in train/ (empty: nothing), and how many are
    left to check, if a signal asked to stop.

    What was checked stands in `<offenders_path>.state` until all is done, and is not checked again.
    Raises ValueError if folders are missing or the state is that of another check.
    """
    train = in1k_dir / "train"
    paths = find_images(train)
    source = open_any_form(masks_dir)
    state_path = offenders_path.with_name(f"{offenders_path.name}.state")
    check_output_file(offenders_path, is_own=_lists_offenders)
    check_output_file(state_path, is_own=lambda head: head.startswith(b'{"train": '))
    identity = {"train": str(train.resolve()), "masks": str(masks_dir.resolve())}
    known = _read_state(state_path, identity)
    seen = {path: known[path] for path in paths if path in known}
    check_one = partial(_check_one, train, source, source.listed_empty())
    todo = [path for path in paths if path not in seen]
    with (
        state_path.open("a", buffering=1) as state,  # each line survives a kill
        Interruption() as stop,
        Counter("check", total=len(paths), done=len(seen)) as counter,
        closing(in_order(check_one, todo, processes=processes)) as results,
    ):
        if state.tell() == 0:
            state.write(json.dumps(identity) + "\n")
        for path, reason in results:
            seen[path] = reason
            state.write(json.dumps([path, reason]) + "\n")
            counter.advance()
            if stop.requested:
                break
    if len(seen) == len(paths):
        lines = (f"{path}\t{seen[path]}\n" for path in paths if seen[path])
        write_text(offenders_path, "".join(lines))
        state_path.unlink()
    return seen, len(paths) - len(seen)


def _lists_offenders(head: bytes) -> bool:
    """Whether a file that begins so is a list of `check`, perhaps an empty one."""
    lines = head.splitlines()
    return all(b"\t" in line for line in (lines[:-1] if len(head) == HEAD_BYTES else lines))


def _check_one(train: Path, source: SegmentSource, without: set[str], path: str) -> tuple[str, str]:
    """The path of an image, and what is wrong with it or its segments; empty: nothing."""
    reports: list[str] = []
    try:
        height, width = read_rgb(train / path).shape[:2]
        key = segment_key(path)
        segments = source.segments(key, reports.append)
        if not segments and key not in without:
            raise ValueError("has no segments, and no list says so")
        for segment in segments:
            _check_segment(segment, height, width)
    except ValueError as error:
        reports = [str(error)]
    return path, " ".join("; ".join(reports).split())


def _check_segment(segment: Segment, height: int, width: int) -> None:
    if (segment.height, segment.width) != (height, width):
        how = " (transposed)" if (segment.width, segment.height) == (height, width) else ""
        raise ValueError(
            f"is {width}x{height} pixels, upright, but its segments are "
            f"{segment.width}x{segment.height}{how}"
        )
    counted = segment_from_counts(height, width, segment.counts).coverage_percent
    if counted != segment.coverage_percent:
        raise ValueError(
            f"a segment is said to cover {segment.coverage_percent} %, but covers {counted} %"
        )


def _read_state(path: Path, identity: dict[str, str]) -> dict[str, str]:
    """What an interrupted check has found; a last line cut short is checked again."""
    if not path.exists():
        return {}
    found = list(read_json_lines(path, dict[str, str] | tuple[str, str]))
    if found and found[0] != identity:
        raise ValueError(f"{path} is of a check of {found[0]}; remove it, or name another --out")
    write_text(path, "".join(json.dumps(line) + "\n" for line in found))
    return dict(found[1:])
