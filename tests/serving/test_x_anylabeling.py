"""X-AnyLabeling's remote protocol on a real server with nano."""

from __future__ import annotations

import base64
import json
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from app.datasets.rle import decode
from app.inference.detections import Detections
from app.serving.protocols.x_anylabeling import Params, _answer
from tests.serving.servers import Loaded, drawn, opened, scene, serving

ROOT = "/x-anylabeling/v1"


def found_by(nano: Loaded, *words: str, **options: Any) -> Detections:
    return nano.finder.predict(opened(scene()), words, **options)


def ask(client: httpx.Client, data: bytes = b"", **params: Any) -> dict[str, Any]:
    """The data of an answer to what the program sends."""
    url = f"data:image/png;base64,{base64.b64encode(data or scene()).decode()}"
    request = {"model": "nano", "image": url, "params": params}
    answer = client.post(f"{ROOT}/predict", json=request, headers={"Token": ""})
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"] is True
    return answer.json()["data"]


def filled(shapes: list[dict[str, Any]], found: Detections) -> np.ndarray:
    """The pixels that polygons cover, by OpenCV, which knows corners of pixels as their middles."""
    canvas = np.zeros((found.height, found.width), np.uint8)
    for shape in shapes:
        corners = np.array(shape["points"]) * 16 - 8
        cv2.fillPoly(canvas, [corners.round().astype(np.int32)], 1, shift=4)
    return canvas.astype(bool)


def test_models_are_listed_with_controls(nano: Loaded) -> None:
    with serving(nano.engine(), nano.engine(version="2")) as client:
        answer = client.get(f"{ROOT}/models").json()
        assert answer["success"] is True
        assert list(answer["data"]) == ["nano", "nano:2"]
        model = answer["data"]["nano"]
        widgets = {widget["name"]: widget["value"] for widget in model["widgets"]}
        assert {"edit_text", "button_send", "add_pos_rect", "add_neg_rect"} <= widgets.keys()
        assert widgets["edit_conf"] == nano.finder.threshold
        assert not {"add_point", "button_add_point"} & widgets.keys()
        assert model["classes"] == list(nano.finder.prompts)
        assert model["batch_processing_mode"] == "default"
        info = client.get(f"{ROOT}/models/nano:2/info").json()["data"]
        assert (info["model_id"], info["display_name"]) == ("nano:2", "nano 2")
        untuned = nano.engine(prompts=())
    with serving(untuned) as client:
        model = client.get(f"{ROOT}/models").json()["data"]["nano"]
        assert model["batch_processing_mode"] == "text_prompt"


def test_words_find_what_the_predictor_finds(client: httpx.Client, nano: Loaded) -> None:
    expected = found_by(nano, "circle", "cross", threshold=0.3)
    for text in ("circle.cross", "circle, cross", " circle . cross ."):
        data = ask(client, text_prompt=text, conf_threshold=0.3, iou_threshold=0.0)
        labels = [expected.prompts[prompt] for prompt in expected.prompt_ids]
        whole = {(shape["label"], shape["score"]) for shape in data["shapes"]}
        assert whole == set(zip(labels, expected.scores.tolist(), strict=True))
        assert data["description"] == ""
        assert "replace" not in data
    assert len(expected) > 3


def test_polygons_cover_the_masks(client: httpx.Client, nano: Loaded) -> None:
    expected = found_by(nano, "circle")
    assert expected.masks
    shapes = ask(client, text_prompt="circle")["shapes"]
    for score, mask in zip(expected.scores.tolist(), expected.masks, strict=True):
        parts = [shape for shape in shapes if shape["score"] == score]
        assert {shape["shape_type"] for shape in parts} == {"polygon"}
        assert len({shape["group_id"] for shape in parts}) == 1
        assert (parts[0]["group_id"] is None) == (len(parts) == 1)
        inside, seen = decode(mask), filled(parts, expected)
        assert (inside & seen).sum() / (inside | seen).sum() > 0.9
    coarse = ask(client, text_prompt="circle", epsilon_factor=0.01)["shapes"]
    corners = [sum(len(shape["points"]) for shape in each) for each in (shapes, coarse)]
    assert corners[1] < corners[0] / 2


def test_without_words_the_classes_are_found(client: httpx.Client, nano: Loaded) -> None:
    expected = nano.finder.predict(opened(scene()))
    shapes = ask(client)["shapes"]
    assert {shape["score"] for shape in shapes} == set(expected.scores.tolist())
    some = ask(client, filter_classes=[0])["shapes"]
    named = ask(client, filter_classes=[nano.finder.prompts[0]])["shapes"]
    assert some == named
    assert {shape["label"] for shape in some} <= {nano.finder.prompts[0]}


def test_rectangles_are_examples(client: httpx.Client, nano: Loaded) -> None:
    """Drawn in any direction; what is found is to be named, and joins what is there."""
    x1, y1, x2, y2 = found_by(nano, "circle").boxes_xyxy[0].tolist()
    expected = found_by(nano, boxes_xywh=[[x1, y1, x2 - x1, y2 - y1]], threshold=0.01)
    for corners in ([x1, y1, x2, y2], [x2, y2, x1, y1]):
        marks = [{"type": "rectangle", "label": 1, "data": corners}]
        data = ask(client, marks=marks, conf_threshold=0.01)
        assert {shape["score"] for shape in data["shapes"]} == set(expected.scores.tolist())
        assert {shape["label"] for shape in data["shapes"]} == {"AUTOLABEL_OBJECT"}
        assert data["replace"] is False
    marks.append({"type": "rectangle", "label": 0, "data": [1, 1, 20, 20]})
    assert ask(client, marks=marks, text_prompt="circle")["shapes"][0]["label"] == "circle"


def test_overlaps_go_where_it_is_asked(client: httpx.Client, nano: Loaded) -> None:
    twice = {"text_prompt": "circle.red thing.thing", "conf_threshold": 0.1}
    count = [
        len({s["score"] for s in ask(client, **twice, iou_threshold=iou)["shapes"]})
        for iou in (0, 0.3)
    ]
    expected = found_by(nano, "circle", "red thing", "thing", threshold=0.1, nms=0.3)
    assert count[1] == len(expected) < count[0]


def test_weights_without_masks_answer_boxes(client: httpx.Client, nano: Loaded) -> None:
    found = found_by(nano, "circle")
    bare = Detections(
        *(found.boxes_xyxy, found.scores, found.prompt_ids, found.prompts, None),
        *(found.width, found.height),
    )
    shapes = json.loads(_answer(bare, Params()))["data"]["shapes"]
    assert {shape["shape_type"] for shape in shapes} == {"rectangle"}
    corners = np.array([shape["points"] for shape in shapes])
    assert np.array_equal(corners[:, 0], found.boxes_xyxy[:, :2])
    assert np.array_equal(corners[:, 2], found.boxes_xyxy[:, 2:])


@pytest.mark.parametrize(
    ("change", "status", "code", "words"),
    [
        ({"model": "other"}, 404, "MODEL_NOT_FOUND", "there is nano"),
        ({"image": "data:image/png;base64,!"}, 422, "INVALID_IMAGE", "no base64"),
        ({"image": "QUJD"}, 422, "INVALID_IMAGE", "cannot be read"),
        ({"params": {"conf_threshold": 7}}, 422, "INFERENCE_ERROR", "conf_threshold"),
        (
            {"params": {"marks": [{"type": "point", "label": 1, "data": [3, 4]}]}},
            *(422, "INFERENCE_ERROR", "draw rectangles"),
        ),
        (
            {"params": {"marks": [{"type": "rectangle", "label": 0, "data": [3, 4, 9, 9]}]}},
            *(422, "INFERENCE_ERROR", "add a rectangle"),
        ),
        (
            {"params": {"marks": [{"type": "rectangle", "label": 1, "data": [900, 9, 990, 20]}]}},
            *(422, "INFERENCE_ERROR", "nothing of"),
        ),
        ({"params": {"text_prompt": "!?"}}, 422, "INFERENCE_ERROR", "no words"),
        ({"params": {"text_prompt": "a." * 201}}, 422, "INFERENCE_ERROR", "at most 200"),
    ],
)
def test_errors_are_in_its_form(
    client: httpx.Client, change: dict[str, Any], status: int, code: str, words: str
) -> None:
    request = {"model": "nano", "image": base64.b64encode(drawn(1)).decode(), **change}
    answer = client.post(f"{ROOT}/predict", json=request)
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["success"] is False
    assert body["error"]["code"] == code
    assert words in body["error"]["message"]
