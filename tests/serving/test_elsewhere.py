"""Finders in processes of their own: they answer the same, share the work, and end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.deploy.runtime.runtime import Runtime
from app.errors import UserError
from app.serving import uploads
from app.serving.elsewhere import Elsewhere, load_elsewhere
from app.serving.engine import Asked, Engine
from app.serving.loading import Source
from app.serving.settings import Settings
from tests.helpers import until
from tests.serving.servers import (
    NANO,
    Loaded,
    drawn,
    exported,
    files,
    limited,
    opened,
    problems,
    scene,
    serving,
)
from tests.serving.test_api import same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("tiny") / "folder")


def engine_of(source: Source, settings: Settings | None = None) -> Engine:
    first, *more = load_elsewhere(source, 2)
    return Engine(first, settings or Settings(), more)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    engine = engine_of(Source(folder, "tiny"), limited(queue=100))
    yield engine
    engine.close()


def ask(engine: Engine, images: list[bytes]) -> list[Any]:
    async def together() -> list[Any]:
        queries = engine.queries([Asked("red", 0.0), Asked("green", 0.0)], 5)
        checked = [uploads.check(data, limited().limits) for data in images]
        return await asyncio.gather(*(engine.find(image, queries) for image in checked))

    return asyncio.run(together())


def test_two_processes_find_what_one_finds_and_share_the_images(
    engine: Engine, folder: Path
) -> None:
    alone = Runtime.load(folder)
    images = [drawn(number) for number in range(12)]
    for _ in range(2):  # not seen before, and seen
        for found, image in zip(ask(engine, images), images, strict=True):
            expected = alone.predict(
                opened(image), ["red", "green"], threshold=0.0, max_detections=5
            )
            assert found.scores.tolist() == expected.scores.tolist() != []
            assert found.masks == expected.masks
    kept = [model.cache.nbytes for model in engine._models]
    assert min(kept) > 0, "each has seen some"


def test_features_that_are_dropped_here_are_forgotten_there(engine: Engine) -> None:
    finder = engine.finder
    assert isinstance(finder, Elsewhere)
    (image,) = finder.encode([finder.prepare(opened(drawn(1)))])
    number = image.features.number
    (again,) = finder.encode([finder.prepare(opened(drawn(1)))])
    query = finder.query("red")
    assert finder.ground([image, again], query)
    del image
    gc.collect()
    again.features.number = number
    with pytest.raises(RuntimeError, match="KeyError"):
        finder.ground([again], query)


def test_what_it_cannot_be_asked_is_told_as_by_any_other(engine: Engine) -> None:
    with serving(engine) as client:
        answer = client.post(
            "/v1/predict",
            json={
                "images": [{"data": uploads.to_base64(drawn(1))}],
                "prompts": [{"text": "red", "boxes": [[1, 1, 9, 9]]}],
            },
        )
        assert answer.status_code == 422
        assert "takes words, not example boxes" in problems(answer)[0]["message"]


def test_a_process_that_dies_leaves_the_others_and_is_told(engine: Engine) -> None:
    with serving(engine) as client:
        data = {"prompt": "red"}
        assert client.get("/health").status_code == 200
        first = engine._models[0].finder
        assert isinstance(first, Elsewhere)
        first._process.kill()
        until(lambda: not first.alive, "it has ended")
        assert client.get("/health").status_code == 503
        for number in range(4):
            answer = client.post("/v1/predict", files=files(drawn(number)), data=data)
            assert answer.status_code == 200


def test_weights_that_are_not_there_are_told_from_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json"):
        engine_of(Source(exported_badly(tmp_path), "bad"))


def exported_badly(folder: Path) -> Path:
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_nano_answers_from_two_processes_as_from_one(nano: Loaded) -> None:
    with serving(engine_of(Source(NANO, "nano", device="cpu"))) as client:
        for threshold in (0.3, 0.1):
            data = {"prompt": ["circle", "cross"], "threshold": str(threshold)}
            images = [scene(), drawn(1), drawn(2)]
            answer = client.post("/v1/predict", files=files(*images), data=data)
            assert answer.status_code == 200, answer.text
            for result, image in zip(answer.json()["results"], images, strict=True):
                expected = nano.finder.predict(
                    opened(image), ["circle", "cross"], threshold=threshold
                )
                same(result, expected)
