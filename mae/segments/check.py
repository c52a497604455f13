"""Checking a dataset before a long run: every image opens, and its segments fit it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.files import write_text
from common.images import find_images, read_rgb
from common.interruption import Interruption
from common.progress import Counter
from mae.listing import segment_key
from mae.segments.forms import SegmentSource, open_any_form
from mae.segments.parallel import in_order
from mae.segments.segment import Segment, segment_from_counts
from mae.segments.store import PackedStore

logger = logging.getLogger(__name__)

LINES_PER_FLUSH = 64


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """offenders: reasons by path relative to train/. checked: images looked at so far."""

    checked: int
    total: int
    offenders: dict[str, str]
    interrupted: bool


def check(
    in1k_dir: Path, masks_dir: Path, offenders_path: Path, *, processes: int | None
) -> CheckResult:
    """Check every training image and its segments; offenders are written, one per line.

    What was checked stands in `<offenders_path>.state` until all is done, and is not checked again.
    Raises ValueError if folders are missing or the state is that of another check.
    """
    train, val = in1k_dir / "train", in1k_dir / "val"
    paths = find_images(train)
    source = open_any_form(masks_dir)
    state_path = offenders_path.with_name(f"{offenders_path.name}.state")
    identity = {"train": str(train.resolve()), "masks": str(masks_dir.resolve())}
    seen = _read_state(state_path, identity)
    _mention_strangers([*paths, *(find_images(val) if val.is_dir() else [])], source.images())
    check_one = partial(_check_one, train, source, source.listed_empty())
    todo = [path for path in paths if path not in seen]
    with (
        state_path.open("a") as state,
        Interruption() as stop,
        Counter("check", total=len(paths), done=len(seen)) as counter,
        closing(in_order(check_one, todo, processes=processes)) as results,
    ):
        if state.tell() == 0:
            state.write(json.dumps(identity) + "\n")
        for number, (path, reason) in enumerate(results):
            seen[path] = reason
            state.write(json.dumps([path, reason]) + "\n")
            if number % LINES_PER_FLUSH == 0:
                state.flush()
            counter.advance()
            if stop.requested:
                break
    offenders = {path: seen[path] for path in sorted(seen) if seen[path]}
    if not stop.requested:
        lines = (f"{path}\t{reason}\n" for path, reason in offenders.items())
        write_text(offenders_path, "".join(lines))
        state_path.unlink()
    return CheckResult(
        checked=len(seen), total=len(paths), offenders=offenders, interrupted=stop.requested
    )


def _check_one(train: Path, source: SegmentSource, without: set[str], path: str) -> tuple[str, str]:
    """The path of an image, and what is wrong with it or its segments; empty: nothing."""
    reports: list[str] = []
    try:
        height, width = read_rgb(train / path).shape[:2]
        key = segment_key(path)
        if isinstance(source, PackedStore):
            segments = source.segments(key)
        else:
            segments = source.segments(key, reports.append)
        if not segments and key not in without:
            raise ValueError("has no segments, and no list says so")
        for segment in segments:
            _check_size(segment, height, width)
            _check_coverage(segment)
    except ValueError as error:
        reports = [str(error)]
    return path, " ".join("; ".join(reports).split())


def _check_size(segment: Segment, height: int, width: int) -> None:
    if (segment.height, segment.width) == (height, width):
        return
    how = " (transposed)" if (segment.width, segment.height) == (height, width) else ""
    raise ValueError(
        f"is {width}x{height} pixels, upright, but its segments are "
        f"{segment.width}x{segment.height}{how}"
    )


def _check_coverage(segment: Segment) -> None:
    counted = segment_from_counts(segment.height, segment.width, segment.counts).coverage_percent
    if counted != segment.coverage_percent:
        raise ValueError(
            f"a segment is said to cover {segment.coverage_percent} %, but covers {counted} %"
        )


def _read_state(path: Path, identity: dict[str, str]) -> dict[str, str]:
    """What an interrupted check has found; a last line cut short is checked again."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n")]
    if complete and json.loads(complete[0]) != identity:
        raise ValueError(
            f"{path} is of a check of {json.loads(complete[0])}; remove it, or name another --out"
        )
    if len(complete) < len(lines):
        path.write_text("".join(complete))
    return dict(map(json.loads, complete[1:]))


def _mention_strangers(paths: Iterable[str], with_segments: set[str]) -> None:
    strangers = sorted(with_segments - {segment_key(path) for path in paths})
    if strangers:
        logger.warning(
            "%d images that have segments are neither in train/ nor in val/: %s",
            len(strangers),
            ", ".join(strangers[:3]),
        )
