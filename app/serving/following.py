"""`/v1/follow`: a film is sent, and its tracks come back as they are known (server-sent events)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from app.errors import UserError
from app.inference.detections import Detections
from app.inference.films import Film, Frame, Reader, Section
from app.inference.following import NMS, UNSURE, mean_colors, track_settings
from app.inference.merging import suppress
from app.inference.tracks import Sighting, Tracker
from app.serving import describing, messages
from app.serving.answers import to_json
from app.serving.asking import used
from app.serving.engine import Asked, Engine
from app.serving.messages import FilmQuestion
from app.serving.refusals import Problem, Refused, unusable
from app.serving.settings import Limits
from app.serving.versions import Models

EVENTS = "text/event-stream"
MOST = 100  # detections of a frame
AGAIN = 0.2  # seconds, after which a frame asks anew for a place
TEXT = (
    "`film`: width, height, fps, count (frames, about), prompts and model. Then a `frame` each: "
    "frame, time in seconds, and what is found: track, prompt, score, box, mask as RLE. Last "
    "`end`: the prompt of each track, frames that could not be decoded, and why it ended early; or "
    "`error`."
)
Told = tuple[int, float]  # number and time of a frame


def router(models: Models, limits: Limits) -> APIRouter:
    """Return the route that follows films."""
    routes = APIRouter(prefix="/v1", responses=describing.ERRORS)
    answer = {"description": TEXT, "content": {EVENTS: {"schema": {"type": "string"}}}}

    @routes.post(
        "/follow",
        response_class=StreamingResponse,
        responses={200: answer},
        openapi_extra=describing.film(),
    )
    async def follow(request: Request) -> Response:
        """Follow what the prompts name in a film; to leave ends it."""
        body, kind = await request.body(), request.headers.get("content-type", "")
        question, name, data = await asyncio.to_thread(messages.read_film, kind, body)
        engine = models.choose(question.model)
        run = _Run(engine, question, Film(name, data=data), limits)
        return StreamingResponse(run.events(await run.begin()), media_type=EVENTS)

    return routes


class _Frames:
    """The frames of a film, which any thread may take, one at a time."""

    def __init__(self, reader: Reader) -> None:
        self._frames = iter(reader)
        self._lock = threading.Lock()

    def take(self) -> Frame | None:
        """Return the next frame; None where there is none."""
        with self._lock:
            return next(self._frames, None)

    def close(self) -> None:
        """Close the film, once no thread takes a frame of it."""
        with self._lock:
            self._frames.close()  # type: ignore[attr-defined]


class _Run:
    """Follows one film."""

    def __init__(self, engine: Engine, question: FilmQuestion, film: Film, limits: Limits) -> None:
        self._engine, self._question, self._limits = engine, question, limits
        section = Section(question.every)
        self._reader = Reader(film, section, engine.finder.levels, pixels=limits.pixels)
        self._frames = _Frames(self._reader)
        given = question.threshold
        self._threshold = engine.about.threshold if given is None else given
        words = [each.text for each in question.prompts or ()] or engine.finder.prompts
        self._queries = engine.queries(
            [Asked(text, self._threshold * UNSURE) for text in words], MOST
        )
        self._prompts = [prompt for query in self._queries for prompt in query.prompts]

    async def begin(self) -> Frame:
        """Return the first frame, so that what is no film is refused before anything is told."""
        try:
            first = await asyncio.to_thread(self._frames.take)
        except UserError as error:
            raise unusable(error) from None
        if first is None:
            remedy = "send MP4, MOV, MKV, WebM, AVI or a GIF"
            problem = Problem("film", "no frame in it could be read", remedy)
            raise Refused(422, "The film cannot be read.", [problem])
        return first

    async def events(self, frame: Frame | None) -> AsyncIterator[bytes]:
        """Yield what is known, as it is known."""
        assert frame is not None
        reader, question = self._reader, self._question
        tracker: Tracker[Told] = Tracker(
            track_settings(self._threshold, reader.fps, fill=question.fill_gaps)
        )
        width, height = frame.image.size
        yield _event(
            "film",
            {
                "width": width,
                "height": height,
                "fps": reader.fps,
                "count": reader.count,
                "prompts": self._prompts,
                "model": used(self._engine, question.model),
            },
        )
        ended, seen = "", 0
        try:
            while frame is not None:
                found = await self._look(frame)
                known = await asyncio.to_thread(_update, tracker, frame, found)
                for told, sightings in known:
                    yield self._frame(told, sightings)
                seen += 1
                if seen == self._limits.frames:
                    ended = f"a server follows {seen:,} frames at most"
                    break
                frame = await asyncio.to_thread(self._frames.take)
            for told, sightings in tracker.finish():
                yield self._frame(told, sightings)
            tracks = [
                {"track": id, "prompt": self._prompts[label]}
                for id, label in tracker.labels.items()
            ]
            last = {"frames": seen, "tracks": tracks, "broken": reader.broken}
            yield _event("end", last | {"ended": ended or reader.ended})
        except UserError as error:
            yield _event("error", unusable(error).body())
        except Refused as refusal:
            yield _event("error", refusal.body())
        finally:  # the thread that takes a frame may be at work still
            asyncio.get_running_loop().run_in_executor(None, self._frames.close)

    async def _look(self, frame: Frame) -> Detections:
        """Return what is found in a frame; wait for a place where all are taken."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._limits.seconds
        while True:
            try:
                return await self._engine.look(frame.image, self._queries)
            except Refused as refusal:
                if refusal.status != 503 or loop.time() > end:
                    raise
            await asyncio.sleep(AGAIN)

    def _frame(self, told: Told, sightings: Sequence[Sighting]) -> bytes:
        number, time = told
        found = [
            {
                "track": each.track,
                "prompt": self._prompts[each.label],
                "score": each.score,
                "box": each.box_xywh,
                "mask": each.mask,
                "interpolated": each.filled,
            }
            for each in sightings
        ]
        return _event("frame", {"frame": number, "time": time, "found": found})


def _update(
    tracker: Tracker[Told], frame: Frame, found: Detections
) -> list[tuple[Told, list[Sighting]]]:
    found = suppress(found, NMS)
    return tracker.update((frame.number, frame.time), found, mean_colors(frame.image, found))


def _event(name: str, value: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + to_json(value) + b"\n\n"
