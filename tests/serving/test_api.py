"""The API on a real server with nano: its answers are those of `Predictor.predict`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from typing import Any

import httpx
import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from app.datasets.rle import decode
from app.inference import Detections
from app.inference.outputs import feature_collection
from tests.helpers import REPOSITORY
from tests.serving.servers import Loaded, drawn, files, limited, opened, problems, scene, serving

WORDS = ["circle", "red thing", "cross"]


def found_by(nano: Loaded, data: bytes, *words: str, **options: Any) -> Detections:
    return nano.finder.predict(opened(data), words, **options)


def same(answer: dict[str, Any], found: Detections) -> None:
    """Assert that an answer in RLE holds exactly these detections."""
    assert (answer["width"], answer["height"]) == (found.width, found.height)
    assert answer["best_score"] == found.best_score
    assert [each["score"] for each in answer["detections"]] == found.scores.tolist()
    assert [each["mask"] for each in answer["detections"]] == found.masks
    words = [found.prompts[index] for index in found.prompt_ids]
    assert [each["prompt"] for each in answer["detections"]] == words
    boxes = np.array([each["box"] for each in answer["detections"]]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    assert np.array_equal(boxes.astype(np.float32), found.boxes_xyxy)


def ask(client: httpx.Client, data: bytes, **request: Any) -> dict[str, Any]:
    """The result of one image, asked for in JSON."""
    image = {"data": base64.b64encode(data).decode()}
    answer = client.post("/v1/predict", json={"images": [image], **request})
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    return result


def test_the_short_form_answers_what_the_predictor_finds(
    client: httpx.Client, nano: Loaded
) -> None:
    data = {"prompt": WORDS, "threshold": "0.3"}
    answer = client.post("/v1/predict", files=files(scene(), drawn(1)), data=data)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == {"name": "nano", "version": "1", "alias": None}
    results = answer.json()["results"]
    assert [result["name"] for result in results] == ["0.png", "1.png"]
    for result, image in zip(results, (scene(), drawn(1)), strict=True):
        same(result, found_by(nano, image, *WORDS, threshold=0.3))
    assert len(results[0]["detections"]) > 3


def test_json_and_a_form_with_a_request_answer_the_same(client: httpx.Client) -> None:
    question = {"prompts": [{"text": "circle"}], "threshold": 0.2, "max_detections": 3}
    in_json = ask(client, scene(), **question)
    form = client.post("/v1/predict", files=files(scene()), data={"request": json.dumps(question)})
    (in_form,) = form.json()["results"]
    assert in_form["detections"] == in_json["detections"]
    assert len(in_json["detections"]) == 3


def test_an_image_that_was_seen_before_is_answered_the_same(
    client: httpx.Client, nano: Loaded
) -> None:
    question = {"prompts": [{"text": "cross"}]}
    first, second = (ask(client, drawn(2, 200, 150), **question) for _ in range(2))
    assert first == second
    other = {"prompts": [{"text": "circle"}], "threshold": 0.1}
    same(
        ask(client, drawn(2, 200, 150), **other),
        found_by(nano, drawn(2, 200, 150), "circle", threshold=0.1),
    )


def test_without_prompts_the_classes_are_asked_for(client: httpx.Client, nano: Loaded) -> None:
    classes = nano.finder.prompts
    assert classes
    same(ask(client, scene()), nano.finder.predict(opened(scene())))


def test_each_prompt_has_its_own_threshold_and_boxes(client: httpx.Client, nano: Loaded) -> None:
    """Those that differ in words alone are asked together; all are joined by their scores."""
    box = found_by(nano, scene(), "circle").boxes_xyxy[0].tolist()
    xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    request = [
        {"text": "circle", "threshold": 0.6},
        {"text": "red thing", "threshold": 0.1, "negative_boxes": [xywh]},
        {"text": "cross", "threshold": 0.6},
        {"boxes": [xywh], "threshold": 0.02},
    ]
    answer = ask(client, scene(), prompts=request, threshold=0.3)
    parts = [
        found_by(nano, scene(), "circle", "cross", threshold=0.6),
        found_by(nano, scene(), "red thing", threshold=0.1, negative_boxes_xywh=[xywh]),
        found_by(nano, scene(), threshold=0.02, boxes_xywh=[xywh]),
    ]
    expected = [
        (float(score), part.prompts[prompt], mask["counts"])
        for part in parts
        for score, prompt, mask in zip(part.scores, part.prompt_ids, part.masks, strict=True)
    ]
    got = [(d["score"], d["prompt"], d["mask"]["counts"]) for d in answer["detections"]]
    assert sorted(got) == sorted(expected)
    assert [score for score, _, _ in got] == sorted((s for s, _, _ in got), reverse=True)
    assert {"circle", "visual"} <= {prompt for _, prompt, _ in got}
    assert answer["best_score"] == max(part.best_score for part in parts)


def test_the_formats_hold_the_same_masks(client: httpx.Client, nano: Loaded) -> None:
    question: dict[str, Any] = {"prompts": [{"text": "circle"}], "threshold": 0.3}
    rles = ask(client, scene(), **question)["detections"]
    assert len(rles) > 1
    pngs = ask(client, scene(), **question, format="png")["detections"]
    polygons = ask(client, scene(), **question, format="polygon")["detections"]
    for rle, png, polygon in zip(rles, pngs, polygons, strict=True):
        mask = decode(rle["mask"])
        picture = Image.open(io.BytesIO(base64.b64decode(png["mask"])))
        assert picture.mode == "1"
        assert np.array_equal(np.asarray(picture), mask)
        assert np.array_equal(filled(polygon["mask"], *mask.shape), mask)
    geojson = ask(client, scene(), **question, format="geojson")
    assert "detections" not in geojson
    assert geojson["features"] == feature_collection(
        found_by(nano, scene(), "circle", threshold=0.3)
    )


def filled(rings: list[list[float]], height: int, width: int) -> np.ndarray:
    """The pixels whose middles lie within an odd number of rings."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    middles = np.stack([columns.ravel(), rows.ravel()], axis=1)
    inside = np.zeros(len(middles), dtype=int)
    for ring in rings:
        inside += Outline(np.reshape(ring, (-1, 2)), closed=False).contains_points(middles)
    return (inside % 2 == 1).reshape(height, width)


def test_two_hundred_clients_at_once_are_answered_as_if_alone(nano: Loaded) -> None:
    """Whatever comes together: images, prompts, thresholds and boxes are mixed."""
    random.seed(4)
    images = [drawn(number, 60 + 10 * number, 80) for number in range(8)]
    asked = [
        (random.choice(images), random.choice(WORDS), random.choice([0.1, 0.3])) for _ in range(200)
    ]

    async def ask_all(address: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
            posts = [
                client.post(
                    "/v1/predict",
                    files=files(image),
                    data={"prompt": word, "threshold": str(threshold)},
                )
                for image, word, threshold in asked
            ]
            return await asyncio.gather(*posts)

    settings = limited(queue=256)
    with serving(nano.engine(settings), settings=settings) as client:
        answers = asyncio.run(ask_all(str(client.base_url)))
    expected = {key: found_by(nano, key[0], key[1], threshold=key[2]) for key in set(asked)}
    for key, answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        same(answer.json()["results"][0], expected[key])


# --- sessions ------------------------------------------------------------------------------------


def test_a_session_is_asked_again_and_again(client: httpx.Client, nano: Loaded) -> None:
    made = client.post("/v1/sessions", files=files(scene()))
    assert made.status_code == 201, made.text
    session = made.json()
    assert session["model"]["name"] == "nano"
    assert session["expires_in"] == 600
    for word in WORDS:
        answer = client.post(
            f"/v1/sessions/{session['id']}/prompts", json={"prompts": [{"text": word}]}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"]["version"] == "1"
        same(answer.json(), found_by(nano, scene(), word))
    assert client.delete(f"/v1/sessions/{session['id']}").status_code == 204
    gone = client.post(f"/v1/sessions/{session['id']}/prompts", json={})
    assert gone.status_code == 404
    assert problems(gone)[0]["field"] == "id"


def test_sessions_end_by_themselves(nano: Loaded) -> None:
    """After their time, and the longest unasked where there are too many."""
    short = limited(session_seconds=0.0)
    with serving(nano.engine(short), settings=short) as client:
        session = client.post("/v1/sessions", files=files(drawn(1))).json()["id"]
        assert client.post(f"/v1/sessions/{session}/prompts", json={}).status_code == 404
    few = limited(sessions=2)
    with serving(nano.engine(few), settings=few) as client:
        made = [client.post("/v1/sessions", files=files(drawn(n))).json()["id"] for n in (1, 2)]
        assert client.post(f"/v1/sessions/{made[0]}/prompts", json={}).status_code == 200
        made.append(client.post("/v1/sessions", files=files(drawn(3))).json()["id"])
        codes = [client.post(f"/v1/sessions/{id}/prompts", json={}).status_code for id in made]
    assert codes == [200, 404, 200]


def test_a_session_outlives_the_cache(nano: Loaded) -> None:
    settings = limited(cache_bytes=0)
    with serving(nano.engine(settings), settings=settings) as client:
        made = client.post("/v1/sessions", files=files(scene())).json()
        answer = client.post(
            f"/v1/sessions/{made['id']}/prompts", json={"prompts": [{"text": "circle"}]}
        )
    same(answer.json(), found_by(nano, scene(), "circle"))


# --- models and states ---------------------------------------------------------------------------


def test_models_are_listed_and_chosen(nano: Loaded) -> None:
    engines = [nano.engine(), nano.engine(version="2"), nano.engine(name="other")]
    with serving(*engines, aliases={("nano", "best"): "2"}) as client:
        listed = client.get("/v1/models").json()["models"]
        assert [(m["name"], m["version"], m["aliases"], m["default"]) for m in listed] == [
            ("nano", "1", [], True),
            ("nano", "2", ["best"], False),
            ("other", "1", [], False),
        ]
        assert listed[0]["prompts"] == list(nano.finder.prompts)
        assert (listed[0]["size"], listed[0]["resolution"], listed[0]["masks"]) == (
            "nano",
            128,
            True,
        )
        for asked, version, alias in (
            (None, ("nano", "1"), None),
            ("nano", ("nano", "1"), None),
            ("nano:2", ("nano", "2"), None),
            ("nano@best", ("nano", "2"), "best"),
            ("other", ("other", "1"), None),
        ):
            data = {"prompt": "circle"} | ({} if asked is None else {"model": asked})
            used = client.post("/v1/predict", files=files(drawn(1)), data=data).json()["model"]
            assert used == {"name": version[0], "version": version[1], "alias": alias}
        for asked in ("nope", "nano:3", "nano@worst", "nano:"):
            data = {"prompt": "circle", "model": asked}
            answer = client.post("/v1/predict", files=files(drawn(1)), data=data)
            assert answer.status_code == 404
            assert "nano@best" in problems(answer)[0]["remedy"]


def test_states(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "alive"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/metrics").status_code == 200


def test_the_description_is_the_one_that_is_checked_in(client: httpx.Client) -> None:
    """Renew it: python -m tests.serving.test_api > docs/openapi.json"""
    kept = (REPOSITORY / "docs" / "openapi.json").read_text(encoding="utf-8")
    assert client.get("/openapi.json").json() == json.loads(kept)


def test_docs_name_every_route_and_need_no_script(client: httpx.Client) -> None:
    page = client.get("/docs")
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in page.text
    assert "<script" not in page.text
    assert "style-src 'sha256-" in page.headers["content-security-policy"]


# --- what cannot be answered ---------------------------------------------------------------------

DATA = base64.b64encode(drawn(1)).decode()
IMAGE = {"images": [{"data": DATA}]}


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        ({}, "images", "required"),
        ({"images": []}, "images", "at least 1"),
        ({"images": [{"data": "no base64!"}]}, "images", "no base64"),
        ({"images": [{"data": "QUJD"}]}, "images", "cannot be read as an image"),
        ({**IMAGE, "prompts": []}, "prompts", "at least 1"),
        ({**IMAGE, "prompts": [{"text": " ! "}]}, "prompts.0.text", "no letter"),
        ({**IMAGE, "prompts": [{}]}, "prompts.0", "names nothing"),
        ({**IMAGE, "prompts": [{"text": "a", "treshold": 1}]}, "prompts.0.treshold", "Extra"),
        ({**IMAGE, "prompts": [{"text": "a", "threshold": 2}]}, "prompts.0.threshold", "less"),
        ({**IMAGE, "threshold": "0.5"}, "threshold", "number"),
        ({**IMAGE, "threshold": float("nan")}, "threshold", "finite"),
        ({**IMAGE, "prompts": [{"boxes": [[1, 2, 3]]}]}, "prompts.0.boxes.0", "at least 4"),
        ({**IMAGE, "prompts": [{"boxes": [[1, 2, 0, 3]]}]}, "prompts.0.boxes", "above 0"),
        ({**IMAGE, "prompts": [{"boxes": [[900, 2, 5, 3]]}]}, "prompts.boxes", "nothing of"),
        ({**IMAGE, "format": "svg"}, "format", "'rle'"),
        ({**IMAGE, "max_detections": 0}, "max_detections", "1"),
        ({**IMAGE, "prompts": [{"text": "a" * 501}]}, "prompts.0.text", "500"),
    ],
)
def test_values_that_cannot_be_answered_are_named(
    client: httpx.Client, request_: dict[str, Any], field: str, words: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/predict", content=json.dumps(request_), headers=headers)
    assert answer.status_code == 422, answer.text
    first = problems(answer)[0]
    assert first["field"] == field
    assert words in first["message"] + first["remedy"]
    assert first["remedy"]


def test_all_problems_are_told_at_once(client: httpx.Client) -> None:
    request = {**IMAGE, "threshold": 3, "format": "svg", "prompts": [{"text": ""}, {"boxes": 1}]}
    answer = client.post("/v1/predict", json=request)
    fields = {problem["field"] for problem in problems(answer)}
    assert {"threshold", "format", "prompts.0.text", "prompts.1.boxes"} <= fields


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("text/plain", b"{}", 415),
        ("", b"{}", 415),
        ("application/json", b"", 422),
        ("application/json", b"{" * 100_000, 422),
        ("application/json", b'{"images": [{"data": "\\ud800"}]}', 422),
        ("multipart/form-data", b"", 422),
        ("multipart/form-data; boundary=x", b"", 422),
        ("multipart/form-data; boundary=x", b"--x\r\n", 422),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 422),
        ("multipart/form-data; boundary=" + "x" * 100, b"garbage", 422),
    ],
)
def test_bodies_that_cannot_be_read(
    client: httpx.Client, kind: str, body: bytes, code: int
) -> None:
    answer = client.post("/v1/predict", content=body, headers={"Content-Type": kind})
    assert answer.status_code == code, answer.text
    assert problems(answer)


def test_forms_say_things_once(client: httpx.Client) -> None:
    for data in (
        {"request": "{}", "prompt": "circle"},
        {"threshold": ["0.1", "0.2"]},
        {"promt": "circle"},
    ):
        answer = client.post("/v1/predict", files=files(drawn(1)), data=data)
        assert answer.status_code == 422
        assert problems(answer)
    many = client.post("/v1/predict", files=files(*[drawn(1)] * 17), data={"prompt": "a"})
    assert many.status_code == 413


def test_other_paths_and_methods(client: httpx.Client) -> None:
    assert client.get("/nothing").status_code == 404
    assert client.get("/v1/predict").status_code == 405
    for path in ("/v1/sessions/nope", "/v1/sessions/..%2f..%2fetc"):
        assert client.delete(path).status_code == 404
    assert problems(client.get("/v1/predict"))


if __name__ == "__main__":
    from app.serving.api import create_app
    from app.serving.settings import Settings
    from app.serving.versions import Models
    from tests.serving.servers import load_nano

    described = create_app(Models([load_nano().engine()]), Settings()).openapi()
    print(json.dumps(described, indent=1, ensure_ascii=False))
