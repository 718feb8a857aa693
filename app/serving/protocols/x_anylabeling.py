"""The remote protocol of X-AnyLabeling-Server, so that X-AnyLabeling labels with these weights.

It has paths of ours with other answers, so that it is served below `/x-anylabeling`: in the desktop
program's settings, `server_url: http://127.0.0.1:8000/x-anylabeling` and `api_key`.

Words find what they name, rectangles what looks like them; without either, the classes of the
weights are found. Errors have their HTTP status: the program shows it, and nothing else of them.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import cv2
import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from app.datasets.rle import Rle
from app.inference.detections import Detections
from app.inference.merging import suppress
from app.inference.polygons import polygons
from app.model.vocabulary import VISUAL_PROMPT
from app.serving import answers, uploads
from app.serving.asking import find
from app.serving.engine import Asked, Engine
from app.serving.messages import MOST_BOXES, MOST_PROMPTS, read_json
from app.serving.protocols.errors import answering, in_words
from app.serving.refusals import Problem, Refused
from app.serving.settings import Settings
from app.serving.uploads import Uploaded
from app.serving.versions import Models

JSON = "application/json"
PREFIX = "/x-anylabeling"
UNNAMED = "AUTOLABEL_OBJECT"  # the program's label of what its user is still to name
CODES = {401: "UNAUTHORIZED", 404: "MODEL_NOT_FOUND", 503: "QUEUE_FULL"}
LEAST_POINTS = 3  # of a polygon


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")  # versions of the program say more or less


Number = Annotated[FiniteFloat, Field(ge=-1e6, le=1e6)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Mark(_Message):
    """What the user has drawn: a rectangle around what is meant (label 1), or not meant (0)."""

    type: Literal["rectangle", "point"]
    label: int = 1
    data: list[Number] = Field(min_length=2, max_length=4)


class Params(_Message):
    """What is to be found; None where the program leaves it to the server."""

    conf_threshold: Share | None = None
    iou_threshold: Share | None = None
    epsilon_factor: Share | None = None
    text_prompt: Annotated[str, Field(max_length=10_000)] | None = None
    marks: Annotated[list[Mark], Field(max_length=MOST_BOXES)] | None = None
    filter_classes: Annotated[list[str | int], Field(max_length=MOST_PROMPTS)] | None = None


class Prediction(_Message):
    """A request to find something in an image."""

    model: str = Field(max_length=200)
    image: str
    params: Params = Params()


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the protocol's routes."""
    routes = APIRouter(prefix=PREFIX, route_class=answering(_respond), include_in_schema=False)

    @routes.get("/health")
    async def health() -> dict[str, Any]:
        """Tell that the server lives."""
        return {"status": "healthy", "models_loaded": len(models.all())}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the models, with the controls that the program shows for each."""
        listed = {
            f"{engine.name}:{engine.version}" if _is_older(models, engine) else engine.name: engine
            for engine in models.all()
        }
        return {"success": True, "data": {id: _describe(each) for id, each in listed.items()}}

    @routes.get("/v1/models/{id}/info")
    async def model_info(id: str) -> dict[str, Any]:
        """Tell what the list tells of one model."""
        return {"success": True, "data": {"model_id": id, **_describe(models.choose(id))}}

    @routes.post("/v1/predict")
    async def predict(request: Request) -> Response:
        """Find something in an image."""
        body = await request.body()

        def read() -> tuple[Prediction, Uploaded]:
            message = read_json(Prediction, body)
            return message, uploads.from_base64(message.image, settings.limits)

        message, image = await asyncio.to_thread(read)
        engine, params = models.choose(message.model), message.params
        asked = _asked(engine, params)
        (found,) = await find(models, engine, [image], asked, 100, settings.limits.seconds)
        return Response(await asyncio.to_thread(_answer, found, params), media_type=JSON)

    return routes


def _respond(refusal: Refused) -> Response:
    is_image = any(problem.field == "images" for problem in refusal.problems)
    code = CODES.get(refusal.status, "INVALID_IMAGE" if is_image else "INFERENCE_ERROR")
    content = {"success": False, "error": {"code": code, "message": in_words(refusal)}}
    return Response(answers.to_json(content), refusal.status, refusal.headers, media_type=JSON)


def _is_older(models: Models, engine: Engine) -> bool:
    return models.choose(engine.name) is not engine


def _describe(engine: Engine) -> dict[str, Any]:
    """Return what the program shows: `text_prompt` asks for words before a whole folder is done."""
    about = engine.about
    fineness = [("mask_fineness_slider", 10), ("mask_fineness_value_label", None)]
    widgets: list[tuple[str, Any]] = [
        *([("button_run", None)] if about.prompts else []),
        *(("edit_text", None), ("button_send", None), ("add_pos_rect", None)),
        *(("add_neg_rect", None), ("button_run_rect", None), ("button_clear", None)),
        *(("button_finish_object", None), ("input_conf", None), ("edit_conf", about.threshold)),
        *(fineness if about.masks else []),
        ("toggle_preserve_existing_annotations", False),
    ]
    return {
        "display_name": f"{about.name} {about.version}",
        "batch_processing_mode": "default" if about.prompts else "text_prompt",
        "classes": list(about.prompts),
        "params": {"conf_threshold": about.threshold},
        "widgets": [{"name": name, "value": value} for name, value in widgets],
    }


def _asked(engine: Engine, params: Params) -> list[Asked]:
    """Return what is to be found; none: the classes of the weights."""
    boxes: dict[bool, list[tuple[float, float, float, float]]] = {True: [], False: []}
    for mark in params.marks or ():
        if mark.type == "point" or len(mark.data) != 4:
            problem = Problem("marks", "has a point", "draw rectangles: points are not taken")
            raise Refused(422, "Points cannot be answered.", [problem])
        (left, right), (top, bottom) = sorted(mark.data[::2]), sorted(mark.data[1::2])
        boxes[mark.label == 1].append((left, top, right - left, bottom - top))
    if boxes[False] and not boxes[True] and not params.text_prompt:
        problem = Problem("marks", "show only what is not meant", "add a rectangle of what is")
        raise Refused(422, "Nothing to find.", [problem])
    words = (params.text_prompt or "").replace(",", ".").split(".")
    words = [word.strip() for word in words if word.strip()]
    if not words and not boxes[True] and params.filter_classes:
        words = [_class(engine, each) for each in params.filter_classes]
    if len(words) > MOST_PROMPTS:
        problem = Problem("text_prompt", f"has {len(words)} words", f"give at most {MOST_PROMPTS}")
        raise Refused(422, "Too much is asked at once.", [problem])
    texts: list[str | None] = [*words]
    if not words:
        texts = [None] if boxes[True] else [*engine.finder.prompts]
    examples = tuple(boxes[True]), tuple(boxes[False])
    return [Asked(text, params.conf_threshold, *examples) for text in texts]


def _class(engine: Engine, named: str | int) -> str:
    """Return a class that the program names by itself or by its number."""
    if isinstance(named, int) and 0 <= named < len(engine.finder.prompts):
        return engine.finder.prompts[named]
    return str(named)


def _answer(found: Detections, params: Params) -> bytes:
    if params.iou_threshold:  # 0: the program has no control for it here
        found = suppress(found, params.iou_threshold)
    shapes = [
        shape
        for index in range(len(found))
        for shape in _shapes(found, index, params.epsilon_factor or 0.0)
    ]
    data: dict[str, Any] = {"shapes": shapes, "description": ""}
    if params.marks:
        data["replace"] = False  # what was drawn joins what is there; else the user's setting says
    return answers.to_json({"success": True, "data": data})


def _shapes(found: Detections, index: int, fineness: float) -> list[dict[str, Any]]:
    """Return an object as the program's shapes: a polygon for each part of its mask.

    Its polygons have no holes, so that only outer rings are told.

    Args:
        fineness: how far a corner may move, as a share of the outline's length.
    """
    mask = None if found.masks is None else found.masks[index]
    rings = _outlines(mask, fineness) if mask is not None else []
    kind = "polygon" if rings else "rectangle"
    if not rings:
        x1, y1, x2, y2 = (float(side) for side in found.boxes_xyxy[index])
        rings = [[[x1, y1], [x2, y1], [x2, y2], [x1, y2]]]
    prompt = found.prompts[int(found.prompt_ids[index])]
    return [
        {
            "label": UNNAMED if prompt == VISUAL_PROMPT else prompt,
            "shape_type": kind,
            "points": ring,
            "score": float(found.scores[index]),
            "attributes": {},
            "description": None,
            "difficult": False,
            "direction": 0,
            "flags": None,
            "group_id": index + 1 if len(rings) > 1 else None,
            "kie_linking": [],
        }
        for ring in rings
    ]


def _outlines(mask: Rle, fineness: float) -> list[list[list[float]]]:
    rings = []
    for outer, *_ in polygons(mask):
        points: NDArray[Any] = np.array(outer[:-1], np.int32)
        if fineness:
            points = cv2.approxPolyDP(points, fineness * cv2.arcLength(points, True), True)[:, 0]
        if len(points) >= LEAST_POINTS:
            rings.append(points.astype(float).tolist())
    return rings
