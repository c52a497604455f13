"""The page in a real browser, at the widths of a desk and of a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.report.page import write_all
from tests.pipeline.finished_run import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]
MEASURE = """
<script>
addEventListener("load", () => {
  const visible = [...document.querySelectorAll("body *")].filter(e =>
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    && e.getClientRects().length && !["SCRIPT", "STYLE", "TITLE", "title"].includes(e.tagName));
  const clipped = e => e.closest("thead")
    && getComputedStyle(e.closest("thead")).position === "absolute";
  const scale = e => e.getScreenCTM ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1;
  const shown = visible.filter(e => !clipped(e));
  const width = document.documentElement.clientWidth;
  const measured = {
    width, scrolls: document.documentElement.scrollWidth,
    smallest: Math.min(...shown.map(e => parseFloat(getComputedStyle(e).fontSize) * scale(e))),
    outside: shown.filter(e => { const r = e.getBoundingClientRect();
      return r.right > width + 0.5 || r.left < -0.5; }).map(e => e.textContent.slice(0, 40)),
    requests: performance.getEntriesByType("resource").map(r => r.name)
      .filter(name => !name.startsWith("data:")),
    images: [...document.images].every(i => i.complete && i.naturalWidth > 0),
    texts: shown.length,
  };
  (parent.document.body.dataset || {}).measured = JSON.stringify(measured);
});
</script>
"""


def measure(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """The page's measures at a width, taken by a script in a copy of it, inside a frame."""
    copy = folder / f"copy-{width}.html"
    copy.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    frame = folder / f"frame-{width}.html"
    frame.write_text(
        f'<body><iframe src="{copy.name}" style="border:0;width:{width}px;height:3000px"></iframe>'
    )
    more = (
        "--allow-file-access-from-files",
        "--disable-web-security",
        "--virtual-time-budget=4000",
    )
    dump = browse(folder, *more, "--window-size=1400,3000", "--dump-dom", frame.as_uri())
    found = re.search(r'data-measured="([^"]*)"', dump.stdout)
    assert found, dump.stderr[-500:]
    return json.loads(unescape(found[1]))


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    paths = write_run(tmp_path_factory.mktemp("report") / "run", seeds=(0, 1), probes=True)
    for picture in paths.root.rglob("*.png"):
        Image.new("RGB", (1200, 400), (90, 120, 160)).save(picture)  # wider than a phone
    write_all(paths)
    return paths.report_html


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_and_can_be_read(page: Path, width: int, tmp_path: Path) -> None:
    found = measure(page, width, tmp_path)
    assert found["width"] == width
    assert found["scrolls"] <= width, "it scrolls sideways"
    assert found["outside"] == []
    assert found["smallest"] >= 12
    assert found["requests"] == []
    assert found["images"]
    assert found["texts"] > 100


def test_page_prints_its_tables_as_tables_and_is_short(page: Path, tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    browse(tmp_path, f"--print-to-pdf={paper}", page.as_uri())
    pages = len(re.findall(rb"/Type\s*/Page\b(?!s)", paper.read_bytes()))
    assert 2 <= pages <= 10


def test_in_the_dark_the_page_is_dark_and_its_charts_can_be_seen(page: Path, tmp_path: Path) -> None:
    shades = {}
    for name, more in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        picture = tmp_path / f"{name}.png"
        browse(tmp_path, *more, "--window-size=1280,2000", f"--screenshot={picture}", page.as_uri())
        shades[name] = np.asarray(Image.open(picture).convert("L"))
    assert np.median(shades["light"]) > 240
    assert np.median(shades["dark"]) < 40
    assert (shades["dark"] > 120).mean() > 0.005, "text and lines"
