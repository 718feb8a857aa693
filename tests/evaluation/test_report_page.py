"""report.html: whole in itself, safe, and with the figures of the run."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image as PILImage

from app.datasets.coco import Category, Dataset
from app.evaluation import charts, record
from app.evaluation.record import Record
from app.evaluation.report_page import render, write_report
from app.evaluation.scoring import score
from app.files import write_json
from app.model import weights
from tests.browser import look, needs_chromium
from tests.evaluation.examples import BOX, found, truth
from tests.helpers import Command

pytestmark = pytest.mark.drawings
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


def test_the_top_tells_what_the_terminal_told_of_gain_and_data(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["notes"] == []
    notes = ["valid: 1 of 2 images are in train as well", HOSTILE]
    write_json(folder / "environment.json", environment | {"notes": notes})
    top = render(folder).partition("<h2>")[0]
    assert HOSTILE not in top
    told = html.unescape(top)
    log = (folder / "train.log").read_text()
    gain = re.findall(r"(of \d+ objects? in .*|.*Box AP of other such images.*)", log)
    assert len(gain) == 2
    assert all(line in told for line in (*gain, *notes))


def test_the_page_can_be_made_anew(tiny_run: Path, command: Command) -> None:
    before = (tiny_run / "report.html").read_text()
    assert command("report", tiny_run).code == 0
    assert (tiny_run / "report.html").read_text() == before


@pytest.fixture(scope="module")
def report(nano_run: Path) -> str:
    """The page of a run that found something."""
    return (nano_run / "report.html").read_text()


def _figures(report: str) -> dict[str, str]:
    """What a drawing says, by its caption."""
    drawn = re.findall(
        r'src="data:image/svg\+xml;base64,([^"]+)"><figcaption>(.*?)</figcaption>', report
    )
    texts = {}
    for data, caption in drawn:
        nodes = ElementTree.fromstring(base64.b64decode(data)).iter()
        texts[caption] = "|".join(node.text or "" for node in nodes if node.tag.endswith("text"))
    return texts


def _rows(report: str, heading: str) -> dict[str, list[str]]:
    """The cells of the first table after a heading, by the first of each row."""
    table = report.split(f">{heading}</h", 1)[1].split("</table>")[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>")[1:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("training loss", "training loss"),
        ("its parts, each as a share of its highest", "boxes, L1|boxes, GIoU|class|presence|masks"),
        ("on the validation images", "box AP|box AP50|mask AP|mask AP50"),
        ("learning rate", "of the detector"),
        ("seconds a step", "seconds"),
        ("precision by recall, mask IoU 0.5", "precision| circle| rectangle| triangle"),
        ("score and truth, mask IoU 0.5, with the number of detections", "share that is right"),
    ],
)
def test_each_drawing_is_there(report: str, caption: str, said: str) -> None:
    drawn = [texts for name, texts in _figures(report).items() if name.startswith(caption)]
    assert len(drawn) == 1
    assert said in drawn[0]


def test_figures_by_size_and_by_class(report: str, nano_run: Path) -> None:
    figures = json.loads((nano_run / "metrics.json").read_text())
    assert figures["segm/AP"] > 0.1
    rows = _rows(report, "Figures")
    assert rows["mask AP of objects under 32² pixels"][1] == f"{figures['segm/AP_small']:.3f}"
    assert rows["box AP of objects under 32² pixels"][1] == f"{figures['bbox/AP_small']:.3f}"
    rows = _rows(report, "Classes")
    column = rows["class"].index("mask AP")
    for name in ("circle", "rectangle", "triangle"):
        assert rows[name][column] == f"{figures[f'segm/AP/{name}']:.3f}"


def test_every_object_is_found_as_something(report: str, nano_run: Path) -> None:
    """Each row of the confusions has as many as there are objects, some on the diagonal."""
    truth = record.read(nano_run).truth
    rows = _rows(report, "Confusion")
    right = 0
    for category in truth.categories:
        counts = [re.sub("<.*?>", "", cell).replace("·", "0") for cell in rows[category.name]]
        own = [a for a in truth.annotations if a.category_id == category.id]
        assert sum(map(int, counts)) == len(own)
        right += int(counts[rows[""].index(category.name)])
    assert right > 0
    assert rows[""][-1] == "<i>not found</i>"
    assert "<i>nothing</i>" in rows


def test_truth_stands_beside_prediction(report: str, nano_run: Path) -> None:
    """Both images, one among the worst and one among the best, each with all its objects."""
    truth = record.read(nano_run).truth
    pairs = re.findall(
        r"<p>(\S+): [^<]*</p>"
        r'<div class="row"><figure><img [^>]*jpeg[^>]*><figcaption>truth: (\d+)</figcaption>'
        r"</figure><figure><img [^>]*jpeg[^>]*><figcaption>predicted: (\d+)</figcaption>",
        report,
    )
    objects = {i.path.name: len(truth.annotations_by_image[i.id]) for i in truth.images}
    assert {name: int(count) for name, count, _ in pairs} == objects
    assert sum(int(count) for _, _, count in pairs) > 0
    worst, best = report.index("<h2>The worst images</h2>"), report.index("<h2>The best images")
    first, second = (report.index(f"<p>{name}: ") for name, _, _ in pairs)
    assert worst < first < best < second


def test_all_settings_are_shown(report: str, nano_run: Path) -> None:
    shown = report.split("<summary>All settings</summary><pre>")[1].split("</pre>")[0]
    assert html.unescape(shown) == (nano_run / "config_resolved.yaml").read_text()


def test_the_datasets_page_lies_beside_it(report: str, nano_run: Path) -> None:
    links = [attributes["href"] for tag, attributes in _Page(report).tags if tag == "a"]
    assert links == ["dataset_report.html"]
    page = (nano_run / str(links[0])).read_text()
    _check_whole(page)
    assert page.count("data:image/jpeg") == 6
    assert "Objects by class and split" in page
    assert "None were found" not in page  # of faults; a run counts them in its notes


def test_the_threshold_is_that_of_the_weights(report: str, nano_run: Path) -> None:
    header = weights.read_header(nano_run / "weights" / "best")
    figures = json.loads((nano_run / "metrics.json").read_text())
    assert header is not None
    assert header.threshold == figures["calibration/threshold"]
    assert 0 < header.threshold < 1
    assert f"the threshold {header.threshold:.3f}" in report


@pytest.mark.parametrize("name", [pytest.param("nano_run", marks=pytest.mark.slow), "tiny_run"])
def test_its_commands_run(name: str, tmp_path: Path, command: Command, request) -> None:
    """Each as printed, whatever the settings come from: a file, flags, overrides, defaults."""
    run = tmp_path / "the run"
    shutil.copytree(request.getfixturevalue(name), run)
    page = write_report(run).read_text()
    lines = html.unescape(page.split("<h2>Commands</h2>\n<pre>")[1].split("</pre>")[0]).splitlines()
    resume, evaluate, infer = (shlex.split(line) for line in lines[:3])
    before = json.loads((run / "metrics.json").read_text())
    best = (run / "weights" / "best" / "model.safetensors").read_bytes()

    def figures(folder: Path) -> dict[str, float]:
        found = json.loads((folder / "metrics.json").read_text())
        return {name: value for name, value in found.items() if name != "seconds"}

    done = command("train", *resume[1:])  # a finished run: nothing is left to do
    assert done.code == 0, done.err
    assert figures(run) == {name: value for name, value in before.items() if name != "seconds"}
    assert (run / "weights" / "best" / "model.safetensors").read_bytes() == best
    done = command("train", *evaluate[1:])
    assert done.code == 0, done.err
    again = figures(run / "evaluation")
    assert again == {name: before[name] for name in again}
    assert "python -m app report" in (run / "evaluation" / "report.html").read_text()
    assert "--resume" not in (run / "evaluation" / "report.html").read_text()
    done = command("infer", *infer[1:])
    assert done.code == 0, done.err
    done = command("train", *resume[1:], "--epochs", 2)
    assert done.code == 0, done.err
    assert "resumed from" in done.out
    assert figures(run)["epochs"] == 2
    log = (run / "train.log").read_text().splitlines()
    rates = [line for line in log if line.startswith("learning rates: ")]
    assert len(rates) == 3
    assert len(set(rates)) == 1
    assert lines[3] == f"python -m app report {shlex.quote(str(run))}"
    assert command("report", run).code == 0


def test_a_power_of_ten_is_whole() -> None:
    """Above the axis, as of a learning rate: its upper edge lies in the drawing."""
    rows = [{"epoch": 1, "rate": 1e-5}, {"epoch": 2, "rate": 5e-6}]
    drawing = ElementTree.fromstring(charts.curves(rows, {"rate": "rate"}, "rate"))
    power = next(node for node in drawing.iter() if (node.text or "").startswith("1e"))
    size = re.search(r"font-size: ([\d.]+)px", power.attrib["style"])
    assert size is not None
    assert float(power.attrib["y"]) >= float(size[1])


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


@pytest.mark.system
@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["report.html", "dataset_report.html"])
def test_a_browser_shows_it_whole(nano_run: Path, name: str, width: int) -> None:
    """No console error, no broken picture, and on a phone nothing to scroll sideways for."""
    seen = look(nano_run / name, width)
    assert seen.console == []
    assert seen.broken == 0 < seen.images
    assert seen.wide <= width
    assert seen.narrow == 0


@pytest.mark.system
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
