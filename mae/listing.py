"""Which images a run trains on. No torch here: the planner lists, too."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from common.images import ImagePath, evenly_spread, open_images
from mae.config import DataConfig, MethodConfig
from mae.masking import METHODS
from segments.config import GENERATORS, VAL, command_of, made_for
from segments.forms import form_of, open_any_form, open_segments
from segments.store import PackedStore, by_key, segment_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a run: posix paths, sorted, as arrays of bytes.

    A million Python strings would be copied into every loader worker bit by bit, as their reference
    counts change.
    """

    train: np.ndarray  # relative to train_folder
    val: np.ndarray  # to val_folder; where segments are hidden, those that have one under this key
    train_folder: ImagePath
    val_folder: ImagePath
    left_out: int  # images that have no segment
    val_left_out: int
    source: PackedStore | None  # the segments, if the method uses them

    @cached_property
    def digest(self) -> str:
        """Changes when the list of training images does."""
        return hashlib.sha256(b"\n".join(self.train.tolist())).hexdigest()[:16]


def make_listing(
    data: DataConfig, options: MethodConfig, *, packed: bool = True, known: dict[Any, Any] | None = None
) -> Listing:
    """Find the images of a run, and their segments. Raises ValueError for what it cannot train on.

    packed: False where segments of any form, or none, will do: they are packed or made before the
    run. known: what was listed before; a plan looks at one dataset for many runs.
    """
    known = {} if known is None else known
    # Ratios and controls choose among segments, not among images.
    key = (data, METHODS[options.mask_method].uses_segments, packed)
    if key not in known:
        known[key] = _list(*key, known)
    listing: Listing = known[key]
    if isinstance(listing.source, PackedStore):
        _check_made_for(listing.source, data, options)
    if listing.source is not None and options.segments_from == "borrowed":
        check_donors(path.decode() for path in listing.train)
    return listing


def _list(data: DataConfig, uses_segments: bool, packed: bool, known: dict[Any, Any]) -> Listing:
    val_dir = data.in1k_dir / VAL
    has_val = val_dir.is_dir() and data.val_images > 0
    for folder in (data.in1k_dir / "train", *([val_dir] if has_val else [])):
        # Walked once for all methods: a million images on a network's disk take minutes.
        known[folder] = known.get(folder) or open_images(folder, data.index_dir)
    train_folder, train = known[data.in1k_dir / "train"]
    val_folder, val = known[val_dir] if has_val else (val_dir, [])
    kept_val = val
    kept, source = train, _open_source(data, uses_segments, packed)
    if source:
        # Every method trains on the same images, those that have a segment: else a difference
        # between methods could be one between images.
        by_key((path, path) for path in train)
        with_segment = source.images()
        kept = [path for path in train if segment_key(path) in with_segment]
        # Those that a list or the store names as empty were not forgotten.
        _check_missing(train, kept, with_segment | source.listed_empty(), data)
        # Where segments are hidden, a held-out image needs one of its own: what is called as a
        # training image is that one's, and would hide a stranger's shapes.
        if uses_segments:
            by_key((path, path) for path in val)
            theirs = with_segment.difference(map(segment_key, train))
            kept_val, val_folder = _with_their_own(val, val_folder, theirs)
    held_out = encode_paths(evenly_spread(kept_val, data.val_images))
    return Listing(
        train=encode_paths(kept), val=held_out, train_folder=train_folder, val_folder=val_folder,
        left_out=len(train) - len(kept), val_left_out=len(val) - len(kept_val),
        source=source if uses_segments else None,
    )  # fmt: skip


def _open_source(data: DataConfig, uses_segments: bool, packed: bool) -> Any:
    """The segments; None if there are none, and the method can do without or they will be made."""
    path = data.segments_path
    # Whoever uses unmasked images neither hides segments nor leaves images out.
    if data.use_unmasked_images or (not packed and form_of(path) == "none"):
        return None
    if data.masks_dir is None and not uses_segments and not path.exists():
        return None
    return open_segments(path) if packed else open_any_form(path)


def _check_missing(train: list[str], kept: list[str], known: set[str], data: DataConfig) -> None:
    missing = [path for path in train if segment_key(path) not in known]
    if not kept and not missing:
        raise ValueError(f"{data.segments_path} lists every image as having no segment")
    text = f"{len(missing)} of {len(train)} images have no segment in {data.segments_path}: "
    text += ", ".join(missing[:3])
    # More than half of them means the wrong folder.
    if not kept or (2 * len(missing) > len(train) and not data.allow_missing_segments):
        advice = "; add --allow-missing-segments if that is meant" if kept else ""
        raise ValueError(f"{text}. Is that the right --masks-dir?{advice}")
    if missing:
        logger.info("%s ...; they are left out", text)


def _check_made_for(store: PackedStore, data: DataConfig, options: MethodConfig) -> None:
    """Refuse a store without the segments that the run needs, and say how to make them."""
    there, wanted = made_for(store.settings), options.coverage_ratio
    needs_all = METHODS[options.mask_method].all_segments
    if not there or (wanted in there and not needs_all):
        return
    out = store.path.with_stem(f"{store.path.stem}-all") if needs_all else store.path
    settings = {**store.settings, "for_coverage": [] if needs_all else [wanted]}
    has_val = any(key.startswith(f"{VAL}/") for key in store.images())
    train, val = data.in1k_dir / "train", data.in1k_dir / VAL if has_val else None
    needs = f"{options.mask_method} needs all" if needs_all else f"--coverage-ratio is {wanted:g}"
    has = f"{store.path} has only segments for {', '.join(f'{r:g}' for r in there)} %, and {needs}"
    if settings.get("generator") not in GENERATORS:
        raise ValueError(f"{has}; it does not say what made them")
    raise ValueError(f"{has}. This makes them: {command_of(settings, train, out, val)}")


def _with_their_own(val: list[str], folder: ImagePath, theirs: set[str]) -> tuple[list[str], ImagePath]:
    """The held-out images that have segments, and the folder to which their paths are relative."""
    # Keys of segments that people have of them lack the val/ that `generate` gives them.
    for prefix, relative_to in ((f"{VAL}/", folder.parent), ("", folder)):
        within = [f"{prefix}{path}" for path in val]
        if found := [path for path in within if segment_key(path) in theirs]:
            return found, relative_to
    if val:
        logger.info("none of the %d images in %s has a segment: no held-out loss", len(val), VAL)
    return [], folder


def check_donors(paths: Iterable[str]) -> None:
    """Raise ValueError unless each of these images can borrow the segments of another one."""
    keys = map(segment_key, paths)
    first = next(keys)
    if all(key == first for key in keys):
        what = "takes the segments of other images, but only one has any"
        raise ValueError(f"--segments-from borrowed {what}: {first}; use --segments-from own")


def encode_paths(paths: list[str]) -> np.ndarray:
    """Paths as `Listing` keeps them."""
    return np.array([path.encode() for path in paths], dtype=np.bytes_)
