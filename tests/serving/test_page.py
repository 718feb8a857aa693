"""The page at `/`: what it holds, and what a person can do with it in a real browser."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from app.datasets.overlay import PALETTE
from app.serving.loading import Source
from app.serving.page import policy, read
from app.serving.settings import Settings
from tests.browser import driven, needs_chromium
from tests.helpers import PATIENCE
from tests.serving.servers import NANO, SCENE, Loaded, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

HTML = read("find")
WORDS = ("circle", "hexagon", "cross")
SMALL = {"width": 320, "height": 640}  # CSS pixels: the least that WCAG 1.4.10 asks for

# --- the file ------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(HTML)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_fetches_nothing_and_has_no_code_in_attributes() -> None:
    tags = _Tags().tags
    addresses = [v for _, a in tags for k, v in a.items() if k in ("src", "href", "action")]
    assert {value for value in addresses if value and not value.startswith("data:")} == {"/docs"}
    assert [a for _, a in tags for name in a if name == "style" or name.startswith("on")] == []
    assert [tag for tag, _ in tags if tag in ("style", "script")] == ["style", "script"]
    assert set(re.findall(r"https?://[^'\" <]+", HTML)) == {"http://www.w3.org/2000/svg"}


def test_the_policy_admits_what_the_page_holds_and_nothing_else() -> None:
    rules = dict(rule.split(" ", 1) for rule in policy(HTML).split("; "))
    assert rules.pop("default-src") == "'none'"
    for tag in ("style", "script"):
        content = HTML.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert rules.pop("connect-src") == "'self'"
    assert rules.pop("img-src") == "blob: data:"
    assert rules.pop("media-src") == "blob:"
    assert set(rules.values()) == {"'none'"}


def test_the_server_sends_the_page_under_its_policy(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.text == HTML
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"] == policy(HTML)
    assert "/" not in client.get("/openapi.json").json()["paths"]


def test_the_policy_follows_a_change_of_the_script() -> None:
    changed = HTML.replace('"use strict";', '"use strict"; ')
    assert policy(changed) != policy(HTML)


def test_the_colors_are_those_of_the_pictures() -> None:
    listed = re.search(r"const PALETTE = (\[.*?\]);", HTML, flags=re.DOTALL)
    assert listed is not None
    rows = json.loads(re.sub(r",\s*\]", "]", listed[1]))
    assert [tuple(row) for row in rows] == list(PALETTE)


# --- a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(nano: Loaded) -> Iterator[str]:
    """A server of two versions: nano as it is, and nano that sees fewer pixels."""
    other = Loaded(*Source(NANO, "nano", "2", device="cpu", resolution=96).load())
    with serving(nano.engine(), other.engine()) as client:
        yield str(client.base_url)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with driven() as browser:
        yield browser


Open = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Open]:
    """Open the page in a window of its own; fail where its console has said something."""
    said: list[str] = []
    with contextlib.ExitStack() as stack:

        def open_page(at: str = address, quiet: bool = True, **options: Any) -> Page:
            options = {"viewport": {"width": 1280, "height": 900}, **options}
            context = browser.new_context(**options)
            stack.callback(context.close)
            context.set_default_timeout(1000 * PATIENCE)
            page = context.new_page()
            if quiet:
                page.on("console", lambda m: m.type in ("error", "warning") and said.append(m.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(at)
            return page

        yield open_page
    assert said == []


def find(page: Page, image: Path, *words: str) -> None:
    """Choose an image and ask for words above 0.5; wait for the answer."""
    page.locator("#file").set_input_files(image)
    page.locator("#threshold").fill("0.5")
    page.locator("#word").fill(", ".join(words))
    page.locator("#word").press("Enter")
    answered(page)


def answered(page: Page) -> None:
    """Wait until the status tells of an answer."""
    from playwright.sync_api import expect

    told = re.compile("found above|Nothing above")
    expect(page.locator("#status")).to_contain_text(told, timeout=1000 * PATIENCE)


def rows(page: Page, view: int = 0) -> list[tuple[str, str]]:
    """Return prompt and score of what is listed as found."""
    options = page.locator(".list").nth(view).locator("[role=option]:visible").all()
    return [(o.locator("bdi").inner_text(), o.locator("b").inner_text()) for o in options]


def pick(page: Page, tool: str) -> Locator:
    """Return what is clicked to draw examples (like), or what is not meant (unlike)."""
    return page.locator(f"[name=tool][value={tool}] + span")


def asked(
    address: str, image: Path, words: Sequence[str] = WORDS, **request: Any
) -> dict[str, Any]:
    """Return what the server answers a program: the result of one image."""
    prompts = [{"text": word} for word in words]
    with image.open("rb") as file:
        response = httpx.post(
            f"{address}/v1/predict",
            files={"image": file},
            data={"request": json.dumps({"prompts": prompts, "threshold": 0.5, **request})},
            timeout=PATIENCE,
        )
    response.raise_for_status()
    result: dict[str, Any] = response.json()["results"][0]
    return result


def listed(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["prompt"], f"{one['score']:.2f}") for one in answer["detections"]]


def mask_of(one: dict[str, Any]) -> NDArray[np.bool_]:
    """Return a detection's mask, by pycocotools."""
    rle = {**one["mask"], "counts": one["mask"]["counts"].encode()}
    return coco_mask.decode(rle).astype(bool)


def painted(page: Page, view: int = 0) -> NDArray[np.bool_]:
    """Return which pixels of the canvas are drawn on."""
    url = page.locator(".stage canvas").nth(view).evaluate("canvas => canvas.toDataURL()")
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.array(picture)[..., 3] > 0


def assert_drawn(drawn: NDArray[np.bool_], masks: Sequence[NDArray[np.bool_]]) -> None:
    """Hold what is drawn to masks: within them, but for the width of an outline."""
    whole = np.any(masks, axis=0).astype(np.float32)
    share = cv2.resize(whole, drawn.shape[::-1], interpolation=cv2.INTER_AREA)  # of each pixel
    kernel = np.ones((13, 13), np.uint8)
    assert drawn[cv2.erode(share, kernel) > 0.99].all()
    assert not drawn[cv2.dilate(share, kernel) == 0].any()


def system(test: Any) -> Any:
    """Mark a test that needs the browser."""
    return pytest.mark.system(needs_chromium(test))


@system
def test_it_shows_what_the_server_finds(open_page: Open, address: str) -> None:
    page, answer = open_page(), asked(address, SCENE)
    find(page, SCENE, *WORDS)
    assert len(answer["detections"]) >= 2
    assert rows(page) == listed(answer)
    assert page.locator("#chips bdi").all_inner_texts() == list(WORDS)
    assert_drawn(painted(page), [mask_of(one) for one in answer["detections"]])
    assert "nano, version 1" in page.locator("#status").inner_text()


@system
def test_without_words_the_classes_of_the_weights_are_asked_for(
    open_page: Open, address: str
) -> None:
    page = open_page()
    find(page, SCENE)
    with SCENE.open("rb") as file:
        form = {"threshold": "0.5"}
        answer = httpx.post(
            f"{address}/v1/predict", files={"image": file}, data=form, timeout=PATIENCE
        )
    assert rows(page) == listed(answer.json()["results"][0])


@system
def test_the_threshold_filters_without_a_request(open_page: Open, address: str) -> None:
    page = open_page()
    find(page, SCENE, *WORDS)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    slider = page.locator("#threshold")
    for value in (0.05, 0.2, 0.8, 0.95):
        slider.fill(str(value))
        answer = asked(address, SCENE, threshold=value)
        assert rows(page) == listed(answer)
        masks = [mask_of(one) for one in answer["detections"]]
        assert_drawn(painted(page), masks or [np.zeros((320, 480), bool)])
    slider.press("ArrowLeft")
    assert page.locator("#threshold-value").inner_text() == "0.94"
    assert sent == []


@system
def test_prompts_are_hidden_and_shown(open_page: Open, address: str) -> None:
    page, answer = open_page(), asked(address, SCENE)
    find(page, SCENE, *WORDS)
    legend = page.locator("#legend button", has_text="circle")
    assert legend.get_attribute("aria-pressed") == "true"
    legend.click()
    assert legend.get_attribute("aria-pressed") == "false"
    rest = [one for one in answer["detections"] if one["prompt"] != "circle"]
    assert rows(page) == listed({"detections": rest})
    assert_drawn(painted(page), [mask_of(one) for one in rest])
    page.locator("#chips button").nth(1).click()  # hexagon goes, without a request
    assert {prompt for prompt, _ in rows(page)} == {"cross"}
    assert "press Find" in page.locator("#status").inner_text()


@system
def test_an_image_is_dropped_or_pasted(open_page: Open) -> None:
    data = base64.b64encode(SCENE.read_bytes()).decode()
    for kind in ("drop", "paste"):
        page = open_page()
        page.evaluate(
            """([kind, data]) => {
              const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
              const transfer = new DataTransfer();
              transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
              document.body.dispatchEvent(kind === "drop"
                ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true })
                : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
            }""",
            [kind, data],
        )
        page.get_by_text("480 × 320").wait_for()
        page.locator("#word").fill("circle")
        page.locator("#find").click()
        answered(page)
        assert {prompt for prompt, _ in rows(page)} == {"circle"}


@system
def test_hover_and_focus_show_the_score(open_page: Open, address: str) -> None:
    page, answer = open_page(), asked(address, SCENE)
    find(page, SCENE, *WORDS)
    best, tip = answer["detections"][0], page.locator(".tip")
    assert tip.is_hidden()
    x, y = _inside(mask_of(best))
    stage = page.locator(".stage")
    area = stage.bounding_box()
    assert area is not None
    page.mouse.move(area["x"] + x * area["width"] / 480, area["y"] + y * area["height"] / 320)
    assert tip.inner_text() == f"{best['prompt']} {best['score']:.2f}"
    page.mouse.move(0, 0)
    assert tip.is_hidden()

    page.locator("[role=option]").first.focus()
    seen = []
    for _ in answer["detections"]:
        seen.append(tip.inner_text())
        page.keyboard.press("ArrowDown")
    assert seen == [" ".join(row) for row in listed(answer)]

    stage.focus()  # the image itself goes through them by its arrow keys
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == seen[0]
    assert f"1 of {len(seen)}" in page.locator("#spoken").inner_text()
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text() == seen[-1]


def _inside(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the pixel of a mask that is farthest from its edge."""
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    y, x = np.unravel_index(int(distance.argmax()), mask.shape)
    return int(x), int(y)


# --- boxes ---------------------------------------------------------------------------------------


def request_shown(page: Page) -> dict[str, Any]:
    """Return the request that the page shows as a program."""
    page.get_by_text("Python", exact=True).click()
    code = page.locator("#code").inner_text()
    text = code.split("request = ")[1].split("\nwith open")[0]
    request: dict[str, Any] = json.loads(text)
    return request


def to_screen(page: Page, x: float, y: float) -> tuple[float, float]:
    """Return where a pixel of the scene is on the screen."""
    page.locator(".stage").scroll_into_view_if_needed()
    area = page.locator(".stage").bounding_box()
    assert area is not None
    return area["x"] + x * area["width"] / 480, area["y"] + y * area["height"] / 320


@system
def test_boxes_are_drawn_by_mouse(open_page: Open, address: str) -> None:
    page = open_page()
    find(page, SCENE, "circle")
    pick(page, "like").click()
    page.mouse.move(*to_screen(page, 200, 150))
    page.mouse.down()
    page.mouse.move(*to_screen(page, 300, 260), steps=4)
    page.mouse.move(*to_screen(page, 348, 298))
    page.mouse.up()
    answered(page)
    pick(page, "unlike").click()
    page.mouse.move(*to_screen(page, 300, 40))  # from any corner
    page.mouse.down()
    page.mouse.move(*to_screen(page, 160, 186), steps=4)
    page.mouse.up()
    answered(page)
    request = request_shown(page)
    (prompt,) = request["prompts"]
    assert prompt["text"] == "circle"
    np.testing.assert_allclose(prompt["boxes"], [[200, 150, 148, 148]], atol=2)
    np.testing.assert_allclose(prompt["negative_boxes"], [[160, 40, 140, 146]], atol=2)
    answer = asked(address, SCENE, **request)
    assert rows(page) == listed(answer)
    assert listed(answer) != listed(asked(address, SCENE, ["circle"]))
    page.locator("#boxes button").first.click()
    answered(page)
    assert "boxes" not in request_shown(page)["prompts"][0]


@system
def test_a_box_is_drawn_by_touch_and_needs_no_words(open_page: Open, address: str) -> None:
    page = open_page(viewport=SMALL, has_touch=True, is_mobile=True)
    page.locator("#file").set_input_files(SCENE)
    pick(page, "like").tap()
    touch = page.context.new_cdp_session(page)

    def send(kind: str, *point: float) -> None:
        points = [{"x": point[0], "y": point[1]}] if point else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    send("touchStart", *to_screen(page, 200, 150))
    top = page.evaluate("scrollY")
    for x, y in ((250, 200), (300, 260), (348, 298)):
        send("touchMove", *to_screen(page, x, y))
    send("touchEnd")
    answered(page)
    assert page.evaluate("scrollY") == top  # the finger draws, it does not scroll
    request = request_shown(page)
    (prompt,) = request["prompts"]
    assert "text" not in prompt
    np.testing.assert_allclose(prompt["boxes"], [[200, 150, 148, 148]], atol=4)
    assert rows(page) == listed(asked(address, SCENE, **request))


@system
def test_a_box_is_drawn_by_keys(open_page: Open, address: str) -> None:
    page = open_page()
    find(page, SCENE, "circle")
    pick(page, "like").click()
    page.locator(".stage").focus()
    for key in ("ArrowLeft", "ArrowLeft", "Shift+ArrowUp", "Enter", "Enter"):
        page.keyboard.press(key)
    spoken = page.locator("#spoken")
    assert "no width" in spoken.inner_text()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "Escape"):
        page.keyboard.press(key)
    assert page.locator("#boxes li").count() == 0
    for key in ("Enter", "ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    answered(page)
    # From the middle, 240, 160; an arrow goes 10 pixels, 1 with Shift.
    assert request_shown(page)["prompts"][0]["boxes"] == [[230, 179, 20, 10]]
    assert "20 wide and 10 high" in spoken.inner_text()


@system
def test_what_is_found_becomes_an_example(open_page: Open, address: str) -> None:
    page, answer = open_page(), asked(address, SCENE, ["circle"])
    find(page, SCENE, "circle")
    pick(page, "unlike").click()
    x, y, w, h = answer["detections"][0]["box"]
    corners = [np.floor(x), np.floor(y), np.ceil(x + w), np.ceil(y + h)]
    expected = [corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]]
    page.mouse.click(*to_screen(page, *_inside(mask_of(answer["detections"][0]))))
    answered(page)
    assert request_shown(page)["prompts"][0]["negative_boxes"] == [expected]
    page.locator("[role=option]:visible").first.focus()
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator("#boxes li").count() == 2


# --- versions, programs, downloads ---------------------------------------------------------------


@system
def test_two_versions_are_compared(open_page: Open, address: str) -> None:
    page = open_page()
    find(page, SCENE, *WORDS)
    page.locator("#against").select_option("nano:2")
    page.locator(".stage").nth(1).wait_for()
    answered(page)
    answers = [asked(address, SCENE, model=f"nano:{version}") for version in "12"]
    assert listed(answers[0]) != listed(answers[1])
    for view, answer in enumerate(answers):
        assert rows(page, view) == listed(answer)
        caption = page.locator("figcaption").nth(view).inner_text()
        assert caption.startswith(f"nano, version {view + 1}")
        assert f"{len(answer['detections'])} found" in caption
        assert_drawn(painted(page, view), [mask_of(one) for one in answer["detections"]])
    alone = [page.locator(".list").nth(view).get_by_text("only here").count() for view in (0, 1)]
    shared = _pairs(*(answer["detections"] for answer in answers))
    assert alone == [len(answer["detections"]) - shared for answer in answers]
    left, right = (page.locator(".stage").nth(view).bounding_box() for view in (0, 1))
    assert left is not None
    assert right is not None
    assert left["x"] + left["width"] <= right["x"]

    page.locator("[role=option]:visible").first.focus()  # one thing is shown in both
    tips = page.locator(".tip").all_inner_texts()
    assert tips[0].split()[0] == tips[1].split()[0]
    page.locator("#against").select_option("none")
    answered(page)
    assert page.locator(".stage").count() == 1


def _pairs(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> int:
    """Count what both have found, by pycocotools' IoU; right where no two of a prompt overlap."""
    ious = coco_mask.iou([a["box"] for a in one], [b["box"] for b in other], [0] * len(other))
    same = [[a["prompt"] == b["prompt"] for b in other] for a in one]
    return int(((ious >= 0.5) & same).any(axis=1).sum())


NAMES = ["scene.png", """it's "a"; b, c=@ü $HOME.png"""]


@system
@pytest.mark.parametrize("name", NAMES)
def test_the_programs_do_the_same(open_page: Open, address: str, tmp_path: Path, name: str) -> None:
    image = tmp_path / name
    shutil.copy(SCENE, image)
    page = open_page()
    page.locator("#model").select_option("nano:2")
    find(page, image, "circle", """it's; "b" $HOME @c \\""")
    page.locator("#threshold").fill("0.3")
    shown = rows(page)
    assert shown
    for language in ("Python", "curl"):
        page.get_by_text(language, exact=True).click()
        code = page.locator("#code").inner_text()
        interpreter = ["bash"] if language == "curl" else [sys.executable]
        done = subprocess.run(
            [*interpreter, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        if language == "curl":
            answer = json.loads(done.stdout)
            assert answer["model"]["version"] == "2"
            assert listed(answer["results"][0]) == shown
        else:
            lines = [line.split(" [")[0].rsplit(" ", 1) for line in done.stdout.splitlines()]
            assert [(prompt, f"{float(score):.2f}") for prompt, score in lines] == shown


@system
def test_a_program_is_copied(open_page: Open) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.locator("#copy").click()
    page.get_by_text("Copied", exact=True).wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("curl ")
    assert copied == page.locator("#code").inner_text()


def download(page: Page, button: str) -> tuple[str, bytes]:
    with page.expect_download() as info:
        page.locator(button).click()
    return info.value.suggested_filename, Path(info.value.path()).read_bytes()


@system
def test_downloads_hold_what_is_shown(open_page: Open, address: str, tmp_path: Path) -> None:
    page, answer = open_page(), asked(address, SCENE, threshold=0.3)
    assert page.locator("#save-coco").is_disabled()
    find(page, SCENE, *WORDS)
    page.locator("#threshold").fill("0.3")
    page.locator("#legend button", has_text="hexagon").click()
    shown = [one for one in answer["detections"] if one["prompt"] != "hexagon"]
    assert len(shown) > 2
    masks = [mask_of(one) for one in shown]

    name, content = download(page, "#save-coco")
    assert name == "scene.coco.json"
    (tmp_path / name).write_bytes(content)
    coco = COCO(tmp_path / name)
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(WORDS)
    assert coco.loadImgs(1)[0]["file_name"] == SCENE.name
    annotations = coco.loadAnns(coco.getAnnIds())
    assert [a["score"] for a in annotations] == [one["score"] for one in shown]
    assert [a["bbox"] for a in annotations] == [one["box"] for one in shown]
    for annotation, one, mask in zip(annotations, shown, masks, strict=True):
        assert WORDS[annotation["category_id"] - 1] == one["prompt"]
        assert annotation["area"] == mask.sum()
        assert (coco.annToMask(annotation) == mask).all()

    name, content = download(page, "#save-png")
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        assert files.testzip() is None
        assert files.namelist() == [f"{i + 1:03d}_{o['prompt']}.png" for i, o in enumerate(shown)]
        for file, mask in zip(files.namelist(), masks, strict=True):
            picture = Image.open(io.BytesIO(files.read(file)))
            assert picture.mode == "1"
            assert (np.array(picture) == mask).all()

    name, content = download(page, "#save-yolo")
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        assert json.loads(files.read("data.yaml").decode().removeprefix("names: ")) == list(WORDS)
        lines = files.read("labels/scene.txt").decode().splitlines()
    for line, one, mask in zip(lines, shown, masks, strict=True):
        number, *points = line.split()
        assert WORDS[int(number)] == one["prompt"]
        assert (filled(np.array(points, float).reshape(-1, 2) * [480, 320]) == mask).all()


def filled(points: NDArray[np.float64], width: int = 480, height: int = 320) -> NDArray[np.bool_]:
    """Fill a polygon by the even-odd rule, at the pixels' centers."""
    result = np.zeros((height, width), bool)
    (x1, y1), (x2, y2) = points.T, np.roll(points, -1, axis=0).T
    for row in range(height):
        crossed = (y1 > row + 0.5) != (y2 > row + 0.5)
        share = (row + 0.5 - y1[crossed]) / (y2 - y1)[crossed]
        at = x1[crossed] + share * (x2 - x1)[crossed]
        result[row] = (at[:, None] < np.arange(width) + 0.5).sum(axis=0) % 2
    return result


@system
def test_outlines_follow_masks_with_holes_and_parts(open_page: Open) -> None:
    """The decoder and the tracer, on masks that no model makes."""
    page, random = open_page(), np.random.default_rng(0)
    noise = random.random((37, 53)) < 0.5
    ring = cv2.circle(np.zeros((300, 200), np.uint8), (100, 150), 80, 1, 25).astype(bool)
    corners = np.zeros((4, 4), bool)
    corners[0, 0] = corners[3, 3] = corners[0, 3] = True
    for mask in (noise, ring, corners, np.ones((5, 7), bool), np.zeros((5, 7), bool)):
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        height, width = mask.shape
        answer = page.evaluate(
            """([counts, height, width]) => {
              const bounds = toBounds({ counts });
              const rings = bounds.length ? trace(toGrid(bounds, height, Infinity)) : [];
              const inside = [];
              for (let at = 0; at < height * width; at++) inside.push(isSet(bounds, at));
              const whole = rings.length ? joined(rings) : [];
              return { rings, inside, area: areaOf(bounds), whole };
            }""",
            [rle["counts"].decode(), height, width],
        )
        assert answer["area"] == mask.sum()
        inside = np.array(answer["inside"]).reshape(width, height).T
        assert (inside == mask).all()
        layers = np.zeros(mask.shape, int)
        for points in answer["rings"]:
            layers += filled(np.array(points, float).reshape(-1, 2), width, height)
        assert (layers % 2 == mask).all()
        if mask.any():
            whole = np.array(answer["whole"], float).reshape(-1, 2)
            assert (filled(whole, width, height) == mask).all()


@system
def test_scores_are_compared_as_the_server_compares_them(open_page: Open) -> None:
    """A score that is the threshold, rounded to float32, is not above it."""
    page = open_page()
    thresholds = [round(0.01 * step, 2) for step in range(1, 100)]
    scores = np.array(thresholds, np.float32)
    for moved in (scores, np.nextafter(scores, np.float32(1)), np.nextafter(scores, np.float32(0))):
        expected = [bool(one > t) for one, t in zip(moved, thresholds, strict=True)]
        pairs = [[float(one), t] for one, t in zip(moved, thresholds, strict=True)]
        assert page.evaluate("pairs => pairs.map(pair => isAbove(...pair))", pairs) == expected


# --- what goes wrong -----------------------------------------------------------------------------


@system
def test_nothing_found_tells_the_best_score_and_shows_it(open_page: Open, address: str) -> None:
    page, best = open_page(), asked(address, SCENE)["best_score"]
    find(page, SCENE, *WORDS)
    page.locator("#threshold").fill("0.99")
    status = page.locator("#status")
    assert f"Nothing above 0.99. The best score is {best:.2f}." in status.inner_text()
    status.get_by_role("button", name="Show it").click()
    assert rows(page)[0] == listed(asked(address, SCENE))[0]
    assert len(rows(page)) < 3
    page.locator("#threshold").fill("0.99")
    page.locator("#legend button").first.click()
    status.get_by_text("Nothing above 0.99").wait_for()


@system
def test_errors_are_told_in_the_servers_words(open_page: Open, tmp_path: Path) -> None:
    page, bad = open_page(quiet=False), tmp_path / "bad.jpg"
    bad.write_text("no image")
    page.locator("#find").click()
    problem = page.locator("#problem")
    assert "There is no image yet. Choose, drop or paste one." in _words(problem)
    page.locator("#file").set_input_files(bad)
    page.get_by_text("This browser cannot show it").wait_for()
    page.locator("#find").click()
    problem.get_by_text("An image cannot be read.").wait_for()
    assert "bad.jpg: cannot be read as an image" in _words(problem)
    assert "send a JPEG or PNG." in _words(problem)
    assert problem.get_attribute("role") == "alert"
    page.locator("#file").set_input_files(SCENE)
    problem.wait_for(state="hidden")
    page.locator("#word").fill("!?")
    page.locator("#find").click()
    problem.get_by_text("has no letter or digit; name what to find.").wait_for()


def _words(element: Locator) -> str:
    return " ".join(element.inner_text().split())


@system
def test_a_server_out_of_reach_is_told_and_asked_again(open_page: Open) -> None:
    page = open_page(quiet=False)
    find(page, SCENE, "circle")
    before = rows(page)
    page.context.set_offline(True)
    page.locator("#find").click()
    page.get_by_text("The server does not answer.").wait_for()
    assert rows(page) == before  # what was found is still there
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    page.locator("#problem").wait_for(state="hidden")
    answered(page)


@system
def test_a_key_is_asked_for_once_and_kept_for_the_tab(open_page: Open, nano: Loaded) -> None:
    with serving(nano.engine(), settings=Settings(key="s3cret")) as client:
        address = str(client.base_url)
        page = open_page(address, quiet=False)
        entry = page.get_by_label("Key", exact=True)
        entry.fill("wrong")
        entry.press("Enter")
        page.get_by_text("The server refused that key.").wait_for()
        entry.fill("s3cret")
        entry.press("Enter")
        page.locator("#model option").wait_for(state="attached")  # the threshold is set with them
        find(page, SCENE, "circle")
        shown = rows(page)
        assert shown
        for language in ("Python", "curl"):
            page.get_by_text(language, exact=True).click()
            code = page.locator("#code").inner_text()
            assert "s3cret" not in code
            done = subprocess.run(
                ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code],
                cwd=SCENE.parent,
                env={"SAM3_API_KEY": "s3cret", "PATH": "/usr/bin:/bin"},
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            assert "circle" in done.stdout, done.stderr
        page.reload()
        page.locator("#model option").wait_for(state="attached")
        find(page, SCENE, "circle")
        assert rows(page) == shown
        assert not page.get_by_label("Key", exact=True).is_visible()

        other = open_page(address, quiet=False)
        other.get_by_role("button", name="Cancel").click()
        other.get_by_text("This server answers with a key alone.").wait_for()
        other.get_by_role("button", name="Try again").click()
        other.get_by_label("Key", exact=True).wait_for()


@system
def test_a_request_is_stopped(open_page: Open) -> None:
    page = open_page()
    page.locator("#file").set_input_files(SCENE)
    held: list[Any] = []
    page.route("**/v1/predict", lambda route: held.append(route))  # it stays on its way
    page.locator("#word").fill("circle")
    page.locator("#find").click()
    page.locator("#stop").click()
    page.get_by_text("Press Find.", exact=True).wait_for()
    assert page.locator("#stop").is_hidden()
    assert page.locator("#problem").is_hidden()
    page.unroute("**/v1/predict")
    page.locator("#find").click()
    answered(page)


# --- large, many, other scripts ------------------------------------------------------------------


@system
def test_a_large_image_with_many_things(open_page: Open, address: str, tmp_path: Path) -> None:
    """4K, all that nano answers above the least threshold, and the slider still at hand."""
    large = tmp_path / "large.png"
    picture = Image.open(SCENE).resize((3840, 2560), Image.Resampling.LANCZOS)
    picture.save(large, compress_level=1)
    words = [f"{color} thing" for color in ("red", "purple", "blue", "yellow", "orange", "pink")]
    page = open_page()
    find(page, large, *words, *WORDS)
    page.locator("#threshold").fill("0.05")
    answer = asked(address, large, [*words, *WORDS], threshold=0.05)
    assert len(answer["detections"]) > 10
    assert rows(page) == listed(answer)
    masks = [mask_of(one) for one in answer["detections"]]
    for one, mask in zip(answer["detections"], masks, strict=True):
        if not mask.any():  # a box stands for it
            x, y, w, h = one["box"]
            mask[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1] = True
    assert_drawn(painted(page), masks)
    seconds = page.evaluate(
        "() => { const begun = performance.now(); setThreshold(0.06); "
        "return (performance.now() - begun) / 1000; }"
    )
    print(f"a move of the slider at 4K: {1000 * seconds:.0f} ms")


@system
def test_words_of_other_scripts(open_page: Open, address: str) -> None:
    words = ["دائرة حمراء", "赤い丸", "красный круг", "लाल वृत्त", "a" * 90]
    page = open_page(viewport=SMALL)
    find(page, SCENE, *words)
    assert page.locator("#chips bdi").all_inner_texts() == words
    page.locator("#threshold").fill("0.05")
    assert rows(page) == listed(asked(address, SCENE, words, threshold=0.05))
    assert page.evaluate("document.documentElement.scrollWidth") <= SMALL["width"]
    page.locator("#word").fill("一、二")
    assert page.locator("#chips bdi").all_inner_texts() == [*words, "一"]
    _, content = download(page, "#save-coco")
    assert [one["name"] for one in json.loads(content)["categories"]] == [*words, "一"]


# --- for everyone --------------------------------------------------------------------------------

CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  ).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] > 0) return color;
    }
    return [255, 255, 255, 1];
  };
  const low = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility()) continue;
    if (element.closest("script, style, noscript, option, .unseen, [disabled]")) continue;
    const one = light(parse(getComputedStyle(element).color)), other = light(ground(element));
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    seen++;
    if (ratio < 4.5) low.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return { seen, low };
}"""


@system
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    find(page, SCENE, *WORDS)
    page.locator("#against").select_option("nano:2")
    page.locator(".stage").nth(1).wait_for()
    answered(page)
    page.locator("#legend button").first.click()
    pick(page, "like").click()
    page.locator("[role=option]:visible").first.hover()
    page.evaluate("fail(new Failure('A sentence.', [{ message: 'what', remedy: 'how' }]), find)")
    seen = page.evaluate(CONTRAST)
    assert seen["low"] == []
    assert seen["seen"] > 50
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 60) == (scheme == "dark")


@system
@pytest.mark.parametrize("width", [320, 768, 1280])
def test_it_fits_the_screen(open_page: Open, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 800})
    for _ in range(2):  # empty, then with two versions
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, label, p, h2, canvas")]
              .filter(e => e.checkVisibility() && !e.classList.contains("unseen"))
              .filter(e => e.getBoundingClientRect().right > innerWidth + 1
                || e.getBoundingClientRect().left < -1)
              .map(e => e.outerHTML.slice(0, 80))"""
        )
        assert outside == []
        find(page, SCENE, *WORDS, "a rather long name of a thing that is looked for")
        page.locator("#against").select_option("nano:2")
        page.locator(".stage").nth(1).wait_for()
        answered(page)


@system
def test_everything_has_a_name_and_a_state(open_page: Open) -> None:
    page = open_page()
    find(page, SCENE, *WORDS)
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    roles: dict[str, list[str]] = {}
    for node in tree["nodes"]:
        if not node.get("ignored"):
            role = node.get("role", {}).get("value", "")
            roles.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "slider", "radio", "combobox", "listbox", "option", "link", "group"):
        assert roles.get(role), role
        assert all(roles[role]), (role, roles[role])
    (image,) = roles["application"]
    assert image.startswith("Image scene.png, 480 by 320 pixels, ")
    assert roles["heading"][0] == "SAM 3"
    assert page.locator("#status").get_attribute("role") == "status"
    assert page.locator("#spoken").get_attribute("aria-live") == "polite"
    assert page.locator("html").get_attribute("lang") == "en"


@system
def test_the_tab_key_goes_from_top_to_bottom_and_is_seen(open_page: Open) -> None:
    page = open_page()
    find(page, SCENE, "circle")
    page.locator("h1").click()
    order = []
    for _ in range(60):
        page.keyboard.press("Tab")
        at = page.evaluate(
            """() => {
              const e = document.activeElement;
              if (e === document.body) return null;
              const shown = e.matches(".unseen") ? e.nextElementSibling
                : e.id === "word" ? e.parentElement : e;
              const style = getComputedStyle(shown), name = e.id || e.className || e.value;
              return [name === "unseen" ? e.value : name,
                style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
            }"""
        )
        if at is None:
            break
        order.append(at)
    names = [name for name, _ in order]
    assert [name for name, outlined in order if not outlined] == []
    expected = ["model", "against", "word", "find", "file", "look", "stage", "threshold"]
    expected += ["save-coco", "save-png", "save-yolo", "curl", "copy", "code"]
    assert [name for name in names if name in expected] == expected
    assert len(names) < 60


@system
def test_motion_is_left_out_where_it_is_not_wanted(open_page: Open) -> None:
    for wish, name in (("no-preference", "run"), ("reduce", "none")):
        page = open_page(reduced_motion=wish)
        page.locator("#file").set_input_files(SCENE)
        page.locator(".stage").wait_for()
        style = "getComputedStyle(document.querySelector('.progress')).animationName"
        assert page.evaluate(style) == name
