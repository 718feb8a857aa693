"""The Open Inference Protocol on a real server with nano, byte by byte and by tritonclient."""

from __future__ import annotations

import base64
import io
import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app import __version__
from app.datasets.rle import decode
from app.inference.detections import Detections
from tests.serving.servers import Loaded, drawn, opened, scene, serving

LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/nano/infer"


def found_by(nano: Loaded, data: bytes, *words: str, **options: Any) -> Detections:
    return nano.finder.predict(opened(data), words, **options)


def texts(name: str, *values: bytes | str) -> dict[str, Any]:
    """A BYTES tensor in JSON."""
    data = [v if isinstance(v, str) else base64.b64encode(v).decode() for v in values]
    return {"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data}


def packed(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def infer(client: httpx.Client, *inputs: dict[str, Any], **request: Any) -> dict[str, Any]:
    answer = client.post(INFER, json={"inputs": inputs, **request})
    assert answer.status_code == 200, answer.text
    return answer.json()


def columns(answer: dict[str, Any]) -> dict[str, Any]:
    """The tensors of an answer in JSON: name → elements, in their shape."""
    return {
        each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in answer["outputs"]
    }


def same(rows: dict[str, Any], index: int, found: Detections) -> None:
    """Assert that the rows of an image are exactly these detections."""
    of = rows["image"] == index
    assert rows["score"][of].astype(np.float32).tolist() == found.scores.tolist()
    words = [found.prompts[prompt] for prompt in found.prompt_ids]
    assert rows["prompt"][of].tolist() == words
    boxes = rows["box"][of].astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    assert np.allclose(boxes, found.boxes_xyxy, atol=1e-4)  # x + (x2 - x), rounded
    assert [json.loads(mask) for mask in rows["mask"][of]] == found.masks
    assert rows["size"][index].tolist() == [found.height, found.width]


def test_it_tells_what_it_is(client: httpx.Client) -> None:
    server = client.get("/v2").json()
    assert server["version"] == __version__
    assert server["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/nano/ready"):
        assert client.get(path).status_code == 200
    assert client.get("/v2/models/nano/versions/1/ready").json() == {"name": "nano", "ready": True}
    for path in ("/v2/models/nano", "/v2/models/nano/versions/1"):
        model = client.get(path).json()
        assert (model["name"], model["versions"]) == ("nano", ["1"])
        assert {each["name"] for each in model["inputs"]} >= {"image", "prompt"}
    for path in ("/v2/models/other", "/v2/models/nano/versions/7", "/v2/models/other/ready"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "nano" in answer.json()["error"]


def test_json_is_answered_as_the_predictor_answers(client: httpx.Client, nano: Loaded) -> None:
    images = texts("image", scene(), drawn(1))
    answer = infer(client, images, texts("prompt", "circle", "cross"), id="seven")
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("nano", "1", "seven")
    rows = columns(answer)
    for index, data in enumerate((scene(), drawn(1))):
        same(rows, index, found_by(nano, data, "circle", "cross"))
    assert len(rows["score"]) >= 2


def test_parameters_say_prompts_and_thresholds(client: httpx.Client, nano: Loaded) -> None:
    expected = found_by(nano, scene(), "circle", "red thing", threshold=0.2, max_detections=4)
    for prompts in ("circle, red thing", ["circle", "red thing"]):
        parameters = {"prompts": prompts, "threshold": 0.2, "max_detections": 4}
        same(columns(infer(client, texts("image", scene()), parameters=parameters)), 0, expected)
    assert len(expected) == 4
    same(columns(infer(client, texts("image", scene()))), 0, nano.finder.predict(opened(scene())))


def test_boxes_are_examples(client: httpx.Client, nano: Loaded) -> None:
    x1, y1, x2, y2 = found_by(nano, scene(), "circle").boxes_xyxy[0].tolist()
    box = [x1, y1, x2 - x1, y2 - y1]
    boxes = {"name": "boxes", "datatype": "FP64", "shape": [1, 4], "data": [box]}
    low = {"threshold": 0.01}
    rows = columns(infer(client, texts("image", scene()), boxes, parameters=low))
    same(rows, 0, found_by(nano, scene(), boxes_xywh=[box], threshold=0.01))
    assert len(rows["score"])
    no = {**boxes, "name": "negative_boxes"}
    rows = columns(infer(client, texts("image", scene()), texts("prompt", "circle"), no))
    same(rows, 0, found_by(nano, scene(), "circle", negative_boxes_xywh=[box]))


def test_binary_tensors_in_both_directions(client: httpx.Client, nano: Loaded) -> None:
    image, prompts = packed(scene()), packed(b"circle", b"cross")
    tensors = [("image", 1, image), ("prompt", 2, prompts)]
    inputs = [
        {
            **{"name": name, "datatype": "BYTES", "shape": [count]},
            "parameters": {"binary_data_size": len(data)},
        }
        for name, count, data in tensors
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    answer = client.post(INFER, content=head + image + prompts, headers={LENGTH: str(len(head))})
    assert answer.status_code == 200, answer.text
    size = int(answer.headers[LENGTH])
    outputs, rest = json.loads(answer.content[:size])["outputs"], answer.content[size:]
    types = {"INT32": "<i4", "FP32": "<f4"}
    rows: dict[str, Any] = {}
    for each in outputs:
        length = each["parameters"]["binary_data_size"]
        part, rest = rest[:length], rest[length:]
        assert "data" not in each
        if each["datatype"] == "BYTES":
            values = []
            while part:
                (count,) = struct.unpack("<I", part[:4])
                values.append(part[4 : 4 + count].decode())
                part = part[4 + count :]
            rows[each["name"]] = np.array(values)
        else:
            array = np.frombuffer(part, types[each["datatype"]])
            rows[each["name"]] = array.reshape(each["shape"])
        assert list(rows[each["name"]].shape) == each["shape"]
    assert rest == b""
    same(rows, 0, found_by(nano, scene(), "circle", "cross"))


def test_some_outputs_each_in_its_form(client: httpx.Client) -> None:
    outputs = [{"name": "score"}, {"name": "box", "parameters": {"binary_data": True}}]
    inputs = [texts("image", scene()), texts("prompt", "circle")]
    answer = client.post(INFER, json={"inputs": inputs, "outputs": outputs})
    size = int(answer.headers[LENGTH])
    score, box = json.loads(answer.content[:size])["outputs"]
    assert (score["name"], box["name"]) == ("score", "box")
    assert len(score["data"]) == score["shape"][0] == box["shape"][0]
    assert (
        len(answer.content) - size
        == box["parameters"]["binary_data_size"]
        == 16 * len(score["data"])
    )


def test_masks_in_other_forms(client: httpx.Client, nano: Loaded) -> None:
    ask = [texts("image", scene()), texts("prompt", "circle")]
    masks = found_by(nano, scene(), "circle").masks
    assert masks
    pngs = columns(infer(client, *ask, parameters={"format": "png"}))["mask"]
    for png, mask in zip(pngs, masks, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
        assert np.array_equal(picture, decode(mask))
    rings = columns(infer(client, *ask, parameters={"format": "polygon"}))["mask"]
    assert all(len(ring) >= 6 for each in rings for ring in json.loads(each))


def test_nothing_found_has_tensors_without_elements(client: httpx.Client) -> None:
    answer = infer(client, texts("image", drawn(1)), parameters={"threshold": 1})
    shapes = {each["name"]: each["shape"] for each in answer["outputs"]}
    assert shapes == {
        **{"image": [0], "prompt": [0], "score": [0], "box": [0, 4], "mask": [0], "size": [1, 2]}
    }


IMAGE = texts("image", drawn(1))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [texts("prompt", "a")]}, "no tensor 'image'"),
        ({"inputs": [IMAGE, IMAGE]}, "given twice"),
        ({"inputs": [texts("pixels", "a")]}, "there is image, prompt"),
        ({"inputs": [{**IMAGE, "datatype": "UINT8"}]}, "give BYTES"),
        ({"inputs": [{**IMAGE, "shape": [2]}]}, "1 elements"),
        ({"inputs": [{**IMAGE, "data": ["!"]}]}, "no base64"),
        ({"inputs": [{**IMAGE, "data": [3]}]}, "no text"),
        ({"inputs": [texts("image", b"no image")]}, "cannot be read as an image"),
        ({"inputs": [{**IMAGE, "parameters": {"binary_data_size": 9}}]}, "0 bytes are left"),
        ({"inputs": [{**IMAGE, "parameters": {"binary_data_size": "x"}}]}, "0 bytes are left"),
        ({"inputs": [IMAGE], "parameters": {"threshold": 2}}, "threshold"),
        ({"inputs": [IMAGE], "parameters": {"prompts": "!"}}, "no letter"),
        ({"inputs": [IMAGE], "parameters": {"format": "geojson"}}, "rle, polygon or png"),
        ({"inputs": [IMAGE], "outputs": [{"name": "masks"}]}, "there is image, prompt, score"),
        (
            {
                "inputs": [
                    IMAGE,
                    {"name": "boxes", "datatype": "FP32", "shape": [4], "data": ["a"] * 4},
                ]
            },
            "no number",
        ),
        (
            {
                "inputs": [
                    IMAGE,
                    {"name": "boxes", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]},
                ]
            },
            "(N, 4)",
        ),
    ],
)
def test_what_cannot_be_answered_is_named(
    client: httpx.Client, request_: dict[str, Any], words: str
) -> None:
    answer = client.post(INFER, json=request_)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", {}),
        (b"[]", {}),
        (b"{" * 100_000, {}),
        (b'{"inputs": [{"name": "image", "data": ' + b"[" * 5000 + b"]" * 5000 + b"}]}", {}),
        (b"{}", {LENGTH: "-1"}),
        (b"{}", {LENGTH: "9"}),
        (b"{}", {LENGTH: "9" * 5000}),
        (json.dumps({"inputs": [{**IMAGE, "shape": [2**31] * 8}]}).encode(), {}),
    ],
)
def test_bodies_that_cannot_be_read(
    client: httpx.Client, content: bytes, headers: dict[str, str]
) -> None:
    answer = client.post(INFER, content=content, headers=headers)
    assert answer.status_code in (400, 422, 431), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]


@pytest.mark.parametrize("data", [b"\1", b"\xff\xff\xff\xff", packed(b"abc")[:-1], b"\0\0\0\0\0"])
def test_cut_elements_are_refused(client: httpx.Client, data: bytes) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    tensor["parameters"] = {"binary_data_size": len(data)}  # type: ignore[assignment]
    head = json.dumps({"inputs": [tensor]}).encode()
    answer = client.post(INFER, content=head + data, headers={LENGTH: str(len(head))})
    assert answer.status_code == 400
    assert "cut short" in answer.json()["error"]


def test_packed_bodies_are_refused(client: httpx.Client) -> None:
    answer = client.post(INFER, content=b"x", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415


def test_versions_are_chosen_by_the_path(nano: Loaded) -> None:
    with serving(nano.engine(), nano.engine(version="2")) as client:
        assert client.get("/v2/models/nano").json()["versions"] == ["1", "2"]
        for path, version in (("", "1"), ("/versions/2", "2")):
            request = {"inputs": [texts("image", drawn(1))]}
            answer = client.post(f"/v2/models/nano{path}/infer", json=request)
            assert answer.json()["model_version"] == version
