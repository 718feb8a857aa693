"""Label Studio's ML backend, so that Label Studio pre-labels with these weights.

It has paths of ours with other answers, so that it is served below `/label-studio`: as a model's
URL in a project's settings, `http://HOST:8000/label-studio`, with the server's key as password.

A project's labels are what is asked for. Where a user draws with a smart tool, a rectangle is an
example of what is meant, a click chooses what it lies on, and the text of a `<TextArea>` is asked
for. Images are fetched from the Label Studio that `LABEL_STUDIO_URL` names, with its token in
`LABEL_STUDIO_API_KEY`, and from nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urljoin, urlsplit

import httpx
import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from app.datasets.formats.voc import parse_xml
from app.datasets.rle import decode
from app.inference.detections import Detections
from app.inference.labelling import to_annotations
from app.inference.proposals import region
from app.serving import answers, uploads
from app.serving.asking import find
from app.serving.engine import Asked, Engine
from app.serving.messages import MOST_BOXES, MOST_PROMPTS, read_json
from app.serving.protocols.errors import answering, in_words
from app.serving.refusals import Problem, Refused
from app.serving.rounds import Rounds
from app.serving.settings import Limits, Settings
from app.serving.uploads import Uploaded
from app.serving.versions import Models

JSON = "application/json"
PREFIX = "/label-studio"
CONTROLS = {  # tags → the types of their regions
    "BrushLabels": "brushlabels",
    "PolygonLabels": "polygonlabels",
    "RectangleLabels": "rectanglelabels",
}
MOST_TASKS = 64
LONGEST_CONFIG = 200_000  # characters
CLICKED = 0.05  # score, of what a click may choose: it says where to look
Percent = Annotated[FiniteFloat, Field(ge=-1000, le=1000)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")  # versions of the program say more or less


class Value(_Message):
    """What was drawn: places in percent of the image's sides."""

    x: Percent | None = None
    y: Percent | None = None
    width: Percent | None = None
    height: Percent | None = None
    text: list[str] | str | None = None
    rectanglelabels: list[str] | None = None
    keypointlabels: list[str] | None = None


class Drawn(_Message):
    """A region of the context: a rectangle, a click, or a text."""

    type: str = ""
    value: Value = Value()
    is_positive: bool = True


class Context(_Message):
    """What a user has drawn with a smart tool."""

    result: Annotated[list[Drawn], Field(max_length=MOST_BOXES)] = []


class Params(_Message):
    """What comes with a request."""

    context: Context | None = None


class Task(_Message):
    """A task: its data names the image."""

    id: int | None = None
    data: dict[str, Any] = {}


class Prediction(_Message):
    """A request for the regions of tasks."""

    tasks: Annotated[list[Task], Field(max_length=MOST_TASKS)]
    label_config: str = Field(default="", max_length=LONGEST_CONFIG)
    params: Params = Params()


class Project(_Message):
    """The project of an event."""

    id: int | None = None


class Event(_Message):
    """What a webhook tells; the exports of the project say what was labelled."""

    action: str
    project: Project = Project()


@dataclass(frozen=True)
class Control:
    """Hold a control of a labelling interface.

    Attributes:
        kind: of its regions.
        prompts: what is asked for → the label that it gets.
    """

    name: str
    to_name: str
    kind: str
    prompts: dict[str, str]


@dataclass(frozen=True)
class Interface:
    """Hold what of a labelling interface is understood.

    Attributes:
        image: key of the task's data that names the image.
    """

    image: str
    control: Control


def router(models: Models, settings: Settings, rounds: Rounds) -> APIRouter:
    """Return the protocol's routes.

    Args:
        rounds: begun where Label Studio asks for training.
    """
    routes = APIRouter(prefix=PREFIX, route_class=answering(_respond), include_in_schema=False)

    @routes.get("/")
    @routes.get("/health")
    async def health() -> dict[str, Any]:
        """Tell that the server lives."""
        return {"status": "UP", "model_class": "SAM 3 fine-tuning"}

    @routes.post("/setup")
    async def setup(request: Request) -> dict[str, Any]:
        """Tell which version answers; refuse an interface that it cannot fill."""
        body = await request.json()
        schema = body.get("schema") if isinstance(body, dict) else None
        if isinstance(schema, str) and schema.strip():
            read_interface(schema, models.default)
        return {"model_version": _version(models.default)}

    @routes.get("/versions")
    async def versions() -> dict[str, Any]:
        """List the versions."""
        return {"versions": [_version(engine) for engine in models.all()]}

    @routes.post("/predict")
    async def predict(request: Request) -> Response:
        """Return the regions of each task."""
        message = await asyncio.to_thread(read_json, Prediction, await request.body())
        engine = models.default
        interface = read_interface(message.label_config, engine)
        results = []
        for task in message.tasks:
            name = task.data.get(interface.image)
            image = await fetch(str(name), settings)
            asked, clicks = ask(interface.control, message.params.context, image)
            (found,) = await find(models, engine, [image], asked, 100, settings.limits.seconds)
            regions = await asyncio.to_thread(_regions, interface.control, found, clicks)
            scores = [each["score"] for each in regions]
            results.append(
                {
                    "result": regions,
                    "score": float(np.mean(scores)) if scores else 0.0,
                    "model_version": _version(engine),
                }
            )
        return Response(answers.to_json({"results": results}), media_type=JSON)

    @routes.post("/webhook", status_code=201)
    async def webhook(request: Request) -> dict[str, Any]:
        """Begin a round of the ring where enough is labelled anew, or training is asked for."""
        event = await asyncio.to_thread(read_json, Event, await request.body())
        begun = await asyncio.to_thread(rounds.hear, event.action, event.project.id)
        return {"status": "a round runs" if begun else "noted"}

    return routes


def _respond(refusal: Refused) -> Response:
    content = {"detail": in_words(refusal)}
    return Response(answers.to_json(content), refusal.status, refusal.headers, media_type=JSON)


def _version(engine: Engine) -> str:
    return f"{engine.name}-{engine.version}"


def read_interface(config: str, engine: Engine) -> Interface:
    """Return the image and the labels of a labelling interface.

    Of several controls of labels the first counts that takes masks, where the model makes any.
    `predicted_values="car, truck"` of a label are what is asked for in its place.

    Raises:
        Refused: it is no XML, or has no such control.
    """
    try:
        root = parse_xml(config.encode())
    except ValueError as fault:
        raise _refused("label_config", f"is no labelling interface ({fault})") from None
    images = {
        str(tag.get("name")): str(tag.get("value", "")).lstrip("$") for tag in root.iter("Image")
    }
    found = []
    for name, kind in CONTROLS.items():
        for tag in root.iter(name):
            to_name = str(tag.get("toName"))
            prompts: dict[str, str] = {}
            for label in tag.iter("Label"):
                value = str(label.get("value", ""))
                said = [each.strip() for each in str(label.get("predicted_values", "")).split(",")]
                prompts |= dict.fromkeys([each for each in said if each] or [value], value)
            if to_name in images and prompts:
                found.append(Control(str(tag.get("name")), to_name, kind, prompts))
    if not engine.about.masks:
        found = [each for each in found if each.kind == "rectanglelabels"]
    if not found:
        tags = ", ".join(CONTROLS if engine.about.masks else ["RectangleLabels"])
        raise _refused("label_config", f"has no labels of an image; add one of {tags}")
    if len(found[0].prompts) > MOST_PROMPTS:
        raise _refused("label_config", f"has more than {MOST_PROMPTS} labels")
    return Interface(images[found[0].to_name], found[0])


Click = tuple[float, float, bool]  # shares of the image's sides; whether it is on what is meant


def ask(
    control: Control, context: Context | None, image: Uploaded
) -> tuple[list[Asked], list[Click]]:
    """Return what is to be found, and the clicks that choose from it."""
    texts: list[str | None] = list(control.prompts)
    drawn = context.result if context is not None else []
    if not drawn:
        return [Asked(text) for text in texts], []
    width, height = uploads.size_of(image)
    boxes, clicks, said, labels = [], [], [], []
    for each in drawn:
        value = each.value
        labels += [*(value.rectanglelabels or ()), *(value.keypointlabels or ())]
        if value.text:
            said += [value.text] if isinstance(value.text, str) else value.text
        elif value.width and value.height and value.x is not None and value.y is not None:
            across, down = width / 100, height / 100
            box = (value.x * across, value.y * down, value.width * across, value.height * down)
            boxes.append((each.is_positive, box))
        elif value.x is not None and value.y is not None:
            clicks.append((value.x / 100, value.y / 100, each.is_positive))
    meant: list[str | None] = [p for p, label in control.prompts.items() if label in labels]
    words: list[str | None] = [text.strip() for text in said if text.strip()]
    positive = tuple(box for is_positive, box in boxes if is_positive)
    negative = tuple(box for is_positive, box in boxes if not is_positive)
    texts = words or ([None] if positive else meant or texts)
    threshold = CLICKED if clicks else None
    return [Asked(text, threshold, positive, negative) for text in texts], clicks


def _regions(control: Control, found: Detections, clicks: Sequence[Click]) -> list[dict[str, Any]]:
    """Return detections as regions of the project's labels."""
    annotations = to_annotations(found, 0, 1)
    if clicks:
        annotations = [each for each in annotations if _is_clicked(each.segmentation, clicks)]
        annotations.sort(key=lambda each: -(each.score or 0.0))
        annotations = annotations[:1]
    only = next(iter(dict.fromkeys(control.prompts.values())))
    return [
        region(
            each,
            control.prompts.get(found.prompts[each.category_id - 1], only),
            found.width,
            found.height,
            kind=control.kind,
            from_name=control.name,
            to_name=control.to_name,
        )
        for each in annotations
    ]


def _is_clicked(mask: dict[str, Any] | None, clicks: Sequence[Click]) -> bool:
    if mask is None:
        return False
    pixels = decode(mask)
    height, width = pixels.shape
    return all(
        bool(pixels[min(int(y * height), height - 1), min(int(x * width), width - 1)]) == is_meant
        for x, y, is_meant in clicks
        if 0 <= x <= 1 and 0 <= y <= 1
    )


async def fetch(name: str, settings: Settings) -> Uploaded:
    """Return the image that a task names.

    Raises:
        Refused: it lies elsewhere than in the Label Studio of the settings, or is not to be had.
    """
    limits = settings.limits
    if name.startswith("data:"):
        return await asyncio.to_thread(uploads.from_base64, name, limits)
    home = settings.label_studio
    if not home:
        remedy = "start the server with LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
        raise _refused("tasks.data", "names an image that Label Studio has", remedy)
    address = urljoin(home.rstrip("/") + "/", name.lstrip("/") if name.startswith("/") else name)
    if urlsplit(address)[:2] != urlsplit(home)[:2]:
        remedy = f"images are fetched from {home} alone: import them, or give it a storage"
        raise _refused("tasks.data", f"names an image at {urlsplit(address).netloc:.100}", remedy)
    try:
        async with httpx.AsyncClient(timeout=limits.body_seconds) as client:
            headers = await authorised(client, home, settings.label_studio_key)
            data = await _read(client, address, headers, limits)
    except httpx.HTTPError as error:
        problem = f"cannot be fetched from {home} ({type(error).__name__})"
        raise _refused("tasks.data", problem, "see that it answers") from None
    return await asyncio.to_thread(uploads.check, data, limits)


async def authorised(client: httpx.AsyncClient, home: str, key: str | None) -> dict[str, str]:
    """Return the header that a token goes in: a personal one is refreshed, an old one is not.

    Raises:
        Refused: Label Studio refuses the token.
    """
    if not key:
        return {}
    if key.count(".") != 2:
        return {"Authorization": f"Token {key}"}
    answer = await client.post(urljoin(home + "/", "/api/token/refresh"), json={"refresh": key})
    if answer.status_code != 200:
        remedy = "give LABEL_STUDIO_API_KEY a token that is valid"
        raise _refused(
            "tasks.data", f"Label Studio refuses the token ({answer.status_code})", remedy
        )
    return {"Authorization": f"Bearer {answer.json()['access']}"}


async def _read(
    client: httpx.AsyncClient, address: str, headers: dict[str, str], limits: Limits
) -> bytes:
    """Return a file that is not larger than a request may be; no redirect is followed."""
    data = bytearray()
    async with client.stream("GET", address, headers=headers) as answer:
        if answer.status_code != 200:
            remedy = "see LABEL_STUDIO_API_KEY, and the project's storage"
            raise _refused("tasks.data", f"Label Studio answers {answer.status_code}", remedy)
        async for part in answer.aiter_bytes():
            data += part
            if len(data) > limits.body_bytes:
                raise _refused("tasks.data", f"is larger than {limits.body_bytes >> 20} MB")
    return bytes(data)


def _refused(field: str, message: str, remedy: str = "") -> Refused:
    return Refused(422, "The task cannot be answered.", [Problem(field, message, remedy)])
