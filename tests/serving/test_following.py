"""/v1/follow and its page: a film in, tracks as they are known; who leaves ends it."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.synthetic.films import KINDS, draw_film
from app.evaluation.tracks import read_films
from app.inference.film_writer import FilmWriter
from app.inference.films import Reader
from app.inference.following import Following, follow_films, list_films
from app.inference.settings import Settings as Asking
from tests.browser import driven, needs_chromium
from tests.helpers import PATIENCE, until
from tests.inference.film_files import write, write_sound
from tests.serving.servers import NANO, Loaded, limited, problems, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FRAMES = 24
Event = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "shapes.mp4"
    plan, writer = draw_film((0, 2)), FilmWriter(path, 20)
    for number in range(FRAMES):
        writer.add(Image.fromarray(plan.frame(number / 20)[0]), number / 20)
    writer.close()
    return path


@pytest.fixture(scope="module")
def client(nano: Loaded) -> Iterator[httpx.Client]:
    with serving(nano.engine()) as client:
        yield client


def form(film: Path, **request: Any) -> dict[str, Any]:
    """A request's parts."""
    asked = {"prompts": [{"text": kind} for kind in KINDS], **request}
    files = {"film": (film.name, film.read_bytes(), "video/mp4")}
    return {"files": files, "data": {"request": json.dumps(asked)}}


def events(answer: httpx.Response) -> Iterator[Event]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_tracks_are_those_of_infer(
    client: httpx.Client, nano: Loaded, film: Path, tmp_path: Path
) -> None:
    with client.stream("POST", "/v1/follow", **form(film)) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = list(events(answer))
    assert [name for name, _ in told] == ["film", *["frame"] * FRAMES, "end"]
    first, *frames, end = (value for _, value in told)
    assert (first["width"], first["height"], first["fps"], first["count"]) == (320, 240, 20, FRAMES)
    assert first["prompts"] == [*KINDS]
    assert first["model"] == {"name": "nano", "version": "1", "alias": None}
    assert (end["frames"], end["broken"], end["ended"]) == (FRAMES, 0, "")

    threshold = nano.about.threshold
    asked = Asking(str(NANO), prompts=KINDS, threshold=threshold, save=("coco",))
    films = list_films(str(film), tmp_path, ("coco",), fps=20, overwrite=False)
    follow_films(films, tmp_path, asked, Following(), nano.finder)
    expected = read_films(tmp_path / "tracks.json")
    names = {each["track"]: each["prompt"] for each in end["tracks"]}
    for frame, theirs in zip(frames, expected.films[1], strict=True):
        ours = [(each["track"], names[each["track"]], each["mask"]) for each in frame["found"]]
        assert ours == [(s.track, expected.classes[s.label], s.shape) for s in theirs]
    assert [frame["time"] for frame in frames] == pytest.approx(np.arange(FRAMES) / 20)
    assert len(names) >= 3


def test_the_short_form_and_sections(client: httpx.Client, film: Path) -> None:
    parts = {"files": {"film": film.read_bytes()}, "data": {"prompt": "circle", "every": "6"}}
    with client.stream("POST", "/v1/follow", **parts) as answer:
        told = list(events(answer))
    assert [value["frame"] for name, value in told if name == "frame"] == [0, 1, 2, 3]
    assert told[0][1]["prompts"] == ["circle"]


def test_what_cannot_be_followed_is_refused_before_anything_is_told(
    client: httpx.Client, film: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no film")
    sound = write_sound(tmp_path / "sound.mp4")
    for path, words in ((text, "cannot be read as a film"), (sound, "no video stream")):
        answer = client.post("/v1/follow", **form(path))
        assert answer.status_code == 422
        assert words in problems(answer)[0]["message"]
    for request, field in (
        ({"threshold": 2}, "threshold"),
        ({"every": 0}, "every"),
        ({"prompts": [{"text": "?!"}]}, "prompts.0.text"),
        ({"until": 3}, "until"),
    ):
        answer = client.post("/v1/follow", **form(film, **request))
        assert answer.status_code == 422
        assert [problem["field"] for problem in problems(answer)] == [field]
    assert client.post("/v1/follow", json={}).status_code == 415
    answer = client.post("/v1/follow", files={"image": film.read_bytes()})
    assert "has 0 of them" in problems(answer)[0]["message"]


def test_limits(nano: Loaded, film: Path, tmp_path: Path) -> None:
    with serving(nano.engine(), settings=limited(frames=5, pixels=320 * 240)) as client:
        with client.stream("POST", "/v1/follow", **form(film)) as answer:
            told = list(events(answer))
        assert [name for name, _ in told] == ["film", *["frame"] * 5, "end"]
        assert told[-1][1]["ended"] == "a server follows 5 frames at most"
        large = write(tmp_path / "large.mp4", 2, size=(640, 480))
        answer = client.post("/v1/follow", **form(large))
        assert answer.status_code == 422
        assert "640 x 480 pixels" in problems(answer)[0]["message"]


def readers() -> list[Reader]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is Reader]


def test_who_leaves_ends_it(nano: Loaded, tmp_path: Path) -> None:
    """Nothing is looked at any more, the film is let go, and the next one is answered."""
    engine = nano.engine()
    others = {id(reader) for reader in readers()}  # that another test's garbage holds
    long = write(tmp_path / "long.mp4", 400, size=(320, 240), options={"preset": "ultrafast"})
    with serving(engine) as client:
        with client.stream("POST", "/v1/follow", **form(long)) as answer:
            for name, _ in events(answer):
                if name == "frame":
                    break
        until(lambda: engine.waiting == 0, "its place is free")
        until(lambda: client.app.state.held.nbytes == 0, "its bytes are free")  # type: ignore[attr-defined]
        until(lambda: {id(reader) for reader in readers()} <= others, "it is closed")
        assert client.get("/ready").status_code == 200


def test_a_full_server_goes_on_when_there_is_room(nano: Loaded, film: Path) -> None:
    """With one place, two films take turns."""
    with serving(nano.engine(limited(queue=1)), settings=limited(queue=1)) as client:
        ends: list[dict[str, Any]] = []

        def one() -> None:
            parts = form(film, every=4)
            with (
                httpx.Client(base_url=client.base_url, timeout=PATIENCE) as other,
                other.stream("POST", "/v1/follow", **parts) as answer,
            ):
                ends.extend(value for name, value in events(answer) if name == "end")

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert [end["frames"] for end in ends] == [FRAMES // 4] * 2


# --- the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with driven() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, client: httpx.Client) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: m.type == "error" and faults.append(m.text))
    page.goto(str(client.base_url))
    yield page
    context.close()
    assert [fault for fault in faults if "status of 422" not in fault] == []


def say(page: Page, *words: str) -> None:
    for word in words:
        page.fill("#word", word)
        page.keyboard.press("Enter")


@pytest.mark.system
@needs_chromium
def test_a_film_is_dropped_played_and_saved(page: Page, film: Path, tmp_path: Path) -> None:
    page.set_input_files("#file", film)
    assert page.locator("#film").is_visible()
    assert not page.locator("#tools").is_visible()
    page.fill("#word", ", ".join(KINDS))
    page.click("#find")
    page.wait_for_function("() => /tracks? in 24 frames/.test($('status').textContent)")
    listed = page.locator("#tracks button").all_inner_texts()
    assert len(listed) >= 3
    assert all(text.startswith("#") for text in listed)
    page.locator("#tracks button").first.click()
    drawn = """() => {
      const c = $('film-canvas');
      if (!c.width) return 0;
      return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter(v => v).length;
    }"""
    page.wait_for_function(f"() => ({drawn})() > 1000")
    with page.expect_download() as download:
        page.click("#save-coco")
    saved = tmp_path / "tracks.json"
    download.value.save_as(saved)
    read = read_films(saved)
    assert len(read.films[1]) == FRAMES
    assert {seen.track for frame in read.films[1] for seen in frame} == set(
        range(1, len(listed) + 1)
    )
    document = json.loads(saved.read_text())
    for each in document["annotations"]:
        assert each["area"] == coco_mask.area(each["segmentation"])
    assert "/v1/follow" in page.inner_text("#code")
    page.click("text=Python")
    compile(page.inner_text("#code"), "program", "exec")


@pytest.mark.system
@needs_chromium
def test_to_stop_or_to_leave_ends_it(page: Page, client: httpx.Client, tmp_path: Path) -> None:
    (engine,) = client.app.state.models.all()  # type: ignore[attr-defined]
    long = write(tmp_path / "long.mp4", 400, size=(320, 240), pix_fmt="yuv420p")
    say(page, "circle")
    page.set_input_files("#file", long)
    page.wait_for_function("() => /^Frame \\d+ of about 400/.test($('status').textContent)")
    page.click("#stop")
    page.wait_for_function("() => /It was stopped/.test($('status').textContent)")
    until(lambda: engine.waiting == 0, "its place is free")
    page.click("#find")
    page.wait_for_function("() => /^Frame \\d+ of about 400/.test($('status').textContent)")
    page.goto("about:blank")
    until(lambda: client.app.state.held.nbytes == 0, "nothing is asked any more")  # type: ignore[attr-defined]


@pytest.mark.system
@needs_chromium
def test_what_the_browser_cannot_play_is_followed(page: Page, tmp_path: Path) -> None:
    """And an image after a film is an image again."""
    odd = write(tmp_path / "odd.avi", 6, size=(64, 48), codec="mjpeg", pix_fmt="yuvj420p")
    say(page, "circle")
    page.set_input_files("#file", odd)
    page.wait_for_function("() => /tracks? in 6 frames/.test($('status').textContent)")
    page.wait_for_selector("#film-unplayed:not([hidden])")
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 48), "red").save(image)
    page.set_input_files("#file", image)
    page.wait_for_function("() => /Nothing above|found above/.test($('status').textContent)")
    assert page.locator("#film").is_hidden()
    assert page.locator("#tools").is_visible()
    text = tmp_path / "text.mp4"
    text.write_text("no film")
    page.set_input_files("#file", text)
    page.wait_for_selector("#problem:not([hidden])")
    assert "cannot be read as a film" in page.inner_text("#problem")
