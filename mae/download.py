"""Official MAE checkpoints: downloaded once, resumable, checked against their published digest."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
TRIES = 5
SECONDS_BETWEEN_TRIES = 1.0
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """A published file and the first digits of its MD5 digest."""

    url: str
    md5_start: str


_RELEASE = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_{}.pth"
OFFICIAL_FILES = {
    "vit_base": OfficialFile(url=_RELEASE.format("vit_base"), md5_start="8cad7c"),
    "vit_large": OfficialFile(url=_RELEASE.format("vit_large"), md5_start="b8b06e"),
    "vit_huge": OfficialFile(url=_RELEASE.format("vit_huge"), md5_start="9bdbb0"),
}


def fetch_official(model: str, out: Path, *, url: str | None = None) -> None:
    """Bring an official checkpoint to `out`; nothing to do if it is there and whole.

    Raises ValueError if `out` is another file, RuntimeError if the download fails or its digest
    does not fit.
    """
    official = OFFICIAL_FILES[model]
    fetch(url or official.url, out, md5_start=official.md5_start)


def fetch(url: str, out: Path, *, md5_start: str) -> None:
    """Download to `<out>.part`, going on where an earlier try stopped; check; rename."""
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: {out.absolute().parent} is not a folder")
    if out.exists():
        if not md5(out).startswith(md5_start):
            raise ValueError(f"{out} exists, and its MD5 does not start with {md5_start}")
        logger.info("%s is there already", out)
        return
    part = out.with_name(f"{out.name}.part")
    _download(url, part)
    digest = md5(part)
    if not digest.startswith(md5_start):
        part.unlink()
        raise RuntimeError(f"{url}: the MD5 is {digest}, but has to start with {md5_start}")
    part.replace(out)


def md5(path: Path) -> str:
    """MD5 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _download(url: str, part: Path) -> None:
    """Try several times, each time from where the file ends."""
    reason = ""
    for number in range(TRIES):
        if number:
            time.sleep(SECONDS_BETWEEN_TRIES)
        try:
            if _append_rest(url, part):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{url}: {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(error) or type(error).__name__
        logger.warning("%s: %s; %d tries left", url, reason, TRIES - number - 1)
    raise RuntimeError(f"{url}: {reason}; run again to go on from {part}")


def _append_rest(url: str, part: Path) -> bool:
    """Append what is missing. Returns True if the file is complete afterwards."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return True  # there is nothing after what we have; the digest decides
        raise
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        total = int(response.headers.get("Content-Length", 0)) + (have if resumed else 0)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    return part.stat().st_size >= total
