"""Checking a dataset before a long run: every image opens, and its segments fit it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mae.interruption import Interruption
from mae.listing import find_images, segment_key
from mae.segments import open_segments
from mae.segments.forms import SegmentSource
from mae.segments.images import read_rgb
from mae.segments.parallel import in_order
from mae.segments.progress import Progress
from mae.segments.segment import Segment, segment_from_rle, verify_all

logger = logging.getLogger(__name__)

LINES_PER_FLUSH = 64


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """offenders: reasons by path relative to train/. checked: images looked at so far."""

    checked: int
    total: int
    offenders: dict[str, str]
    interrupted: bool


def check(in1k_dir: Path, masks_dir: Path, offenders_path: Path, *, processes: int) -> CheckResult:
    """Check every training image and its segments; offenders are written, one per line.

    What was checked stands in `<offenders_path>.state` until all is done, and is not checked again.
    Raises ValueError if folders are missing or the state is that of another check.
    """
    train = in1k_dir / "train"
    paths = find_images(train)
    source = open_segments(masks_dir)
    state_path = offenders_path.with_name(f"{offenders_path.name}.state")
    identity = {"train": str(train.resolve()), "masks": str(masks_dir.resolve())}
    seen = _read_state(state_path, identity)
    work = _CheckOne(train, source, frozenset(source.images()), frozenset(source.listed_empty()))
    val = in1k_dir / "val"
    _mention_strangers([*paths, *(find_images(val) if val.is_dir() else [])], work.with_segments)
    todo = [path for path in paths if path not in seen]
    with (
        state_path.open("a") as state,
        Interruption() as interruption,
        Progress("check", total=len(paths), done=len(seen)) as progress,
        closing(in_order(work, todo, processes=processes)) as results,
    ):
        if state.tell() == 0:
            state.write(json.dumps(identity) + "\n")
        for number, (path, reason) in enumerate(results):
            seen[path] = reason
            state.write(json.dumps([path, reason]) + "\n")
            if number % LINES_PER_FLUSH == 0:
                state.flush()
            progress.advance()
            if interruption.requested:
                break
    offenders = {path: seen[path] for path in sorted(seen) if seen[path]}
    if not interruption.requested:
        _write_offenders(offenders_path, offenders)
        state_path.unlink()
    return CheckResult(
        checked=len(seen),
        total=len(paths),
        offenders=offenders,
        interrupted=interruption.requested,
    )


@dataclass(frozen=True)
class _CheckOne:
    """Checks one image, in a worker."""

    train: Path
    source: SegmentSource
    with_segments: frozenset[str]
    without: frozenset[str]

    def __call__(self, path: str) -> tuple[str, str]:
        """The path, and what is wrong; empty: nothing."""
        with _Warnings() as warnings:
            try:
                self._check(path)
            except ValueError as error:
                return path, " ".join(str(error).split())
        return path, "; ".join(warnings.messages)

    def _check(self, path: str) -> None:
        height, width = read_rgb(self.train / path).shape[:2]
        key = segment_key(path)
        if key not in self.with_segments:
            if key not in self.without:
                raise ValueError("has no segments, and no list says so")
            return
        segments = self.source.segments(key)
        verify_all(segments)
        for segment in segments:
            _check_size(segment, height, width)
            _check_coverage(segment)


def _check_size(segment: Segment, height: int, width: int) -> None:
    if (segment.height, segment.width) == (height, width):
        return
    how = " (transposed)" if (segment.width, segment.height) == (height, width) else ""
    raise ValueError(
        f"is {width}x{height} pixels, upright, but its segments are "
        f"{segment.width}x{segment.height}{how}"
    )


def _check_coverage(segment: Segment) -> None:
    size = [segment.height, segment.width]
    counted = segment_from_rle({"size": size, "counts": segment.counts.decode()}).coverage_percent
    if counted != segment.coverage_percent:
        raise ValueError(
            f"a segment is said to cover {segment.coverage_percent} %, but covers {counted} %"
        )


class _Warnings(logging.Handler):
    """Collects what the forms warn about: stated coverages that are wrong."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        forms = logging.getLogger("mae.segments.forms")
        forms.addHandler(self)
        forms.propagate = False
        return self

    def __exit__(self, *error: object) -> None:
        forms = logging.getLogger("mae.segments.forms")
        forms.removeHandler(self)
        forms.propagate = True


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


def _mention_strangers(paths: Iterable[str], with_segments: frozenset[str]) -> None:
    strangers = sorted(with_segments - {segment_key(path) for path in paths})
    if strangers:
        some = ", ".join(strangers[:3])
        logger.warning(
            "%d images that have segments are neither in train/ nor in val/: %s",
            len(strangers),
            some,
        )


def _write_offenders(path: Path, offenders: dict[str, str]) -> None:
    aside = path.with_name(f"{path.name}.part")
    aside.write_text("".join(f"{name}\t{reason}\n" for name, reason in offenders.items()))
    aside.replace(path)
