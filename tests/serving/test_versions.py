"""Which engine answers, and engines that are exchanged while they are asked."""

from __future__ import annotations

import gc
import threading
import weakref

import httpx
import pytest

from app.serving.refusals import Refused
from app.serving.versions import Models
from tests.helpers import until
from tests.serving.servers import Loaded, drawn, files, opened, serving
from tests.serving.test_api import same


def test_a_version_is_exchanged_twenty_times_under_load(nano: Loaded) -> None:
    """No request is lost, or answered by half a version; the old ones end."""
    image = drawn(1)
    expected = nano.finder.predict(opened(image), "circle", threshold=0.1)
    ended: list[weakref.ref] = []
    with serving(nano.engine(version="0")) as client:
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
            models.exchange(nano.engine(version=str(number)), old, "best")
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
