"""Download a large file: several addresses, resumed where it broke off, digest checked."""

from __future__ import annotations

import hashlib
import http.client
import logging
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

CHUNK = 2**20
TIMEOUT_SECONDS = 60
ATTEMPTS_WITHOUT_PROGRESS = 4  # per address
PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 206, 416
SECONDS_BETWEEN_LINES = 10.0
ENOUGH_FREE = 1.05  # times what is still to come


def download(
    urls: Sequence[str],
    path: Path,
    *,
    digest: str | None,
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Fetch the file from the first address that has it.

    What has arrived stays in `<path>.part` and is continued by the next call. digest: "md5:..." or
    "sha256:..."; a file of another digest is thrown away. progress: gets bytes so far and in all.
    Raises RuntimeError if no address works, the digest differs, or the disk is too small.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for url in urls:
        try:
            _fetch(url, part, progress or _Lines(path.name))
        except (OSError, http.client.HTTPException) as error:
            problems.append(f"{url}: {error}")
            logger.warning("%s: %s", url, error)
            continue
        if digest is not None and digest_of(part, digest.split(":")[0]) != digest:
            part.unlink()
            problems.append(f"{url}: the file has not the digest {digest}")
            logger.warning("%s", problems[-1])
            continue
        part.replace(path)
        return
    raise RuntimeError(f"{path.name} could not be downloaded: {'; '.join(problems)}")


def digest_of(path: Path, algorithm: str) -> str:
    """`<algorithm>:<hex>` of a file."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _fetch(url: str, part: Path, progress: Callable[[int, int | None], None]) -> None:
    """Complete `part` from one address, over several connections if they break.

    Raises OSError when it refuses, or when nothing more arrives.
    """
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_once(url, part, before, progress):
                return
            reason: Exception = OSError("the connection closed early")
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
            reason = error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, _DiskFullError):
                raise
            reason = error
        arrived = (part.stat().st_size if part.exists() else 0) > before
        failures = 0 if arrived else failures + 1
        if failures == ATTEMPTS_WITHOUT_PROGRESS:
            raise reason
        time.sleep(0.2 * 4 ** max(0, failures - 1) if failures else 0)


def _fetch_once(
    url: str, part: Path, start: int, progress: Callable[[int, int | None], None]
) -> bool:
    """Append what one connection gives. Returns True if the file is complete then."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != RANGE_NOT_SATISFIABLE:
            raise
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        if total == str(start):
            return True
        part.unlink()  # longer than the file: of something else
        return False
    with response:
        resumed = response.status == PARTIAL_CONTENT
        if start and resumed and not _starts_at(response.headers, start):
            raise OSError("the server sent another part than was asked for")
        length = response.headers.get("Content-Length")
        position = start if resumed else 0
        total_bytes = position + int(length) if length is not None else None
        _check_disk(part, 0 if total_bytes is None else total_bytes - position)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                position += len(chunk)
                progress(position, total_bytes)
    return total_bytes is None or position >= total_bytes


def _starts_at(headers: http.client.HTTPMessage, start: int) -> bool:
    return headers.get("Content-Range", "").startswith(f"bytes {start}-")


class _DiskFullError(OSError):
    pass


def _check_disk(part: Path, missing: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < missing * ENOUGH_FREE:
        raise _DiskFullError(
            f"{part.parent} has {free / 1e9:.1f} GB free; {missing / 1e9:.1f} GB are to come"
        )


class _Lines:
    """Tells every few seconds how far a download is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = self.told = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int | None) -> None:
        if self.first is None:
            self.first = done
        now = time.monotonic()
        if now - self.told < SECONDS_BETWEEN_LINES:
            return
        self.told = now
        rate = (done - self.first) / (now - self.began)
        left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
        of = f" of {total / 1e6:.0f}" if total else ""
        logger.info("%s: %.0f%s MB, %.1f MB/s%s", self.name, done / 1e6, of, rate / 1e6, left)
