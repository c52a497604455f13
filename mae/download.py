"""Official MAE checkpoints: where they are, and bringing one here. No torch."""

import logging
from pathlib import Path

from common.download import download, has_digest
from common.files import check_output_file
from mae.config import OFFICIAL_FILES

logger = logging.getLogger(__name__)


RELEASE = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_{}.pth"


def fetch_official(model: str, out: Path, *, url: str | None = None) -> None:
    """Bring an official checkpoint to `out`; nothing to do if it is there and whole.

    Raises ValueError if `out` is another file, RuntimeError if the download fails or its digest
    does not fit.
    """
    digest = OFFICIAL_FILES[model]
    check_output_file(out)
    if not out.exists():
        download([url or RELEASE.format(model)], out, digest=digest)
    elif not has_digest(out, digest):
        raise ValueError(f"{out} exists, and its digest does not begin with {digest}")
    else:
        logger.info("%s is there already", out)
