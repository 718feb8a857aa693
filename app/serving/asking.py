"""Ask an engine about the images of a request, within its time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from app.inference.detections import Detections
from app.serving.engine import Asked, Engine
from app.serving.refusals import Problem, Refused
from app.serving.shadow import compare
from app.serving.uploads import Uploaded
from app.serving.versions import Models


async def find(
    models: Models,
    engine: Engine,
    images: Sequence[Uploaded],
    asked: Sequence[Asked],
    most: int,
    seconds: float,
) -> list[Detections]:
    """Ask an engine about all images at once; where one fails, the others are given up.

    Args:
        models: of the server, whose shadow is asked the same afterwards.
        most: detections an image.
        seconds: that it may take.

    Raises:
        Refused, UserError: as of `Engine.find`; it takes too long.
    """
    queries = engine.queries(asked, most)
    async with in_time(seconds):
        tasks = [asyncio.ensure_future(engine.find(image, queries)) for image in images]
        try:
            found = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
    compare(models, engine, images, asked, most, found)
    return found


def used(engine: Engine, asked: str | None) -> dict[str, Any]:
    """Return which model has answered, and the alias that it was asked for by."""
    alias = (asked or "").partition("@")[2] or None
    return {"name": engine.name, "version": engine.version, "alias": alias}


@contextlib.asynccontextmanager
async def in_time(seconds: float) -> AsyncIterator[None]:
    """Refuse what the block does where it takes too long."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        remedy = "ask for fewer images or prompts, or later"
        problem = Problem("", f"took more than {seconds:g} s", remedy)
        raise Refused(504, "The answer took too long.", [problem]) from None
