"""The engine alone: batches, failures, memory that runs short, the cache."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from app.errors import UserError
from app.inference import Detections
from app.inference.finder import Encoded, MemoryShort, Prepared, Query
from app.inference.postprocess import Candidates
from app.serving import uploads
from app.serving.cache import FeatureCache
from app.serving.engine import Asked, Engine
from app.serving.refusals import Refused
from app.serving.settings import Limits, Settings
from tests.serving.servers import Loaded, drawn, opened, scene

LIMITS = Limits()


class Gathering:
    """A finder that takes images together, as on a GPU, and may be short of memory."""

    gathers = True

    def __init__(self, finder: Any, most: int = 100, fails_at: str | None = None) -> None:
        self._finder, self._most, self._fails_at = finder, most, fails_at
        self.encoded: list[int] = []
        self.released = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def encode(self, images: Sequence[Prepared]) -> list[Encoded]:
        if len(images) > self._most:
            raise MemoryShort("CUDA out of memory. Tried to allocate 20.00 GiB.")
        self.encoded.append(len(images))
        return self._finder.encode(images)

    def ground(self, images: Sequence[Encoded], query: Query) -> list[Candidates]:
        if self._fails_at in query.prompts:
            raise RuntimeError("a kernel failed")
        return self._finder.ground(images, query)

    def release_memory(self) -> None:
        self.released += 1


def ask(engine: Engine, images: Sequence[bytes], *words: str) -> list[Any]:
    """The detections of images that come together; an exception for one that failed."""

    async def together() -> list[Any]:
        queries = engine.queries([Asked(word, 0.2) for word in words], 100)
        checked = [uploads.check(data, LIMITS) for data in images]
        tasks = [engine.find(image, queries) for image in checked]
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(together())


def near(found: Detections, expected: Detections) -> None:
    """Assert that both found the same, but for the rounding of batches."""
    assert len(found) == len(expected)
    assert np.allclose(found.scores, expected.scores, atol=1e-5)
    assert np.allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=1e-2)


@pytest.fixture
def gathering(nano: Loaded):
    engines = []

    def make(settings: Settings | None = None, **options: Any) -> tuple[Engine, Gathering]:
        finder = Gathering(nano.finder, **options)
        settings = settings or Settings(max_batch=4, max_wait_ms=5000)
        engines.append(replace(nano, finder=finder).engine(settings))  # type: ignore[arg-type]
        return engines[-1], finder

    yield make
    for engine in engines:
        engine.close()


def test_images_that_come_together_are_encoded_together(gathering, nano: Loaded) -> None:
    engine, finder = gathering()
    images = [drawn(number) for number in range(4)]
    found = ask(engine, images, "circle")
    assert finder.encoded == [4]
    for detections, image in zip(found, images, strict=True):
        near(detections, nano.finder.predict(opened(image), "circle", threshold=0.2))
    again = ask(engine, images, "cross")
    assert finder.encoded == [4], "they have been seen"
    assert len(again) == 4


def test_one_image_of_several_requests_is_encoded_once(gathering) -> None:
    engine, finder = gathering()
    found = ask(engine, [drawn(1)] * 4, "circle")
    assert finder.encoded == [1]
    assert len({tuple(each.scores.tolist()) for each in found}) == 1


def test_short_memory_halves_what_is_seen_at_once(gathering, nano: Loaded) -> None:
    engine, finder = gathering(most=1)
    images = [drawn(number) for number in range(4)]
    found = ask(engine, images, "circle")
    assert finder.encoded == [1, 1, 1, 1]
    assert finder.released == 3  # for four, for two and two
    for detections, image in zip(found, images, strict=True):
        near(detections, nano.finder.predict(opened(image), "circle", threshold=0.2))
    ask(engine, [drawn(number) for number in range(4, 6)], "circle")
    assert finder.encoded == [1] * 6, "it has learnt"
    assert finder.released == 3


def test_memory_for_not_even_one_image_ends_the_request_alone(gathering) -> None:
    engine, _ = gathering(Settings(max_batch=1), most=0)
    (refused,) = ask(engine, [drawn(1)], "circle")
    assert isinstance(refused, Refused)
    assert refused.status == 503
    assert engine.alive


def test_a_failure_ends_its_request_alone(gathering) -> None:
    engine, _ = gathering(fails_at="cross")

    async def both() -> list[Any]:
        image = uploads.check(drawn(1), LIMITS)
        questions = [engine.queries([Asked(word)], 10) for word in ("circle", "cross", "circle")]
        tasks = [engine.find(image, queries) for queries in questions]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(both())
    assert isinstance(first, Detections)
    assert isinstance(third, Detections)
    assert isinstance(second, RuntimeError)
    assert engine.alive
    assert engine.waiting == 0


def test_a_damaged_image_is_refused_and_named(nano: Loaded) -> None:
    engine = nano.engine()
    (refused,) = ask(engine, [scene()[:5000]], "circle")
    engine.close()
    assert isinstance(refused, Refused)
    assert (refused.status, refused.problems[0].field) == (422, "images")
    assert "truncated" in refused.problems[0].message


def test_boxes_are_of_the_image_as_it_is_seen(nano: Loaded) -> None:
    """A phone's photograph lies on its side in its file; a PNG may say so behind its pixels."""
    lying = Image.open(io.BytesIO(drawn(1, 120, 60)))
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        lying.save(buffer, form, exif=exif, quality=95)
        data = buffer.getvalue()
        if form == "PNG":
            start = data.index(b"eXIf") - 4
            end = start + 12 + int.from_bytes(data[start : start + 4])
            data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
        engine = nano.engine()

        async def find(engine=engine, data=data) -> Detections:
            queries = engine.queries([Asked(None, 0.0, boxes=((10, 80, 40, 30),))], 3)
            return await engine.find(uploads.check(data, LIMITS), queries)

        found = asyncio.run(find())
        engine.close()
        assert (found.width, found.height) == (60, 120)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        alone = nano.finder.predict(
            upright, boxes_xywh=[(10, 80, 40, 30)], threshold=0.0, max_detections=3
        )
        assert found.scores.tolist() == alone.scores.tolist()
        assert found.masks == alone.masks


def test_words_outside_a_vocabulary_are_named(nano: Loaded) -> None:
    engine = nano.engine(vocabulary=("circle", "cross"))
    try:
        with pytest.raises(UserError, match=r"'circel': is not in the vocabulary.*'circle'"):
            engine.queries([Asked("circel")], 10)
    finally:
        engine.close()


def test_an_engine_that_cannot_load_says_why(nano: Loaded) -> None:
    def load() -> Any:
        raise UserError("no such weights")

    with pytest.raises(UserError, match="no such weights"):
        Engine(load, Settings())


def test_the_cache_is_bounded_and_keeps_what_is_asked() -> None:
    cache = FeatureCache(100)
    for number in range(3):
        cache.put(str(number), Encoded(number, 1, 1, 40))
        cache.get("0")
    kept = [cache.get(str(number)) is not None for number in range(3)]
    assert kept == [True, False, True]
    assert cache.nbytes == 80
    cache.put("large", Encoded(0, 1, 1, 101))
    assert cache.get("large") is None
    cache.put("2", Encoded(2, 1, 1, 40))
    assert cache.nbytes == 80
    cache.clear()
    assert (cache.nbytes, cache.get("0")) == (0, None)
