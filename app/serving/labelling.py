"""The page at `/label`, and what it asks for: images of a folder, their labels, proposals."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import Field

from app.datasets.coco import Annotation, overlap
from app.datasets.editing import LabelFile, Labels, Shape, StaleError
from app.datasets.images import ImageError, open_image, open_small
from app.inference.labelling import to_annotations
from app.serving import answers, messages, page, uploads
from app.serving.asking import find
from app.serving.messages import Box, Message, RleMask, Share
from app.serving.refusals import Problem, Refused
from app.serving.rounds import Rounds
from app.serving.settings import Settings
from app.serving.versions import Models

JSON = "application/json"
THUMBNAIL = 96  # pixels of its longer side
QUALITY = 90  # of JPEG
SAME = 0.5  # IoU from which a proposal is what is labelled already
MOST_OBJECTS = 10_000  # of an image
P = ParamSpec("P")
T = TypeVar("T")


class RunLengths(Message):
    """A mask as COCO's run lengths, which a page counts itself."""

    size: list[int]
    counts: list[int]


class ObjectIn(Message):
    """An object as the page has it."""

    id: int | None = None
    name: Annotated[str, Field(max_length=500)]
    box: Box
    mask: RleMask | RunLengths | None = None
    score: Share | None = None


class LabelsIn(Message):
    """All that an image shows."""

    objects: Annotated[list[ObjectIn], Field(max_length=MOST_OBJECTS)]
    finished: bool


def router(models: Models, settings: Settings, labels: LabelFile, rounds: Rounds) -> APIRouter:
    """Return the routes of a folder that is labelled."""
    routes = APIRouter(prefix="/label", include_in_schema=False)
    answer_page = page.answering("label")
    limits = settings.limits

    @routes.get("")
    async def label_page() -> HTMLResponse:
        return answer_page()

    @routes.get("/images")
    async def images() -> Response:
        """List the images, with what is labelled of each."""
        names, counts, classes = await asyncio.to_thread(
            lambda: (labels.names(), labels.counts(), labels.classes)
        )
        listed = []
        for name in names:
            finished, objects, proposals = counts.get(name, (False, 0, 0))
            listed.append(
                {
                    "name": name,
                    "begun": name in counts,
                    "finished": finished,
                    "objects": objects,
                    "proposals": proposals,
                }
            )
        return _answer({"folder": labels.folder.name, "classes": classes, "images": listed})

    @routes.get("/image")
    async def image(name: str) -> Response:
        """Return the labels of an image."""
        return _answer(_labels(await _known(labels.read, name)))

    @routes.put("/image")
    async def save(name: str, request: Request) -> Response:
        """Make these the labels of an image, unless somebody else has changed them meanwhile."""
        version = request.headers.get("if-match", "")
        sent = await asyncio.to_thread(messages.read_json, LabelsIn, await request.body())
        shapes = [
            Shape(
                each.id,
                each.name,
                each.box,
                None if each.mask is None else each.mask.model_dump(),
                each.score,
            )
            for each in sent.objects
        ]
        try:
            now = await _known(labels.write, name, version, shapes, sent.finished)
        except StaleError as stale:
            remedy = "look at what it is now, and change that"
            problem = Problem("", f"{name} was changed in another window", remedy)
            refused = Refused(412, "The labels are others now.", [problem])
            return _answer({**refused.body(), "now": _labels(stale.labels)}, 412)
        return _answer(_labels(now))

    @routes.get("/picture")
    async def picture(name: str, small: bool = False) -> Response:
        """Return the pixels of an image, upright, as a JPEG."""

        def encode() -> bytes:
            path, buffer = labels.path(name), io.BytesIO()
            opened = open_small(path, THUMBNAIL) if small else open_image(path)
            if small:
                opened.thumbnail((THUMBNAIL, THUMBNAIL))
            opened.save(buffer, "JPEG", quality=QUALITY)
            return buffer.getvalue()

        return Response(await _known(encode), media_type="image/jpeg")

    @routes.post("/proposals")
    async def propose(name: str, request: Request) -> Response:
        """Find what is asked for in an image, less what is labelled there already."""
        question = messages.read_question(
            request.headers.get("content-type", ""), await request.body()
        )
        path = await _known(labels.path, name)
        now = await _known(labels.read, name)
        file = await asyncio.to_thread(lambda: uploads.check(path.read_bytes(), limits, path.name))
        engine = models.default
        asked = question.asked(engine.finder.prompts)
        (found,) = await find(
            models, engine, [file], asked, question.max_detections, limits.seconds
        )

        def fresh() -> list[dict[str, Any]]:
            prompts = [each.text or found.prompts[n] for n, each in enumerate(asked)]
            accepted = [(n, each) for n, each in now.objects if each.score is None]
            return [
                _object(prompts[each.category_id - 1], each) | {"id": None}
                for each in to_annotations(found, 1, 1)
                if not _is_among(each, prompts[each.category_id - 1], accepted)
            ]

        return _answer({"objects": await asyncio.to_thread(fresh)})

    @routes.get("/round")
    async def state() -> Response:
        """Tell how the ring's round goes."""
        return _answer(rounds.state())

    @routes.post("/round")
    async def begin_round() -> Response:
        """Begin a round of the ring, where none runs."""
        await asyncio.to_thread(rounds.begin)
        return _answer(rounds.state(), 202)

    return routes


async def _known(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do what reads an image in a thread; refuse one that is not there, or no image."""
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except KeyError:
        name = str(args[0])[:200] if args else "it"
        problem = Problem("name", f"there is no image {name}", "load the page anew")
        raise Refused(404, "There is no such image.", [problem]) from None
    except ImageError as error:
        raise uploads.unreadable("image", error) from None


def _answer(content: dict[str, Any], status: int = 200) -> Response:
    return Response(answers.to_json(content), status, media_type=JSON)


def _labels(labels: Labels) -> dict[str, Any]:
    return {
        "name": labels.name,
        "width": labels.width,
        "height": labels.height,
        "version": labels.version,
        "finished": labels.finished,
        "objects": [_object(name, each) for name, each in labels.objects],
    }


def _object(name: str, each: Annotation) -> dict[str, Any]:
    return {
        "id": each.id,
        "name": name,
        "box": list(each.bbox_xywh),
        "mask": each.segmentation,
        "score": each.score,
    }


def _is_among(one: Annotation, name: str, others: list[tuple[str, Annotation]]) -> bool:
    """Return whether an object of this class covers the same place."""
    return any(name == other_name and overlap(one, other) >= SAME for other_name, other in others)
