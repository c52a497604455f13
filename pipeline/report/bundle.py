"""A run as one file of some MB: what a report is made of, for whoever compares with it elsewhere.

    write_bundle(Layout(Path("output")), Path("output.bundle"))
    with opened([Path("output.bundle"), Path("mine")]) as layouts: ...

A zip archive. Areas by image are part of it, so that runs of two labs are compared image by image;
weights and pictures are not, but the weights' digests are.
"""

import hashlib
import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from typing_extensions import TypedDict

from common.files import open_regular, path_below, read_bytes, replacing
from common.formats import parsed_text
from common.progress import Counter
from common.step_files import AREAS, LOG, PROBE_AREAS, RESULT
from pipeline.plan.layout import Layout

_FIRST = "segmae-bundle.json"  # by which it is recognised: the name stands in the file's first bytes
_MOST_BYTES = 2**32  # of what one unpacks to; ADE20K's areas are some MB
_KEPT = (
    "run.yml", "preregistration.yml", ".segmae/plan.json", ".segmae/steps/*.json", f"pretrain_output/*/{LOG}",
    *(f"eval_output/*/{name}" for name in (LOG, AREAS, RESULT)),
    *(f"probe_output/*/{name}" for name in (*PROBE_AREAS.values(), RESULT)),
)  # fmt: skip


class Manifest(TypedDict):
    """What the first file holds: SHA-256 by path, of the files that follow and of weights left out."""

    format_version: int
    files: dict[str, str]
    weights: dict[str, str]


def is_bundle(head: bytes) -> bool:
    """Whether a file that begins so is a bundle."""
    return head.startswith(b"PK") and _FIRST.encode() in head[:100]


def write_bundle(paths: Layout, out: Path) -> None:
    """Raises ValueError where no run has been."""
    files = sorted({path for pattern in _KEPT for path in paths.root.glob(pattern)})
    if not paths.run_yml.exists():
        raise ValueError(f"{paths.root} is not the output directory of a run")
    weights = sorted(paths.pretrain_output.glob("*/checkpoint-*.pth"))
    content = {str(path.relative_to(paths.root)): read_bytes(path) for path in files}
    digests = {}
    with Counter("digests of weights", total=len(weights), unit="files") as counter:
        for path in weights:
            with open_regular(path) as file:
                digests[str(path.relative_to(paths.root))] = hashlib.file_digest(file, "sha256").hexdigest()
            counter.advance()
    manifest: Manifest = {
        "format_version": 1, "weights": digests,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in content.items()},
    }  # fmt: skip
    with replacing(out) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {_FIRST: json.dumps(manifest, indent=1).encode(), **content}.items():
            # Of a fixed date, so that one run gives one file.
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)


@contextmanager
def opened(places: Sequence[Path]) -> Iterator[list[Layout]]:
    """Output directories as they are, and bundles unpacked for as long as the block runs.

    Raises ValueError for a file that is no bundle, or is damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for index, place in enumerate(places):
            root = place
            if place.is_file():
                root = Path(folder) / str(index) / place.name  # by which the report calls it
                _unpack(place, root)
            found.append(Layout(root))
        yield found


def _unpack(bundle: Path, root: Path) -> None:
    with open_regular(bundle) as file:
        if not is_bundle(file.read(100)):
            raise ValueError(f"{bundle} is neither the output directory of a run nor a bundle of one")
    try:
        with zipfile.ZipFile(bundle) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MOST_BYTES:
                raise ValueError("it unpacks to more than 4 GiB")
            manifest = parsed_text(archive.read(_FIRST), Manifest, _FIRST)
            for name, digest in manifest["files"].items():
                path, data = path_below(root, name, _FIRST), archive.read(name)
                if hashlib.sha256(data).hexdigest() != digest:
                    raise ValueError(f"{name} is not what it was")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    # A file that was cut or changed makes zipfile raise many things.
    except (
        ValueError,
        KeyError,
        OSError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        zlib.error,
    ) as error:
        raise ValueError(f"{bundle} is damaged: {error}") from None
