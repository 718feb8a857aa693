"""Against a real server on loopback, that answers as Roboflow's documentation says."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.datasets import roboflow, sources
from app.datasets.build import load_splits
from app.datasets.roboflow import fetch
from app.errors import UserError
from tests.datasets.exports import coco_export
from tests.helpers import TINY, Command
from tests.loopback import Quiet, serve

KEY = "rfSecretKey0123456789"
VERSION = "my-team/potholes_x/3"
LINK_KEY = "linkSecret987"


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0


@dataclass
class Fake:
    """The server's answers by path, each used up but the last; and what was asked of it."""

    url: str
    answers: dict[str, list[Answer]]
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, Authorization

    def answer(self, path: str, *answers: Answer) -> None:
        self.answers[path] = list(answers)


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode())


def about(kind: str = "instance-segmentation", generating: bool = False) -> Answer:
    version = {"id": VERSION, "generating": generating, "progress": 1, "exports": []}
    return as_json({"project": {"id": "potholes_x", "type": kind}, "version": version})


def link(url: str) -> Answer:
    return as_json({"progress": 1, "export": {"format": "coco", "link": url}})


@pytest.fixture
def fake() -> Iterator[Fake]:
    class Handler(Quiet):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            server.asked.append((self.path, self.headers["Authorization"]))
            answers = server.answers.get(path, [Answer(404)])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer.wait:
                stop.wait(answer.wait)
            self.send_response(answer.status)
            for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

    stop = threading.Event()
    with serve(Handler) as address:
        server = Fake(address, {})
        server.answer(f"/{VERSION}", about())
        server.answer(f"/{VERSION}/coco-segmentation", link(f"{server.url}/ds/1?key={LINK_KEY}"))
        server.answer("/ds/1", Answer(302, headers={"Location": f"/zip?signed={LINK_KEY}"}))
        server.answer("/zip", Answer(body=coco_export(masks=True)))
        yield server
        stop.set()


@pytest.fixture(autouse=True)
def environment(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ROBOFLOW_API_URL", fake.url)
    monkeypatch.setenv("ROBOFLOW_API_KEY", KEY)
    monkeypatch.setattr(roboflow, "POLL_SECONDS", 0.01)
    caplog.set_level(logging.DEBUG)


Fails = Callable[..., str]


@pytest.fixture
def fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Fails:
    """What is said of a fetch that fails; no secret is in it, in a log or on disk, no file left."""

    def run(version: str = VERSION) -> str:
        with pytest.raises(UserError) as caught:
            fetch(version, tmp_path / "data")
        said = str(caught.value)
        check_secrets(said + repr(caught.value) + caplog.text + "".join(capfd.readouterr()))
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        assert said.startswith(f"--roboflow {version}: ")
        return said

    return run


def check_secrets(text: str, folder: Path | None = None) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()] if folder else []
    for secret in (KEY, LINK_KEY):
        assert secret not in text
        assert not any(secret.encode() in path.read_bytes() for path in files)
        assert not any(secret in str(path) for path in files)


def test_an_export_is_downloaded_once_and_read(fake, tmp_path, caplog, capfd):
    folder = fetch(VERSION, tmp_path)
    assert folder == tmp_path / "roboflow" / VERSION
    splits = load_splits(folder)
    assert (len(splits.train.images), len(splits.valid.images)) == (2, 1)
    assert splits.train.class_names == ["pothole"]
    assert all(a.segmentation for a in splits.train.annotations)
    assert [path.name for path in folder.parent.iterdir()] == ["3"]
    check_secrets(caplog.text + "".join(capfd.readouterr()), tmp_path)
    asked = len(fake.asked)
    assert fetch(VERSION, tmp_path) == folder
    assert len(fake.asked) == asked


def test_the_key_goes_to_the_api_in_a_header_and_nowhere_else(fake, tmp_path):
    fetch(VERSION, tmp_path)
    assert not any(KEY in path for path, _ in fake.asked)
    sent = {path.partition("?")[0]: header for path, header in fake.asked}
    assert sent == {
        f"/{VERSION}": f"Bearer {KEY}",
        f"/{VERSION}/coco-segmentation": f"Bearer {KEY}",
        "/ds/1": None,
        "/zip": None,
    }


def test_what_is_still_made_is_waited_for(fake, tmp_path):
    fake.answer(f"/{VERSION}", about("object-detection", True), about("object-detection"))
    progress = [as_json({"progress": part}, 202) for part in (0, 0.5)]
    fake.answer(f"/{VERSION}/coco", *progress, link(f"{fake.url}/zip"))
    fake.answer("/zip", Answer(body=coco_export(masks=False)))
    splits = load_splits(fetch(VERSION, tmp_path))
    assert [a.segmentation for a in splits.train.annotations] == [None, None]
    assert len(fake.asked) == 6


def test_patience_ends(fake, fails, monkeypatch):
    monkeypatch.setattr(roboflow, "EXPORT_SECONDS", 0.05)
    fake.answer(f"/{VERSION}/coco-segmentation", as_json({"progress": 0.1}, 202))
    assert "has not made the export within" in fails()


@pytest.mark.parametrize("name", ["a/b", "a/b/c", "a/b/3/4", "../b/3", "a b/c/3", "a/b/3?x=1", ""])
def test_names_of_no_version(fake, fails, name):
    assert "must be WORKSPACE/PROJECT/VERSION" in fails(name)
    assert not fake.asked


def test_no_key_and_no_possible_key(fake, fails, monkeypatch):
    monkeypatch.setenv("ROBOFLOW_API_KEY", f"{KEY}\n{KEY}")
    assert "holds signs that no key has" in fails()
    monkeypatch.setenv("ROBOFLOW_API_KEY", " ")
    assert "ROBOFLOW_API_KEY is not set: copy your key from https://" in fails()
    assert not fake.asked


def test_the_key_goes_to_no_unencrypted_api(fails, monkeypatch):
    monkeypatch.setenv("ROBOFLOW_API_URL", "http://api.roboflow.example")
    assert "must begin with https://" in fails()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "refuses the key in ROBOFLOW_API_KEY (401)"),
        (403, "refuses the key in ROBOFLOW_API_KEY (403)"),
        (404, "no such workspace, project or version"),
        (429, "too many requests"),
        (503, "Roboflow fails (503); run again later"),
        (400, "answers with status 400; export a zip"),
        (301, "answers with status 301"),
    ],
)
def test_refusals(fake, fails, status, said):
    # a server may repeat in its answer what it was sent
    answer = Answer(status, KEY.encode(), {"Location": f"http://example.com/?api_key={KEY}"})
    fake.answer(f"/{VERSION}", answer)
    assert said in fails()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(body=b"<html>" + KEY.encode()), "no JSON object"),
        (as_json([1]), "no JSON object"),
        (as_json({"version": 3}), "has no 'version.generating'"),
        (as_json({"version": {"generating": False}}), "has no 'project.type'"),
        (about("classification"), "is a project for 'classification': understood are instance-seg"),
    ],
)
def test_answers_that_are_not_understood(fake, fails, answer, said):
    fake.answer(f"/{VERSION}", answer)
    assert said in fails()


@pytest.mark.parametrize("answer", [{}, {"export": {}}, {"export": None}, {"progress": None}])
def test_an_answer_without_a_link(fake, fails, answer):
    fake.answer(f"/{VERSION}/coco-segmentation", as_json(answer))
    assert "Roboflow's answer has no '" in fails()


@pytest.mark.parametrize(
    "target", ["http://example.com/x", "ftp://127.0.0.1/x", "file:///etc/passwd", "x", ""]
)
def test_links_that_are_not_followed(fake, fails, target):
    fake.answer("/ds/1", Answer(302, headers={"Location": target}))
    if target not in ("x", ""):  # as a redirect, those stay where they are
        assert "leads off https" in fails()
    fake.answer(f"/{VERSION}/coco-segmentation", link(target))
    assert "leads off https" in fails()


def test_a_link_that_has_expired_and_one_that_leads_in_circles(fake, fails):
    fake.answer("/zip", Answer(403))
    assert "status 403; run again for a new one" in fails()
    fake.answer("/zip", Answer(302, headers={"Location": "/ds/1"}))
    assert "cannot be reached (TooManyRedirects)" in fails()


def test_a_download_that_is_cut_short(fake, fails):
    export = coco_export(masks=True)
    fake.answer("/zip", Answer(body=export[:-100], headers={"Content-Length": str(len(export))}))
    assert "the connection was cut before all had come" in fails()
    fake.answer("/zip", Answer(body=export[:-100]))
    assert "is no zip, or is cut short" in fails()


def test_a_download_that_is_too_large(fake, fails, monkeypatch):
    monkeypatch.setattr(roboflow, "MAX_DOWNLOAD_BYTES", 1000)
    assert "must be at most 1000" in fails()
    monkeypatch.undo()
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setenv("ROBOFLOW_API_URL", fake.url)
    monkeypatch.setenv("ROBOFLOW_API_KEY", KEY)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "must be at most 1000, by what is free on the disk" in fails()


def test_a_server_that_is_silent_and_one_that_is_not_there(fake, fails, monkeypatch):
    monkeypatch.setattr(roboflow, "SILENCE_SECONDS", 0.1)
    fake.answer(f"/{VERSION}", Answer(wait=5))
    assert "no answer within 0.1 seconds" in fails()
    monkeypatch.setenv("ROBOFLOW_API_URL", "http://127.0.0.1:9")
    assert "cannot be reached (ConnectError)" in fails()


def test_a_run_shows_and_leaves_no_key(
    fake, command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
):
    monkeypatch.setattr(sources.fetch, "__defaults__", (tmp_path / "data",))
    words = ["train", "--roboflow", VERSION, "--model", "nano", "--output-dir", tmp_path / "out"]
    export = fake.answers[f"/{VERSION}/coco-segmentation"]
    fake.answer(f"/{VERSION}/coco-segmentation", Answer(401, KEY.encode()))
    failed = command(*words, *TINY)
    assert failed.code == 2
    assert f"error: --roboflow {VERSION}: Roboflow refuses the key" in failed.err
    fake.answer(f"/{VERSION}/coco-segmentation", *export)
    done = command(*words, "--epochs", 1, "evaluation.pictures=1", *TINY)
    assert done.code == 0, done.err
    check_secrets(failed.out + failed.err + done.out + done.err + caplog.text, tmp_path)
    assert (tmp_path / "out" / "config_resolved.yaml").is_file()
