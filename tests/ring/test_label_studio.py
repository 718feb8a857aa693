"""The ring with Label Studio: its export on loopback, and two rounds with the program itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from app.datasets.build import load_splits
from app.datasets.coco import Dataset
from app.datasets.editing import LabelFile
from app.datasets.synthetic.shapes import make_shapes
from app.errors import UserError
from app.inference.proposals import label_config, region
from app.ring import label_studio
from app.ring.rounds import rounds
from app.serving.rounds import Ring
from app.serving.settings import Settings
from tests.helpers import until
from tests.label_studio import TOKEN
from tests.label_studio import label_studio as real_label_studio
from tests.loopback import Quiet, serve
from tests.ring.test_ring import NANO, TRAINING
from tests.serving.servers import load_nano, serving

FIRST, EVERY = 6, 4  # images labelled at the beginning; more that begin a round


class Project(Quiet):
    """Answers the export of project 3 with what is in `body`."""

    body = b"[]"
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        found = self.path.startswith("/api/projects/3/export")
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.body)


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Project]]:
    handler = type("Asked", (Project,), {"asked": []})
    with serve(handler) as address:
        monkeypatch.setenv("LABEL_STUDIO_URL", f"{address}/")
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", "old")
        yield handler


def test_an_export_is_written_whole(project: type[Project], tmp_path: Path) -> None:
    label_studio.export(3, tmp_path)
    assert not list(tmp_path.iterdir())  # nothing is labelled yet
    project.body = b'[{"data": {"image": "a.png"}}]'
    label_studio.export(3, tmp_path)
    assert (tmp_path / label_studio.FILE).read_bytes() == project.body
    assert project.asked[0] == ("/api/projects/3/export?exportType=JSON", "Token old")


def test_what_is_no_export_leaves_the_last_one(
    project: type[Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / label_studio.FILE).write_text("the last one")
    for body in (b"<html>", b"{}", b"[[" * 100):
        project.body = body
        with pytest.raises(UserError, match="no list of tasks"):
            label_studio.export(3, tmp_path)
    with pytest.raises(UserError, match="is answered by 404"):
        label_studio.export(4, tmp_path)
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="does not answer"):
        label_studio.export(3, tmp_path)
    monkeypatch.delenv("LABEL_STUDIO_URL")
    with pytest.raises(UserError, match="LABEL_STUDIO_URL is not set"):
        label_studio.export(3, tmp_path)
    assert (tmp_path / label_studio.FILE).read_text() == "the last one"


@pytest.mark.system
def test_two_rounds_with_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scripted person annotates there; its webhooks begin the rounds, and AP rises."""
    drawn = {"kinds": ["star", "ring"], "label_by": "kind", "fog": 0, "width": 160, "height": 120}
    make_shapes(tmp_path / "drawn", train=20, valid=12, seed=8, **drawn)
    truth = load_splits(tmp_path / "drawn").train
    photos = tmp_path / "data" / "photos"
    photos.mkdir(parents=True)
    for image in truth.images:
        (photos / image.path.name).write_bytes(image.path.read_bytes())
    with real_label_studio(tmp_path) as program:
        home = str(program.base_url).rstrip("/")
        interface = label_config(["star", "ring"])
        made = program.post("/api/projects", json={"title": "new", "label_config": interface})
        number = made.json()["id"]
        for image in truth.images:
            with image.path.open("rb") as file:
                upload = {"file": (image.path.name, file, "image/png")}
                program.post(f"/api/projects/{number}/import", files=upload).raise_for_status()
        settings = {
            "labels": "data",
            "images": "data/photos",
            "validation": "drawn/valid",
            "folder": "ring",
            "champion": str(NANO),
            "every": EVERY,
            "top": EVERY,
            "classes": ["star", "ring"],
            "to": "label-studio",
            "train": TRAINING,
            "label_studio": number,
        }
        (tmp_path / "ring.yaml").write_text(yaml.safe_dump(settings))
        monkeypatch.setenv("LABEL_STUDIO_URL", home)
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN)
        ring = Ring(tmp_path / "ring.yaml", every=EVERY, project=number)
        options = Settings(
            ring=ring, label=LabelFile(photos), label_studio=home, label_studio_key=TOKEN
        )
        with serving(load_nano().engine(options), settings=options) as server:
            hook = {
                "url": f"{str(server.base_url).rstrip('/')}/label-studio/webhook",
                "project": number,
                "send_payload": True,
                "send_for_all_actions": True,
            }
            program.post("/api/webhooks", json=hook).raise_for_status()

            def rest(count: int) -> None:
                until(lambda: len(rounds(tmp_path / "ring")) == count, f"{count} rounds are done")
                until(lambda: not server.get("/label/round").json()["running"], "it has ended")
                assert server.get("/label/round").json()["code"] == 0

            annotate(program, number, truth, {image.path.name for image in truth.images[:FIRST]})
            rest(1)
            (first,) = rounds(tmp_path / "ring")
            assert EVERY <= first.images <= FIRST
            listed = (tmp_path / "ring" / "rounds" / "001" / "chosen.txt").read_text().split("\n")
            proposed = {Path(line).name for line in listed if line}
            tasks = json.loads((tmp_path / "ring/rounds/001/next/tasks.json").read_text())
            assert len(tasks) == len(proposed)
            annotate(program, number, truth, proposed)
            if len(rounds(tmp_path / "ring")) == 1 and first.images < FIRST:
                server.post("/label/round")
            rest(2)
    _, second = rounds(tmp_path / "ring")
    assert second.images == FIRST + len(proposed)
    assert second.review.images == len(proposed)
    assert second.after > first.before + 0.02


def annotate(program: httpx.Client, number: int, truth: Dataset, names: set[str]) -> None:
    """Label tasks by their images' names, by brush, as a person does."""
    classes = {category.id: category.name for category in truth.categories}
    listed = program.get("/api/tasks", params={"project": number, "page_size": 100}).json()
    for task in listed["tasks"]:
        name = task["data"]["image"].rpartition("/")[2].partition("-")[2]
        if name not in names:
            continue
        (image,) = (each for each in truth.images if each.path.name == name)
        result = [
            region(each, classes[each.category_id], image.width, image.height)
            for each in truth.annotations_by_image[image.id]
        ]
        answer = program.post(f"/api/tasks/{task['id']}/annotations", json={"result": result})
        answer.raise_for_status()
