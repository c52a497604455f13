"""Official MAE checkpoints: where they are, and bringing one here. No torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from common.download import download, has_digest
from common.files import check_output_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """A published file and its digest, of which the release tells the first digits."""

    url: str
    digest: str


_RELEASE = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_{}.pth"
OFFICIAL_FILES = {
    "vit_base": OfficialFile(url=_RELEASE.format("vit_base"), digest="md5:8cad7c"),
    "vit_large": OfficialFile(url=_RELEASE.format("vit_large"), digest="md5:b8b06e"),
    "vit_huge": OfficialFile(url=_RELEASE.format("vit_huge"), digest="md5:9bdbb0"),
}


def fetch_official(model: str, out: Path, *, url: str | None = None) -> None:
    """Bring an official checkpoint to `out`; nothing to do if it is there and whole.

    Raises ValueError if `out` is another file, RuntimeError if the download fails or its digest
    does not fit.
    """
    official = OFFICIAL_FILES[model]
    fetch(url or official.url, out, digest=official.digest)


def fetch(url: str, out: Path, *, digest: str) -> None:
    """Download to beside `out`, going on where an earlier try stopped; check; rename."""
    check_output_file(out)
    if not out.exists():
        download([url], out, digest=digest)
    elif not has_digest(out, digest):
        raise ValueError(f"{out} exists, and its digest does not begin with {digest}")
    else:
        logger.info("%s is there already", out)
