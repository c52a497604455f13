"""Checking a dataset before a long run: every image opens, and its segments fit it."""

import json
from pathlib import Path

from common.files import HEAD_BYTES, check_output_file, write_text
from common.formats import read_json_lines
from common.images import ImagePath, open_images, read_rgb
from common.parallel import Failure, each, one_pass
from segments.forms import AnyForm, open_any_form
from segments.segment import segment_from_counts
from segments.store import segment_key


def check(
    in1k_dir: Path, masks_dir: Path, offenders_path: Path, *, processes: int | None
) -> tuple[dict[str, str], int]:
    """Check every training image and its segments; offenders are written, one per line.

    Returns what is wrong with each image by its path in train/ (empty: nothing), and how many are
    left to check, if a signal asked to stop.
    Raises ValueError if folders are missing or the state is that of another check.
    """
    train = in1k_dir / "train"
    images, paths = open_images(train, offenders_path.parent)
    source = open_any_form(masks_dir)
    without = source.listed_empty()
    state_path = offenders_path.with_name(f"{offenders_path.name}.state")
    identity = {"train": str(train.resolve()), "masks": str(masks_dir.resolve())}
    check_output_file(offenders_path, is_own=_lists_offenders)
    check_output_file(state_path, is_own=lambda head: head.startswith(b'{"train": '))
    # What was checked stands there until all is done; images may have come or gone since.
    known = _read_state(state_path, identity)
    seen = {path: known[path] for path in paths if path in known}
    todo = [path for path in paths if path not in seen]
    checked = each(lambda path: _check_one(images / path, source, without, path), todo, processes=processes)
    checked = one_pass("check", checked, total=len(paths), done=len(seen))
    with state_path.open("a", buffering=1) as state:  # each line survives a kill
        if state.tell() == 0:
            state.write(json.dumps(identity) + "\n")
        for path, found in zip(todo, checked, strict=False):
            text = found.reason if isinstance(found, Failure) else found
            seen[path] = " ".join(text.split())
            state.write(json.dumps([path, seen[path]]) + "\n")
    if len(seen) == len(paths):
        lines = (f"{path}\t{seen[path]}\n" for path in paths if seen[path])
        write_text(offenders_path, "".join(lines))
        state_path.unlink()
    return seen, len(paths) - len(seen)


def _lists_offenders(head: bytes) -> bool:
    """Whether a file that begins so is a list of `check`, perhaps an empty one."""
    lines = head.splitlines()
    return all(b"\t" in line for line in (lines[:-1] if len(head) == HEAD_BYTES else lines))


def _check_one(image: ImagePath, source: AnyForm, without: set[str], path: str) -> str:
    """What the files of an image say that is not so. Raises ValueError for what cannot be used."""
    reports: list[str] = []
    height, width = read_rgb(image).shape[:2]  # all of it is decoded: it may be cut short
    key = segment_key(path)
    segments = source.segments(key, reports.append)
    if not segments and key not in without:
        raise ValueError("has no segments, and no list says so")
    for one in segments:
        if not one.fits(height, width):
            # EXIF's orientation was not applied when the segments were made.
            how = " (transposed)" if (one.width, one.height) == (height, width) else ""
            its = f"its segments are {one.width}x{one.height}{how}"
            raise ValueError(f"is {width}x{height} pixels, upright, but {its}")
        # A store's index goes by what it states.
        counted = segment_from_counts(one.height, one.width, one.counts).coverage_percent
        if counted != (stated := one.coverage_percent):
            raise ValueError(f"a segment is said to cover {stated} %, but covers {counted} %")
    return "; ".join(reports)


def _read_state(path: Path, identity: dict[str, str]) -> dict[str, str]:
    """What an interrupted check has found; a last line cut short is checked again."""
    if not path.exists():
        return {}
    found = list(read_json_lines(path, dict[str, str] | tuple[str, str]))
    if found and found[0] != identity:
        raise ValueError(f"{path} is of a check of {found[0]}; remove it, or name another --out")
    write_text(path, "".join(json.dumps(line) + "\n" for line in found))
    return dict(found[1:])
