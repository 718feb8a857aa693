"""Label Studio's ML backend on a real server with nano; images come from a server on loopback."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.datasets.build import load_splits
from app.datasets.editing import LabelFile
from app.datasets.formats.embedded import brush_mask
from app.datasets.rle import decode
from app.serving.rounds import Ring
from app.serving.settings import Limits, Settings
from tests.helpers import until
from tests.label_studio import TOKEN
from tests.label_studio import label_studio as real_label_studio
from tests.loopback import Quiet, serve
from tests.serving.servers import SCENE, Loaded, opened, scene, serving

ROOT = "/label-studio"
CONFIG = """<View><Image name="photo" value="$picture"/>
  <{tag} name="labels" toName="photo">
    <Label value="Ring" predicted_values="circle, ring"/><Label value="cross"/>
  </{tag}><TextArea name="prompt" toName="photo"/></View>"""


def config(tag: str = "BrushLabels") -> str:
    return CONFIG.format(tag=tag)


def inline(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ask(client: httpx.Client, tag: str = "BrushLabels", *drawn: dict, data: bytes = b"") -> Any:
    """The regions of a task, as Label Studio asks for them."""
    request: dict[str, Any] = {
        "tasks": [{"id": 7, "data": {"picture": inline(data or scene())}, "annotations": []}],
        "label_config": config(tag),
        "project": "3.1700000000",
        "params": {"login": None, "password": None},
    }
    if drawn:
        request["params"]["context"] = {"result": list(drawn)}
    answer = client.post(f"{ROOT}/predict", json=request)
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    assert result["model_version"] == "nano-1"
    return result


def test_it_is_up(client: httpx.Client) -> None:
    assert client.get(f"{ROOT}/health").json() == {
        "status": "UP",
        "model_class": "SAM 3 fine-tuning",
    }
    setup = {"project": "3.17", "schema": config(), "extra_params": None}
    answer = client.post(f"{ROOT}/setup", json=setup)
    assert answer.json() == {"model_version": "nano-1"}
    assert client.get(f"{ROOT}/versions").json() == {"versions": ["nano-1"]}
    event = {"action": "ANNOTATION_CREATED", "project": {"id": 3}}
    for _ in range(2):  # webhooks come twice at times
        answer = client.post(f"{ROOT}/webhook", json=event)
        assert (answer.status_code, answer.json()) == (201, {"status": "noted"})


def test_webhooks_begin_a_round(nano: Loaded, tmp_path: Path) -> None:
    """A process of its own, which ends at its settings here; foreign events begin none."""
    (tmp_path / "ring.yaml").write_text("every: many\n")
    settings = Settings(
        label=LabelFile(tmp_path), ring=Ring(tmp_path / "ring.yaml", every=3, project=3)
    )
    with serving(nano.engine(), settings=settings) as client:

        def hear(action: str, project: object = 3, **more: object) -> str:
            event = {"action": action, "project": {"id": project, "title": "shapes"}, **more}
            answer = client.post(f"{ROOT}/webhook", json=event)
            assert answer.status_code == 201, answer.text
            return answer.json()["status"]

        def ended() -> bool:
            return not client.get("/label/round").json()["running"]

        for _ in range(4):
            assert hear("ANNOTATION_CREATED", project=4) == "noted"
            assert hear("ANNOTATION_UPDATED") == "noted"
            assert hear("ANNOTATIONS_DELETED", annotations=[{"id": 1}]) == "noted"
        for broken in (b"", b"{", b"[]", b'{"action": 3}', b'{"project": {"id": "x"}}'):
            assert client.post(f"{ROOT}/webhook", content=broken).status_code == 422
        told = [hear("ANNOTATION_CREATED") for _ in range(3)]
        assert told == ["noted", "noted", "a round runs"]
        assert client.get("/label/round").json()["running"]
        assert hear("START_TRAINING") == "a round runs"  # the same one
        until(ended, "the round has ended")
        state = client.get("/label/round").json()
        assert state["code"] == 2
        assert "every: " in " ".join(state["lines"])
        assert hear("ANNOTATION_CREATED") == "noted"  # counted anew
        assert client.post("/label/round").status_code == 202
        assert client.get("/label/round").json()["running"]
    # The server has ended, and its round with it.


def test_labels_are_asked_for_and_regions_are_what_is_found(
    client: httpx.Client, nano: Loaded
) -> None:
    found = nano.finder.predict(opened(scene()), ["circle", "ring", "cross"])
    assert len(found) >= 2
    names = {"circle": "Ring", "ring": "Ring", "cross": "cross"}
    expected = [names[found.prompts[prompt]] for prompt in found.prompt_ids]
    result = ask(client)
    assert result["score"] == pytest.approx(found.scores.mean())
    for region, label, mask, score in zip(
        result["result"], expected, found.masks, found.scores, strict=True
    ):
        assert region["value"]["brushlabels"] == [label]
        assert region["score"] == pytest.approx(score)
        assert (region["from_name"], region["to_name"]) == ("labels", "photo")
        assert (region["original_width"], region["original_height"]) == (found.width, found.height)
        pixels = brush_mask(region["value"]["rle"], found.width, found.height)
        assert np.array_equal(pixels, decode(mask))
    boxes = ask(client, "RectangleLabels")["result"]
    for region, mask in zip(boxes, found.masks, strict=True):
        rows, columns = np.nonzero(decode(mask))
        value = region["value"]
        left, top = value["x"] * found.width / 100, value["y"] * found.height / 100
        assert (left, top) == pytest.approx((columns.min(), rows.min()))
        right = left + value["width"] * found.width / 100
        assert right == pytest.approx(columns.max() + 1)
    polygons = ask(client, "PolygonLabels")["result"]
    assert all(len(region["value"]["points"]) > 3 for region in polygons)


def test_our_reader_reads_what_a_person_accepts(client: httpx.Client, tmp_path: Path) -> None:
    result = ask(client)["result"]
    (tmp_path / "scene.png").write_bytes(SCENE.read_bytes())
    tasks = [{"data": {"picture": "scene.png"}, "annotations": [{"result": result}]}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    train = load_splits(tmp_path).train
    assert sorted(train.class_names) == sorted({r["value"]["brushlabels"][0] for r in result})
    assert len(train.annotations) == len(result)


def _rectangle(x: float, y: float, side: float, **more: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": side, "height": side, "rectanglelabels": ["Ring"]}
    return {"type": "rectanglelabels", "value": value, **more}


def _click(x: float, y: float, is_positive: bool = True) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": 0.3, "keypointlabels": ["Ring"]}
    return {"type": "keypointlabels", "value": value, "is_positive": is_positive}


def test_a_rectangle_is_an_example(client: httpx.Client, nano: Loaded) -> None:
    image = opened(scene())
    box = (0.2 * image.width, 0.1 * image.height, 0.2 * image.width, 0.2 * image.height)
    found = nano.finder.predict(image, boxes_xywh=[box])
    result = ask(client, "BrushLabels", _rectangle(20, 10, 20))["result"]
    assert [r["score"] for r in result] == pytest.approx(found.scores.tolist())
    assert all(r["value"]["brushlabels"] == ["Ring"] for r in result)


def test_a_click_chooses_what_it_lies_on(client: httpx.Client, nano: Loaded) -> None:
    found = nano.finder.predict(opened(scene()), ["circle"], threshold=0.05)
    masks = [decode(mask) for mask in found.masks]
    rows, columns = np.nonzero(masks[0])
    middle = len(rows) // 2
    x, y = 100 * (columns[middle] + 0.5) / found.width, 100 * (rows[middle] + 0.5) / found.height
    (region,) = ask(client, "BrushLabels", _click(x, y))["result"]
    assert region["score"] == pytest.approx(
        max(float(s) for s, mask in zip(found.scores, masks, strict=True)
            if mask[rows[middle], columns[middle]])
    )  # fmt: skip
    assert ask(client, "BrushLabels", _click(x, y), _click(x, y, False))["result"] == []


def test_a_text_is_asked_for(client: httpx.Client, nano: Loaded) -> None:
    found = nano.finder.predict(opened(scene()), ["red thing"])
    text = {"type": "textarea", "value": {"text": ["red thing"]}}
    result = ask(client, "BrushLabels", text)["result"]
    assert [r["score"] for r in result] == pytest.approx(found.scores.tolist())
    assert all(r["value"]["brushlabels"] == ["Ring"] for r in result)  # the first of the project's


def test_turned_images_have_their_upright_size(client: httpx.Client, nano: Loaded) -> None:
    """A rectangle in percent of what the user sees."""
    buffer, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    opened(scene()).rotate(90, expand=True).save(buffer, "PNG", exif=turned)
    found = ask(client, "BrushLabels", _rectangle(20, 10, 20), data=buffer.getvalue())["result"]
    expected = ask(client, "BrushLabels", _rectangle(20, 10, 20))["result"]
    assert [r["score"] for r in found] == pytest.approx([r["score"] for r in expected], abs=1e-4)


@contextlib.contextmanager
def label_studio(token: str) -> Iterator[tuple[str, list[str]]]:
    """A server that answers as Label Studio does; yields its address and what was asked."""
    asked: list[str] = []

    class Handler(Quiet):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            asked.append(self.path)
            known = self.path == "/api/token/refresh" and body == {"refresh": "a.b.c"}
            self._answer(200 if known else 401, json.dumps({"access": "fresh"}).encode())

        def do_GET(self) -> None:
            asked.append(self.path)
            if self.headers.get("Authorization") != token:
                self._answer(401, b"")
            elif self.path == "/data/upload/1/large.png":
                self._answer(200, b"\0" * (3 << 20))
            elif self.path == "/data/upload/1/away.png":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()
            elif self.path.startswith(("/data/upload/1/a.png", "/data/local-files/?d=a.png")):
                self._answer(200, scene())
            else:
                self._answer(404, b"")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serve(Handler) as address:
        yield address, asked


@pytest.mark.parametrize(("key", "token"), [("old", "Token old"), ("a.b.c", "Bearer fresh")])
def test_images_are_fetched_with_the_token(nano: Loaded, key: str, token: str) -> None:
    limits = Limits(body_bytes=2 << 20)
    with label_studio(token) as (home, asked):
        settings = Settings(label_studio=home, label_studio_key=key, limits=limits)
        with serving(nano.engine(settings), settings=settings) as client:

            def status(name: str) -> tuple[int, str]:
                tasks = [{"data": {"picture": name}}]
                request = {"tasks": tasks, "label_config": config()}
                answer = client.post(f"{ROOT}/predict", json=request)
                return answer.status_code, answer.text

            for name in (
                "/data/upload/1/a.png",
                "/data/local-files/?d=a.png",
                f"{home}/data/upload/1/a.png",
            ):
                assert status(name)[0] == 200, status(name)
            for name, problem in {
                "/data/upload/1/none.png": "Label Studio answers 404",
                "/data/upload/1/large.png": "is larger than 2 MB",
                "/data/upload/1/away.png": "Label Studio answers 302",
                "http://127.0.0.1:9/a.png": "names an image at 127.0.0.1:9",
                "file:///etc/passwd": "names an image at ",
                "//127.0.0.1:9/a.png": "Label Studio answers 404",
            }.items():
                code, text = status(name)
                assert code == 422
                assert problem in text, (name, text)
        assert ("/api/token/refresh" in asked) == ("." in key)


def test_what_cannot_be_answered_is_told(client: httpx.Client, nano: Loaded) -> None:
    task = {"data": {"picture": inline(scene())}}
    for body, problem in [
        ({"tasks": [task], "label_config": "<View>"}, "is no labelling interface"),
        ({"tasks": [task], "label_config": "<View/>"}, "has no labels of an image"),
        ({"tasks": [task], "label_config": '<!DOCTYPE a [<!ENTITY b "c">]><View/>'}, "interface"),
        ({"tasks": [{"data": {}}], "label_config": config()}, "LABEL_STUDIO_URL"),
        ({"tasks": [{"data": {"picture": "data:x,!"}}], "label_config": config()}, "no base64"),
        ({"tasks": "none", "label_config": config()}, "tasks"),
        ({"tasks": [task] * 65, "label_config": config()}, "tasks"),
    ]:
        answer = client.post(f"{ROOT}/predict", json=body)
        assert answer.status_code == 422, answer.text
        assert problem in answer.json()["detail"]
    refused = client.post(f"{ROOT}/setup", json={"schema": "<View/>"})
    assert refused.status_code == 422
    with serving(nano.engine(masks=False)) as boxes:
        only = boxes.post(f"{ROOT}/setup", json={"schema": config("BrushLabels")})
        assert "add one of RectangleLabels" in only.json()["detail"]


def test_the_key_is_the_password(nano: Loaded) -> None:
    settings = Settings(key="secret")
    with serving(nano.engine(settings), settings=settings) as client:
        assert client.get(f"{ROOT}/health").status_code == 401
        for name in ("", "anyone"):
            assert client.get(f"{ROOT}/health", auth=(name, "secret")).status_code == 200
        assert client.get(f"{ROOT}/health", auth=("secret", "")).status_code == 401
        broken = {"Authorization": "Basic ???"}
        assert client.get(f"{ROOT}/health", headers=broken).status_code == 401


# --- the program itself --------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Iterator[httpx.Client]:
    with real_label_studio(tmp_path) as client:
        yield client


@pytest.mark.system
def test_the_program_pre_labels_and_its_export_is_read(
    program: httpx.Client, nano: Loaded, tmp_path: Path
) -> None:
    home = str(program.base_url).rstrip("/")
    settings = Settings(label_studio=home, label_studio_key=TOKEN)
    with serving(nano.engine(settings), settings=settings) as server:
        interface = config().replace("$picture", "$image")
        made = program.post("/api/projects", json={"title": "shapes", "label_config": interface})
        project = made.json()["id"]
        ranked = [  # as rank writes them
            {
                "data": {"image": "/data/local-files/?d=a.png", "rank": 1, "reason": "margin"},
                "predictions": [{"model_version": "nano", "score": score, "result": []}],
            }
            for score in (0.7, 0.2)
        ]
        program.post(f"/api/projects/{project}/import", json=ranked).raise_for_status()
        listed = program.get(f"/api/tasks?project={project}&fields=all").json()["tasks"]
        assert sorted(task["predictions_score"] for task in listed) == [0.2, 0.7]
        for task in listed:
            program.delete(f"/api/tasks/{task['id']}").raise_for_status()
        with SCENE.open("rb") as image:
            upload = {"file": ("scene.png", image, "image/png")}
            program.post(f"/api/projects/{project}/import", files=upload).raise_for_status()
        backend = {
            "url": f"{str(server.base_url).rstrip('/')}{ROOT}",
            "project": project,
            "title": "nano",
            "is_interactive": True,
        }
        connected = program.post("/api/ml", json=backend).json()
        assert connected.get("readable_state") == "Connected", (connected, made.text)
        assert connected["model_version"] == "nano-1"
        action = {"selectedItems": {"all": True, "excluded": []}, "project": project}
        done = program.post(
            f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}", json=action
        )
        assert done.json()["detail"] == "Retrieved 1 predictions"
        (task,) = program.get(f"/api/tasks?project={project}").json()["tasks"]
        (prediction,) = program.get(f"/api/predictions?task={task['id']}").json()
        expected = ask(server)["result"]
        assert prediction["result"] == expected
        place = f"/api/ml/{connected['id']}/interactive-annotating"
        context = {"task": task["id"], "context": {"result": [_rectangle(20, 10, 20)]}}
        answer = program.post(place, json=context).json()
        drawn = ask(server, "BrushLabels", _rectangle(20, 10, 20))["result"]
        assert answer["data"]["result"] == drawn
        accepted = {"result": prediction["result"]}
        program.post(f"/api/tasks/{task['id']}/annotations", json=accepted).raise_for_status()
    export = program.get(f"/api/projects/{project}/export?exportType=JSON")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "tasks.json").write_text(export.text)
    shutil.copy(SCENE, tmp_path / "set")
    train = load_splits(tmp_path / "set").train
    assert len(train.annotations) == len(expected)
    masks = [brush_mask(r["value"]["rle"], *opened(scene()).size) for r in expected]
    for annotation, mask in zip(train.annotations, masks, strict=True):
        assert annotation.segmentation is not None
        assert np.array_equal(decode(annotation.segmentation), mask)
