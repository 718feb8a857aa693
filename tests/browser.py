"""A real headless browser: what it makes of a page, and one that a test drives."""

from __future__ import annotations

import contextlib
import html
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
_LOOK = ("--virtual-time-budget=5000", "--enable-logging=stderr")
# The page in a frame, since a window of Chromium's is 500 pixels wide at least; asked once loaded.
_FRAME = """<!doctype html><title>not loaded</title><body style="margin: 0">
<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const broken = [...page.images].filter(i => !i.complete || !i.naturalWidth).length;
  const wide = page.documentElement.scrollWidth;
  const narrow = [...page.querySelectorAll("td, th")].filter(
    cell => cell.textContent.length > 4 && cell.clientWidth < 40).length;
  document.title =
    `images ${{page.images.length}} broken ${{broken}} wide ${{wide}} narrow ${{narrow}}`;
}});</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page.

    Attributes:
        images, broken: pictures, and those of them that could not be shown.
        wide: how wide the page came out, in CSS pixels.
        narrow: cells of tables that are too narrow for their words.
        console: lines that its console has.
    """

    images: int
    broken: int
    wide: int
    narrow: int
    console: list[str]


def look(page: Path, width: int, screenshot: Path | None = None) -> Seen:
    """Open the page in a frame `width` CSS pixels wide."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as folder:
        framed = Path(folder) / "page.html"
        content = html.escape(page.read_text(encoding="utf-8"))
        framed.write_text(_FRAME.format(width=width, page=content), encoding="utf-8")
        window = [f"--window-size={max(width, 500)},900", f"--user-data-dir={folder}/profile"]
        words = [CHROMIUM, *_FLAGS, *_LOOK, *window]
        done = _run([*words, "--dump-dom", framed.as_uri()])
        if screenshot is not None:
            _run([*words, f"--screenshot={screenshot}", framed.as_uri()])
    title = re.search(
        r"<title>images (\d+) broken (\d+) wide (\d+) narrow (\d+)</title>", done.stdout
    )
    assert title, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(*(int(group) for group in title.groups()), console=console)


@contextlib.contextmanager
def driven() -> Iterator[Browser]:
    """Start a browser that a test drives: its mouse, fingers and keys."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
