"""The page at `/label`: its routes, and a person at work with it in a real browser."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.build import load_splits, survey
from app.datasets.coco import Dataset
from app.datasets.editing import LabelFile
from app.datasets.rle import decode
from app.serving.page import policy, read
from app.serving.settings import Settings
from tests.browser import driven, needs_chromium
from tests.helpers import PATIENCE, REPOSITORY, Command, until
from tests.loopback import free_port
from tests.serving.servers import SCENE, Loaded, opened, problems, scene, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

POTHOLES = REPOSITORY / "examples" / "potholes" / "train"
HTML = read("label")
FILE = "_annotations.coco.json"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The scene and two plain images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(SCENE, folder / "a.png")
    Image.new("RGB", (200, 100), "gray").save(folder / "b.png")
    Image.new("RGB", (100, 200), "gray").save(folder / "c.png")
    return folder


@pytest.fixture
def client(nano: Loaded, photos: Path) -> Iterator[httpx.Client]:
    with serving(nano.engine(), settings=Settings(label=LabelFile(photos))) as client:
        yield client


def put(client: httpx.Client, name: str, version: str, finished: bool, *objects: Any) -> Any:
    return client.put(
        "/label/image",
        params={"name": name},
        headers={"If-Match": version},
        json={"objects": objects, "finished": finished},
    )


def drawn(name: str, *box: float, **other: Any) -> dict[str, Any]:
    return {"id": None, "name": name, "box": list(box), "mask": None, "score": None, **other}


def look(client: httpx.Client, name: str) -> dict[str, Any]:
    answer = client.get("/label/image", params={"name": name})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


# --- the routes ----------------------------------------------------------------------------------


def test_the_page_comes_under_its_policy(client: httpx.Client) -> None:
    answer = client.get("/label")
    assert answer.text == HTML
    assert answer.headers["content-security-policy"] == policy(HTML)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", HTML)
    assert not re.search(r"<[^>]* (style|on\w+)=", HTML.partition("<script>")[0])
    assert "/label" not in client.get("/openapi.json").json()["paths"]


def test_without_a_folder_there_is_no_page(nano: Loaded) -> None:
    with serving(nano.engine()) as client:
        assert client.get("/label").status_code == 404
        assert client.get("/label/images").status_code == 404


def test_the_key_is_asked_for(nano: Loaded, photos: Path) -> None:
    settings = Settings(label=LabelFile(photos), key="secret")
    with serving(nano.engine(settings), settings=settings) as client:
        assert client.get("/label").status_code == 200  # the page asks for the key
        for path in ("images", "image?name=a.png", "picture?name=a.png", "round"):
            assert client.get(f"/label/{path}").status_code == 401
        assert client.get("/label/images", headers={"X-API-Key": "secret"}).status_code == 200
        foreign = {"Origin": "https://example.com", "X-API-Key": "secret"}
        assert client.put("/label/image?name=a.png", headers=foreign).status_code == 403


def test_images_and_their_labels(client: httpx.Client, photos: Path) -> None:
    listed = client.get("/label/images").json()
    assert listed["folder"] == "photos"
    assert [image["name"] for image in listed["images"]] == ["a.png", "b.png", "c.png"]
    assert not any(image["begun"] for image in listed["images"])
    now = look(client, "b.png")
    assert (now["width"], now["height"], now["objects"]) == (200, 100, [])
    mask = {"size": [100, 200], "counts": [50 * 100, 300, 200 * 100 - 5300]}
    saved = put(client, "b.png", now["version"], True, drawn("cat", 0, 0, 9, 9, mask=mask))
    assert saved.status_code == 200, saved.text
    (one,) = saved.json()["objects"]
    assert one["box"] == [50, 0, 3, 100]
    assert decode(one["mask"]).sum() == 300
    assert look(client, "b.png") == saved.json()
    image = client.get("/label/images").json()
    assert image["classes"] == ["cat"]
    assert image["images"][1] == {
        **{"name": "b.png", "begun": True, "finished": True, "objects": 1, "proposals": 0}
    }
    (annotation,) = survey(photos).splits["train"].annotations
    assert annotation.segmentation == one["mask"]


def test_a_stale_edit_gets_what_is_there_now(client: httpx.Client) -> None:
    now = look(client, "b.png")
    saved = put(client, "b.png", now["version"], False, drawn("cat", 1, 1, 9, 9)).json()
    refused = put(client, "b.png", now["version"], False, drawn("dog", 1, 1, 9, 9))
    assert refused.status_code == 412
    assert refused.json()["now"] == saved
    assert put(client, "b.png", "", False).status_code == 412


def test_what_is_no_edit_is_refused(client: httpx.Client, photos: Path) -> None:
    version = look(client, "b.png")["version"]
    for objects, field in [
        ([drawn("cat", 1, 1, 0, 9)], "objects.0"),
        ([drawn("cat", 500, 1, 5, 9)], "objects.0"),
        ([drawn("", 1, 1, 9, 9)], "objects.0"),
        ([drawn("cat", 1, 1, 9, 9, id=4)], "objects.0"),
        ([drawn("cat", 1, 1, 9, 9, score=0.5)], "objects.0"),
        ([drawn("cat", 1, 1, 9, 9, mask={"size": [9, 9], "counts": [81]})], "objects.0"),
        ([drawn("cat", 1, 1, 9)], "objects.0.box"),
        ([drawn("cat", 1, 1, 9, 9, other=1)], "objects.0.other"),
    ]:
        answer = put(client, "b.png", version, True, *objects)
        assert answer.status_code == 422, answer.text
        told = problems(answer)
        assert field in str(told[0]), told
    for name in ("none.png", "../photos/a.png", "/etc/passwd", ".hidden.png"):
        for path in ("image", "picture"):
            answer = client.get(f"/label/{path}", params={"name": name})
            assert answer.status_code == 404, answer.text
    (photos / "broken.png").write_bytes(scene()[:300])
    assert client.get("/label/picture?name=broken.png").status_code == 422
    assert not (photos / FILE).exists()


def test_pictures_are_upright_and_small_ones_are_small(client: httpx.Client, photos: Path) -> None:
    turned = Image.new("RGB", (60, 40), "red")
    exif = turned.getexif()
    exif[0x112] = 6
    turned.save(photos / "d.jpg", exif=exif)
    picture = Image.open(io.BytesIO(client.get("/label/picture?name=d.jpg").content))
    assert picture.size == (40, 60)
    now = look(client, "d.jpg")
    assert (now["width"], now["height"]) == (40, 60)
    small = Image.open(io.BytesIO(client.get("/label/picture?name=a.png&small=true").content))
    assert max(small.size) == 96
    whole = Image.open(io.BytesIO(client.get("/label/picture?name=a.png").content))
    assert np.abs(np.array(whole).astype(int) - np.array(opened(scene()))).mean() < 3


def test_proposals_are_what_the_model_finds(client: httpx.Client, nano: Loaded) -> None:
    found = nano.finder.predict(opened(scene()), ["circle", "cross"], threshold=0.3)
    assert len(found) >= 2
    question = {"prompts": [{"text": "circle"}, {"text": "cross"}], "threshold": 0.3}
    answer = client.post("/label/proposals?name=a.png", json=question).json()
    assert [(one["name"], one["score"]) for one in answer["objects"]] == [
        (found.prompts[prompt], pytest.approx(float(score)))
        for prompt, score in zip(found.prompt_ids, found.scores, strict=True)
    ]
    # What is labelled already is not proposed again.
    first = {**answer["objects"][0], "score": None}
    put(client, "a.png", look(client, "a.png")["version"], False, first)
    again = client.post("/label/proposals?name=a.png", json=question).json()
    assert again["objects"] == answer["objects"][1:]


def test_without_a_ring_no_round_begins(client: httpx.Client) -> None:
    assert client.get("/label/round").json()["available"] is False
    refused = client.post("/label/round")
    assert refused.status_code == 409
    assert "--ring" in problems(refused)[0]["remedy"]


# --- a person ------------------------------------------------------------------------------------


def system(test: Any) -> Any:
    """Mark a test that needs the browser."""
    return pytest.mark.system(needs_chromium(test))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with driven() as browser:
        yield browser


Open = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Open the page in a window of its own; fail where its console has said something."""
    said: list[str] = []
    with contextlib.ExitStack() as stack:

        def open_page(address: str = "", quiet: bool = True, **options: Any) -> Page:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            stack.callback(context.close)
            context.set_default_timeout(1000 * PATIENCE)
            page = context.new_page()
            if quiet:
                page.on("console", lambda m: m.type in ("error", "warning") and said.append(m.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(f"{address or request.getfixturevalue('client').base_url}/label")
            page.locator("#stage").wait_for()
            return page

        yield open_page
    assert said == []


def saved(page: Page) -> None:
    """Wait until the page says that everything is saved."""
    from playwright.sync_api import expect

    expect(page.locator("#saved")).to_have_text("Saved", timeout=1000 * PATIENCE)


def shown(page: Page, name: str) -> None:
    """Wait until an image is shown."""
    from playwright.sync_api import expect

    stage = page.locator("#stage")
    expect(stage).to_have_attribute("aria-label", re.compile(f"Image {re.escape(name)},"))
    expect(page.locator("#busy")).to_be_hidden()


def objects(page: Page) -> list[str]:
    rows = page.locator("#objects [role=option]").all()
    return [" ".join(row.inner_text().split()) for row in rows]


def name_classes(page: Page, words: str) -> None:
    page.keyboard.press("w")
    page.keyboard.type(words)
    page.keyboard.press("Enter")


def at(page: Page, x: float, y: float) -> tuple[float, float]:
    """Return where a pixel of the image is on the screen."""
    width, height = page.evaluate("[state.image.width, state.image.height]")
    area = page.locator("#stage").bounding_box()
    assert area is not None
    return area["x"] + x * area["width"] / width, area["y"] + y * area["height"] / height


def drag(page: Page, *points: tuple[float, float]) -> None:
    page.mouse.move(*at(page, *points[0]))
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*at(page, *point), steps=3)
    page.mouse.up()


def labels_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the annotations of an image in the file, each with its class."""
    document = json.loads((folder / FILE).read_text())
    ids = {image["file_name"]: image["id"] for image in document["images"]}
    names = {each["id"]: each["name"] for each in document["categories"]}
    return [
        {**each, "name": names[each["category_id"]]}
        for each in document["annotations"]
        if each["image_id"] == ids.get(name)
    ]


def mask_of(annotation: dict[str, Any]) -> NDArray[np.bool_]:
    return decode(annotation["segmentation"])


@system
def test_proposals_are_accepted_rejected_and_relabelled(open_page: Open, photos: Path) -> None:
    page = open_page()
    shown(page, "a.png")
    page.locator("#threshold").fill("0.3")
    name_classes(page, "circle, cross, blob")
    page.keyboard.press("g")
    page.get_by_text("proposals to look at.").first.wait_for()
    saved(page)
    before = labels_of(photos, "a.png")
    assert len(before) >= 2
    assert all(each["source"] == "proposal" for each in before)
    assert len(objects(page)) == len(before)
    page.keyboard.press("j")  # selects the first
    page.keyboard.press("y")  # accepts it, and selects the next
    page.keyboard.press("3")
    saved(page)
    after = {each["id"]: each for each in labels_of(photos, "a.png")}
    assert "score" not in after[before[0]["id"]]
    assert after[before[0]["id"]]["segmentation"] == before[0]["segmentation"]
    assert after[before[1]["id"]]["name"] == "blob"
    assert after[before[1]["id"]]["source"] == "proposal"
    page.keyboard.press("n")
    saved(page)
    assert before[1]["id"] not in {each["id"] for each in labels_of(photos, "a.png")}
    page.keyboard.press("z")
    page.keyboard.press("z")
    saved(page)
    names = sorted(each["name"] for each in labels_of(photos, "a.png"))
    assert names == sorted(each["name"] for each in before)
    page.keyboard.press("Shift+Z")
    page.keyboard.press("Control+y")
    saved(page)
    assert len(labels_of(photos, "a.png")) == len(before) - 1
    page.keyboard.press("f")
    shown(page, "b.png")
    saved(page)
    assert not any("source" in each for each in labels_of(photos, "a.png"))
    assert page.locator("#finished").inner_text() == "1 of 3 finished"
    assert [image.path.name for image in survey(photos).splits["train"].images] == ["a.png"]


@system
def test_an_example_box_proposes(open_page: Open, client: httpx.Client, photos: Path) -> None:
    page = open_page()
    shown(page, "a.png")
    page.locator("#threshold").fill("0.05")
    name_classes(page, "circle")
    page.keyboard.press("l")
    drag(page, (200, 150), (300, 250), (348, 298))
    page.get_by_text("to look at.").first.wait_for()
    saved(page)
    prompt = {"text": "circle", "boxes": [[200, 150, 148, 148]]}
    with SCENE.open("rb") as file:
        answer = client.post(
            "/v1/predict",
            files={"image": file},
            data={"request": json.dumps({"prompts": [prompt], "threshold": 0.05})},
        ).json()
    expected = [round(one["score"], 2) for one in answer["results"][0]["detections"]]
    found = [round(each["score"], 2) for each in labels_of(photos, "a.png")]
    assert found == pytest.approx(expected, abs=0.03)


@system
def test_shapes_are_drawn_by_mouse(open_page: Open, photos: Path) -> None:
    page = open_page()
    page.keyboard.press("PageDown")
    shown(page, "b.png")
    name_classes(page, "cat, dog")
    page.keyboard.press("r")
    drag(page, (20, 10), (60, 50))
    page.keyboard.press("2")  # the box is selected still: it is a dog
    page.keyboard.press("p")
    for point in ((100, 10), (150, 10), (150, 60), (100, 60)):
        page.mouse.click(*at(page, *point))
    page.mouse.click(*at(page, 100, 10))
    saved(page)
    box, polygon = labels_of(photos, "b.png")
    assert (box["name"], polygon["name"]) == ("dog", "dog")
    assert box["segmentation"] == []
    np.testing.assert_allclose(box["bbox"], [20, 10, 40, 40], atol=2)
    square = np.zeros((100, 200), bool)
    square[10:60, 100:150] = True
    assert iou(mask_of(polygon), square) > 0.93

    page.keyboard.press("e")  # from the polygon, which is selected
    page.locator("#brush").fill("10")
    drag(page, (100, 35), (150, 35))
    saved(page)
    wiped = mask_of(labels_of(photos, "b.png")[1])
    assert not wiped[33:37, 105:145].any()
    assert wiped[12:28, 105:145].all()
    page.keyboard.press("b")
    drag(page, (125, 20), (125, 50))
    saved(page)
    again = mask_of(labels_of(photos, "b.png")[1])
    assert again[22:48, 123:127].all()
    assert labels_of(photos, "b.png")[1]["id"] == polygon["id"]
    page.keyboard.press("Escape")  # nothing is selected: the brush begins another
    page.keyboard.press("1")
    drag(page, (20, 80), (80, 80))
    saved(page)
    *_, stroke = labels_of(photos, "b.png")
    assert stroke["name"] == "cat"
    np.testing.assert_allclose(stroke["bbox"], [15, 75, 70, 10], atol=2)
    for _ in range(4):
        page.keyboard.press("z")
    saved(page)
    assert len(labels_of(photos, "b.png")) == 1


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


@system
def test_everything_is_done_by_keys(open_page: Open, photos: Path) -> None:
    page = open_page()
    page.keyboard.press("PageDown")
    shown(page, "b.png")
    name_classes(page, "cat")

    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    step = 4  # pixels: a fiftieth of the longer side
    press("r", "Enter", *["ArrowRight"] * 5, *["ArrowDown"] * 3, "Shift+ArrowDown", "Enter")
    saved(page)
    (box,) = labels_of(photos, "b.png")
    assert box["bbox"] == [100, 50, 5 * step, 3 * step + 1]
    press("p", "Space", *["ArrowLeft"] * 8, "Space", *["ArrowUp"] * 8, "Space", "Enter")
    saved(page)
    triangle = mask_of(labels_of(photos, "b.png")[1])
    assert triangle.sum() == pytest.approx(32 * 32 / 2, rel=0.1)
    press("Escape", "b", "Space", *["ArrowLeft"] * 3, "Space")
    saved(page)
    assert len(labels_of(photos, "b.png")) == 3
    press("k", "Delete", "v", "ArrowDown", "Backspace")
    saved(page)
    assert len(labels_of(photos, "b.png")) == 1
    press("f")
    shown(page, "c.png")
    press("f")  # nothing is there to find: that is a label, too
    shown(page, "a.png")
    saved(page)
    train = survey(photos).splits["train"]
    assert [image.path.name for image in train.images] == ["b.png", "c.png"]


@system
def test_two_windows_lose_nothing(open_page: Open, photos: Path) -> None:
    one, other = open_page(quiet=False), open_page(quiet=False)  # a refusal is told there
    for page in (one, other):
        page.keyboard.press("PageDown")
        shown(page, "b.png")
        name_classes(page, "cat, dog")
        page.keyboard.press("r")
    one.keyboard.press("1")
    drag(one, (10, 10), (30, 30))
    saved(one)
    other.keyboard.press("2")
    drag(other, (50, 50), (80, 80))  # it has not seen the other one's yet
    saved(other)
    assert sorted(each["name"] for each in labels_of(photos, "b.png")) == ["cat", "dog"]
    assert len(objects(other)) == 2
    cat = labels_of(photos, "b.png")[0]
    other.keyboard.press("v")
    other.mouse.click(*at(other, 20, 20))
    one.keyboard.press("v")
    one.mouse.click(*at(one, 20, 20))
    one.keyboard.press("n")
    saved(one)
    if len(objects(other)) == 2:  # it has not heard of that yet
        other.keyboard.press("2")
        saved(other)
    assert cat["id"] not in {each["id"] for each in labels_of(photos, "b.png")}
    assert [each["name"] for each in labels_of(photos, "b.png")] == ["dog"]


@system
def test_words_and_names_are_text(open_page: Open, client: httpx.Client, photos: Path) -> None:
    wild = "<img src=x onerror=alert(1)>"
    shutil.copy(photos / "b.png", photos / "0<b>&.png")
    page = open_page()
    shown(page, "0<b>&.png")
    name_classes(page, wild)
    page.keyboard.press("r")
    drag(page, (10, 10), (50, 50))
    saved(page)
    assert objects(page) == [wild]
    assert page.locator("#classes bdi").inner_text() == wild
    assert page.locator("#stage").get_attribute("aria-label") == "Image 0<b>&.png, 1 object"


@system
@pytest.mark.parametrize(("width", "height"), [(320, 640), (1280, 720)])
def test_it_fits_a_screen(open_page: Open, width: int, height: int) -> None:
    page = open_page(viewport={"width": width, "height": height})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for control in page.locator("button:visible, input:visible:not([type=radio])").all():
        area = control.bounding_box()
        assert area is not None
        named = control.evaluate(
            "e => e.getAttribute('aria-label') || e.innerText || e.labels?.[0]?.textContent"
        )
        assert named, control.evaluate("e => e.outerHTML")
    if width > 1000:
        area = page.locator("#finish").bounding_box()
        film = page.locator("#film").bounding_box()
        assert area is not None
        assert film is not None
        assert area["y"] + area["height"] <= film["y"] + 1


@system
def test_a_kill_of_the_server_loses_no_edit(open_page: Open, photos: Path, tmp_path: Path) -> None:
    """What is drawn while it is away is saved when it is back."""
    port = free_port()
    words = [sys.executable, "-m", "app", "serve", "--port", str(port), "--label", str(photos)]
    words += ["--device", "cpu"]

    @contextlib.contextmanager
    def running() -> Iterator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        try:

            def is_up() -> bool:
                assert process.poll() is None
                with contextlib.suppress(httpx.HTTPError):
                    return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
                return False

            until(is_up, "the server answers")
            yield process
        finally:
            process.kill()
            process.wait()

    with running() as server:
        page = open_page(f"http://127.0.0.1:{port}", quiet=False)
        page.keyboard.press("PageDown")
        shown(page, "b.png")
        name_classes(page, "cat")
        page.keyboard.press("r")
        drag(page, (10, 10), (30, 30))
        saved(page)
        server.send_signal(signal.SIGKILL)
        server.wait()
        assert len(labels_of(photos, "b.png")) == 1
        drag(page, (50, 50), (80, 80))
        page.get_by_text("Not saved").wait_for()
        drag(page, (100, 50), (120, 80))
        assert len(objects(page)) == 3
    with running():
        saved(page)
        assert len(labels_of(photos, "b.png")) == 3
        assert page.locator("#problem").is_hidden()


@system
def test_thirty_images_from_nothing(
    browser: Browser, nano: Loaded, command: Command, tmp_path: Path, open_page: Open
) -> None:
    """A person draws what a model that knows no potholes cannot propose."""
    folder = tmp_path / "road"
    folder.mkdir()
    for image in sorted(POTHOLES.glob("*.jpg"))[:30]:
        shutil.copy(image, folder)
    truth = survey(REPOSITORY / "examples" / "potholes").splits["train"]
    drawing = {image.path.name: image for image in truth.images}
    with serving(nano.engine(), settings=Settings(label=LabelFile(folder))) as client:
        page = open_page(str(client.base_url))
        for number, name in enumerate(sorted(path.name for path in folder.glob("*.jpg"))):
            shown(page, name)
            if number == 0:
                name_classes(page, "pothole")
            page.keyboard.press("p")
            for each in truth.annotations_by_image[drawing[name].id]:
                for point in corners(decode(each.segmentation)):
                    page.mouse.click(*at(page, *point))
                page.keyboard.press("Enter")
            page.keyboard.press("f")
        page.get_by_text("All images are finished.").wait_for()
        saved(page)
        page.context.close()  # which would ask a server that has ended
    checked = command("data", "check", folder)
    assert checked.code == 0, checked.err
    assert "30 images" in checked.out
    labelled = survey(folder).splits["train"]
    assert len(labelled.images) == 30
    assert labelled.class_names == ["pothole"]
    agree = agreement(truth, labelled)
    assert len(agree) == len(labelled.annotations)
    assert np.mean(agree) > 0.85
    assert min(agree) > 0.5
    assert load_splits(folder).train.annotations


def corners(mask: NDArray[np.bool_], most: int = 14) -> list[tuple[float, float]]:
    """Return the corners that a person clicks around an object."""
    import cv2

    rings, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    ring = max(rings, key=cv2.contourArea)[:, 0]
    for precision in range(1, 100):
        simple = cv2.approxPolyDP(ring[:, None], precision, True)[:, 0]
        if len(simple) <= most:
            break
    return [(float(x) + 0.5, float(y) + 0.5) for x, y in simple]


def agreement(truth: Dataset, labelled: Dataset) -> list[float]:
    """Return the best IoU of each true object with what was drawn, in the labelled images."""
    by_name = {image.path.name: image.id for image in truth.images}
    found = []
    for image in labelled.images:
        own = [a.segmentation for a in labelled.annotations_by_image[image.id]]
        for each in truth.annotations_by_image[by_name[image.path.name]]:
            overlaps = coco_mask.iou(own, [each.segmentation], [False]) if own else np.zeros(1)
            found.append(float(np.max(overlaps)))
    return found
