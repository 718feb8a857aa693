"""Which engine answers, and engines that are exchanged while they are asked."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import httpx
import numpy as np
import pytest

from app.inference.detections import Detections
from app.serving.engine import Engine
from app.serving.observer import Observer
from app.serving.refusals import Refused
from app.serving.shadow import agreement
from app.serving.versions import Models
from tests.helpers import until
from tests.serving.servers import Loaded, drawn, files, opened, serving
from tests.serving.test_api import same


def test_a_version_is_exchanged_twenty_times_under_load(nano: Loaded) -> None:
    """No request is lost, or answered by half a version; the old ones end."""
    image = drawn(1)
    expected = nano.finder.predict(opened(image), "circle", threshold=0.1)
    ended: list[weakref.ref] = []
    with serving(nano.engine(version="0"), aliases={("nano", "best"): "0"}) as client:
        models: Models = client.app.state.models
        stop = threading.Event()
        answers: list[httpx.Response] = []

        def ask() -> None:
            data = {"prompt": "circle", "threshold": "0.1"}
            while not stop.is_set():
                answers.append(client.post("/v1/predict", files=files(image), data=data))

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for each in clients:
            each.start()
        for number in range(1, 21):
            seen = len(answers)
            until(lambda seen=seen: len(answers) > seen, "it answers")
            old = models.default
            ended.append(weakref.ref(old._models[0]))
            models.add(nano.engine(version=str(number)), "best")
            del old
        stop.set()
        for each in clients:
            each.join()
        last = client.post("/v1/predict", files=files(image), data={"model": "nano@best"})
        assert last.json()["model"] == {"name": "nano", "version": "20", "alias": "best"}
        gc.collect()
        until(
            lambda: not any(each() for each in ended[1:]), "the old ones end"
        )  # we hold the first
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["model"]["version"] for answer in answers}) > 10
    for answer in answers:
        same(answer.json()["results"][0], expected)


def test_names_that_are_not_there_are_answered_by_those_that_are(nano: Loaded) -> None:
    engine = nano.engine()
    try:
        with pytest.raises(Refused) as refused:
            Models([engine]).choose("nanno")
        assert refused.value.status == 404
        assert "Did you mean 'nano'?" in refused.value.problems[0].remedy
    finally:
        engine.close()


class Heard(Observer):
    """Keeps what it is told of shadows."""

    def __init__(self) -> None:
        self.agreements: list[tuple[str, float | None]] = []

    def shadowed(self, engine: Engine, agreement: float | None) -> None:
        self.agreements.append((engine.version, agreement))


def test_a_share_of_the_requests_is_the_canarys(nano: Loaded) -> None:
    engines = [nano.engine(version=version) for version in "12"]
    models = Models(engines, {("nano", "main"): "1", ("nano", "new"): "2"}, ("nano:2", 0.2))
    assert models.choose("nano@main").version == "1"
    random.seed(5)
    for asked in (None, "nano"):
        chosen = [models.choose(asked).version for _ in range(1000)]
        assert 150 < chosen.count("2") < 250  # four deviations
    assert {models.choose("nano:1").version for _ in range(100)} == {"1"}
    with pytest.raises(Refused):
        Models(engines, canary=("nano:3", 0.5))
    models.close()


def test_a_shadow_is_asked_the_same_and_answers_no_one(nano: Loaded) -> None:
    heard = Heard()
    engines = [nano.engine(version=version) for version in "12"]
    with serving(*engines, shadow="nano:2", observer=heard) as client:
        data = {"prompt": "circle", "threshold": "0.1"}
        answer = client.post("/v1/predict", files=files(drawn(1), drawn(2)), data=data)
        assert answer.json()["model"]["version"] == "1"
        until(lambda: len(heard.agreements) == 2, "the shadow answers")
        client.post("/v1/predict", files=files(drawn(1)), data={**data, "model": "nano:2"})
    assert heard.agreements == [("2", 1.0)] * 2  # not compared with itself


def test_agreement_counts_pairs_of_one_prompt() -> None:
    def found(*boxes: tuple[float, str]) -> Detections:
        """Of boxes 10 pixels wide, by their left sides."""
        names = ("a", "b")
        return Detections(
            boxes_xyxy=np.array([[x, 0, x + 10, 10] for x, _ in boxes], np.float32).reshape(-1, 4),
            scores=np.full(len(boxes), 0.9, np.float32),
            prompt_ids=np.array([names.index(name) for _, name in boxes], np.int64),
            prompts=names,
            masks=None,
            width=100,
            height=10,
        )

    one = found((0, "a"), (50, "a"), (70, "b"))
    assert agreement(one, one) == 1
    assert agreement(found(), found()) == 1
    assert agreement(one, found()) == agreement(found(), one) == 0
    assert agreement(one, found((3, "a"), (50, "b"))) == 2 / 5  # IoU 7/13; another prompt
    assert agreement(found((0, "a"), (1, "a")), found((0, "a"))) == 2 / 3  # paired once
