"""Which images a run trains on. No torch here: the planner lists, too."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.images import evenly_spread, find_images
from mae.config import DataConfig, MethodConfig
from mae.masking import METHODS
from segments.config import VAL, command_of, made_for
from segments.forms import AnyForm, form_of, open_any_form, open_segments
from segments.store import PackedStore, segment_key

logger = logging.getLogger(__name__)

MOST_MISSING = 0.5  # a larger share of images without segments means the wrong folder


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a run.

    train: paths relative to train/, posix, sorted, as an array of bytes: a million Python strings
    would be copied into every loader worker bit by bit, as their reference counts change.
    val: the same for val_folder; for a method that uses segments, those that have some of their
    own, which have the `segment_key` of these paths. left_out, val_left_out: images without.
    source: the segments, if the method uses them.
    """

    train: np.ndarray
    val: np.ndarray
    val_folder: Path
    left_out: int
    val_left_out: int
    source: PackedStore | None

    @property
    def digest(self) -> str:
        """Changes when the list of training images does."""
        return hashlib.sha256(b"\n".join(self.train.tolist())).hexdigest()[:16]


# What was listed before in the same call: the images of folders, and whole listings.
Listings = dict[Any, Any]


def make_listing(
    data: DataConfig, options: MethodConfig, *, packed: bool = True, known: Listings | None = None
) -> Listing:
    """Find the images of a run, and their segments.

    packed: False where segments of any form, or none, will do: they are packed or made before the
    run. known: what was listed before; a plan looks at one dataset for many runs.
    Raises ValueError if folders are missing or empty, too many images have no segment, the segments
    were made for other coverage ratios, or there is no second image to borrow segments from.
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


def _list(data: DataConfig, uses_segments: bool, packed: bool, known: Listings) -> Listing:
    """The images, their segments, which of them train, and which are held out."""
    if not data.in1k_dir.is_dir():
        raise ValueError(f"--in1k-dir {data.in1k_dir} is not a folder")
    train = _images_in(data.in1k_dir / "train", known)
    val_folder = data.in1k_dir / VAL
    has_val = val_folder.is_dir() and data.val_images > 0
    val = _images_in(val_folder, known) if has_val else []

    source = _open_source(data, uses_segments, packed)
    with_segment = source.images() if source else set()

    # Every method trains on the same images, those that have a segment: else a difference between
    # methods could be one between images.
    kept = _with_segment(train, with_segment, source, data) if source else train

    # Where segments are hidden, a held-out image needs one of its own.
    kept_val = val
    if source and uses_segments:
        kept_val, val_folder = _with_their_own(val, val_folder, with_segment, train)

    return Listing(
        train=encode_paths(kept),
        val=encode_paths(evenly_spread(kept_val, data.val_images)),
        val_folder=val_folder,
        left_out=len(train) - len(kept),
        val_left_out=len(val) - len(kept_val),
        source=source if uses_segments else None,
    )


def _images_in(folder: Path, known: Listings) -> list[str]:
    # Walked once: a million images on a network's disk take minutes.
    if folder not in known:
        known[folder] = find_images(folder)
    found: list[str] = known[folder]
    return found


def _open_source(data: DataConfig, uses_segments: bool, packed: bool) -> Any:
    """The segments; None if there are none, and the method can do without or they will be made."""
    path = data.segments_path
    if data.use_unmasked_images:  # it neither hides segments nor leaves images out
        return None
    if not packed and form_of(path) == "none":
        return None
    if not path.exists():
        if data.masks_dir is None and not uses_segments:
            return None
        raise ValueError(
            f"{path} does not exist; name the place of the segments by --masks-dir, or make them: "
            "`python -m segments generate`, or benchmark.py's --make-segments"
        )
    return open_segments(path) if packed else open_any_form(path)


def _with_segment(
    train: list[str], with_segment: set[str], source: AnyForm, data: DataConfig
) -> list[str]:
    """The images that have one. Refuses segments that fit less than half of the images."""
    kept = [path for path in train if segment_key(path) in with_segment]
    # Those that a list or the store names as empty were not forgotten.
    accounted = with_segment | source.listed_empty()
    missing = [path for path in train if segment_key(path) not in accounted]
    if not missing:
        if not kept:
            raise ValueError(f"{data.segments_path} lists every image as having no segment")
        return kept
    some = ", ".join(missing[:3])
    text = f"{len(missing)} of {len(train)} images have no segment in {data.segments_path}: {some}"
    if not kept or (len(missing) > MOST_MISSING * len(train) and not data.allow_missing_segments):
        advice = "" if not kept else "; add --allow-missing-segments if that is meant"
        raise ValueError(f"{text}. Is that the right --masks-dir?{advice}")
    logger.info("%s ...; they are left out", text)
    return kept


def _check_made_for(store: PackedStore, data: DataConfig, options: MethodConfig) -> None:
    """Refuse a store without the segments that the run needs, and say how to make them."""
    there, wanted = made_for(store.settings), options.coverage_ratio
    if not there:
        return
    all_segments = METHODS[options.mask_method].all_segments
    if not all_segments and wanted in there:
        return
    out = store.path.with_stem(f"{store.path.stem}-all") if all_segments else store.path
    settings = {**store.settings, "for_coverage": [] if all_segments else [wanted]}
    has_val = any(key.startswith(f"{VAL}/") for key in store.images())
    val_dir = data.in1k_dir / VAL if has_val else None
    needs = (
        f"{options.mask_method} needs all" if all_segments else f"--coverage-ratio is {wanted:g}"
    )
    raise ValueError(
        f"{store.path} has only the segments nearest to {', '.join(f'{r:g}' for r in there)} % "
        f"coverage, and {needs}. This makes them: "
        f"{command_of(settings, data.in1k_dir / 'train', out, val_dir)}"
    )


def _with_their_own(
    val: list[str], folder: Path, with_segment: set[str], train: list[str]
) -> tuple[list[str], Path]:
    """The held-out images that have segments, and the folder to which their paths are relative.

    Keys of segments that people have of them lack the val/ that `generate` gives them. What is
    called as a training image is that one's, and would hide a stranger's shapes.
    """
    theirs = with_segment.difference(map(segment_key, train)) if val else set()
    within = [f"{VAL}/{path}" for path in val]
    found = [path for path in within if segment_key(path) in theirs]
    if found:
        return found, folder.parent
    found = [path for path in val if segment_key(path) in theirs]
    if val and not found:
        logger.info("none of the %d images in %s has a segment: no held-out loss", len(val), folder)
    return found, folder


def check_donors(paths: Iterable[str]) -> None:
    """Raise ValueError unless each of these images can borrow the segments of another one."""
    keys = map(segment_key, paths)
    first = next(keys)
    if all(key == first for key in keys):
        raise ValueError(
            "--segments-from borrowed takes the segments of other images, but there is only one "
            f"with segments: {first}; give more images, or --segments-from own"
        )


def encode_paths(paths: list[str]) -> np.ndarray:
    """Paths as `Listing` keeps them."""
    return np.array([path.encode() for path in paths], dtype=np.bytes_)
