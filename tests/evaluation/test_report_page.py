"""report.html: whole in itself, safe, and with the figures of the run."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image as PILImage

from app.datasets.coco import Category, Dataset
from app.evaluation import record
from app.evaluation.record import Record
from app.evaluation.report_page import render
from app.evaluation.scoring import score
from app.files import write_json
from tests.browser import look, needs_chromium
from tests.conftest import Command
from tests.evaluation.examples import BOX, found, truth

HOSTILE = '<script>alert("a")</script>$x_{1$ & _b'


class _Page(HTMLParser):
    """Tags with what they carry; refuses a page whose tags are not closed in their order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _check_whole(html: str) -> None:
    """No script, nothing fetched, no broken picture."""
    page = _Page(html)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            kind, data = str(attributes["src"]).removeprefix("data:image/").split(";base64,")
            content = base64.b64decode(data)
            if kind == "jpeg":
                PILImage.open(io.BytesIO(content)).load()
            else:
                assert ElementTree.fromstring(content).tag.endswith("svg")


def test_the_page_of_a_run(tiny_run: Path) -> None:
    html = (tiny_run / "report.html").read_text()
    _check_whole(html)
    figures = json.loads((tiny_run / "metrics.json").read_text())
    row = re.search(r"<td>mask AP</td>(.*?)</tr>", html)
    assert row is not None
    columns = re.findall(r">([\d.]+)</td>", row[1])
    names = ("baseline/segm/AP", "segm/AP", "last/segm/AP")
    assert columns == [f"{figures[name]:.3f}" for name in names]
    for said in ("before training", "--resume", "--eval-only", "./infer.sh", "learning rate"):
        assert said in html


def test_the_page_can_be_made_anew(tiny_run: Path, command: Command) -> None:
    before = (tiny_run / "report.html").read_text()
    assert command("report", tiny_run).code == 0
    assert (tiny_run / "report.html").read_text() == before


@pytest.mark.parametrize("detections", [[], [found(1, 1, BOX, 0.9), found(2, 2, BOX, 0.8)]])
def test_names_from_outside_are_text(tmp_path: Path, detections: list[dict]) -> None:
    """Also where nothing was found, and where the images are not at hand."""
    plain = truth((1, 1, BOX), (2, 1, BOX))
    names = (Category(1, HOSTILE), Category(2, "猫"))
    dataset = Dataset(plain.images, plain.annotations, names)
    record.write(tmp_path, Record("valid", dataset, detections))
    write_json(tmp_path / "metrics.json", score(dataset, detections, threshold=0.5))
    html = render(tmp_path)
    _check_whole(html)
    assert "&lt;script&gt;" in html
    assert "missed" in html


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_whole(tiny_run: Path, width: int) -> None:
    """No console error, no broken picture, and on a phone nothing to scroll sideways for."""
    seen = look(tiny_run / "report.html", width)
    assert seen.console == []
    assert seen.broken == 0 < seen.images
    assert seen.wide <= width
    assert seen.narrow == 0


@needs_chromium
def test_a_browser_would_say_what_is_broken(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<title>x</title><img src='none.png'><p style='width: 900px'>wide</p>"
        "<table><tr><td style='max-width: 9px; overflow-wrap: anywhere'>narrow</td></tr></table>"
        "<script>none()</script>"
    )
    seen = look(page, 390)
    assert (seen.images, seen.broken) == (1, 1)
    assert (seen.wide >= 900, seen.narrow) == (True, 1)
    assert any("none is not defined" in line for line in seen.console)
