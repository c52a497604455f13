"""Download a large file: several addresses, resumed where it broke off, digest checked."""

import hashlib
import http.client
import logging
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from common.files import beside, check_written_alone, open_regular, shortened
from common.progress import Counter

logger = logging.getLogger(__name__)

CHUNK, TIMEOUT_SECONDS = 2**20, 60
ATTEMPTS_WITHOUT_PROGRESS = 4  # per address
FIRST_PAUSE_SECONDS = 0.2
ADDRESS = re.compile(r"https?://[!-~]+")  # in a URL all else is written as %XX
PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 206, 416


def download(urls: Sequence[str], path: Path, *, digest: str | None) -> None:
    """Fetch the file from the first address that has it.

    What has arrived stays in `<path>.segmae-part` and is continued by the next call. digest:
    "md5:..." or "sha256:...", perhaps its first digits only; a file of another digest is thrown
    away. Raises ValueError for what is no address, or a link where the file would grow; RuntimeError
    if no address works, the digest differs, or the disk is too small.
    """
    for url in urls:
        if not _is_address(url):
            raise ValueError(f"{shortened(url)} is no address; give one that begins with http:// or https://")
    part = beside(path)
    check_written_alone(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for url in urls:
        try:
            _fetch(url, part)
            if digest is None or has_digest(part, digest):
                part.replace(path)
                return
            part.unlink()
            raise OSError(f"the file has not the digest {digest}")
        except (OSError, http.client.HTTPException) as error:
            problems.append(f"{url}: {error}")
            logger.warning("%s", problems[-1])
    kept = f"; {part} is kept, run again to go on from there" if part.exists() else ""
    raise RuntimeError(f"{path.name} could not be downloaded: {'; '.join(problems)}{kept}")


def _is_address(url: str) -> bool:
    try:  # a port that is no number, or brackets around what is no IPv6, is a ValueError
        parts = urlsplit(url)
        return bool(ADDRESS.fullmatch(url) and parts.hostname and parts.port != 0)
    except ValueError:
        return False


def has_digest(path: Path, digest: str) -> bool:
    """Whether the file's digest begins so; digest: `md5:` or `sha256:`, then hexadecimal digits."""
    algorithm, _, digits = digest.partition(":")
    with open_regular(path) as file:
        return hashlib.file_digest(file, algorithm).hexdigest().startswith(digits.lower())


def _fetch(url: str, part: Path) -> None:
    """Complete `part` from one address, over several connections if they break; or OSError."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _fetch_once(url, part, before)
        except (OSError, http.client.HTTPException) as error:
            failures = 0 if _size(part) > before else failures + 1
            # Below 500 the server is well and has no such file.
            has_none = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if has_none or failures == ATTEMPTS_WITHOUT_PROGRESS:
                raise
        time.sleep(FIRST_PAUSE_SECONDS * 4 ** (failures - 1) if failures else 0)


def _fetch_once(url: str, part: Path, start: int) -> None:
    """Append what one connection gives. Raises OSError if the file is not complete then."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != RANGE_NOT_SATISFIABLE:
            raise
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        if total in ("", str(start)):
            return  # there is nothing after what we have; the digest decides
        part.unlink()
        raise OSError("what was kept is longer than the file") from error
    with response:
        resumed = response.status == PARTIAL_CONTENT  # 200: it sends all of it again
        begins = response.headers.get("Content-Range", "")
        if start and resumed and not begins.startswith(f"bytes {start}-"):
            raise OSError("the server sent another part than was asked for")
        position = start if resumed else 0
        to_come = response.length or 0  # a server need not say, or says what is no number
        total_bytes, free = position + to_come, shutil.disk_usage(part.parent).free
        if free < to_come * 1.05:  # with something to spare
            has = f"{part.parent} has {free / 1e9:.1f} GB free"
            raise RuntimeError(f"{has}; {to_come / 1e9:.1f} GB are to come")
        with (
            part.open("ab" if resumed else "wb") as file,
            Counter(part.stem, total=total_bytes // 10**6, done=position // 10**6, unit="MB") as mb,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                position += len(chunk)
                mb.reach(position // 10**6)
    if position < total_bytes:
        raise OSError("the connection closed early")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
