"""Open Inference Protocol v2, as KServe, Triton and MLServer speak it, with binary tensors.

A request has the tensor `image` (BYTES: image files) and may have `prompt` (BYTES) and, in pixels,
`boxes` and `negative_boxes` (N, 4): x, y, w, h, examples that join every prompt. Its parameters may
say `prompts` (a list, or a text with commas), `threshold`, `max_detections` and `format`.

An answer has a row for each detection of all images: `image` (the index of its image), `prompt`,
`score`, `box` and `mask`, and `size` (height, width) a row for each image. A mask is the JSON of
`mask` in an answer of /v1/predict, or a PNG file. Bytes in JSON are base64 in both directions,
where they are no text.

https://github.com/kserve/open-inference-protocol, and "Binary Tensor Data Extension" of Triton.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from app import __version__
from app.datasets.rle import Rle
from app.inference.detections import Detections
from app.inference.outputs import box_xywh
from app.serving import answers, uploads
from app.serving.asking import find
from app.serving.engine import Engine
from app.serving.messages import Question, read_json
from app.serving.protocols.errors import answering, in_words
from app.serving.refusals import Problem, Refused
from app.serving.settings import Limits, Settings
from app.serving.uploads import Uploaded
from app.serving.versions import Models

JSON = "application/json"
LENGTH = "Inference-Header-Content-Length"  # of the JSON, where tensors follow it as bytes
NUMBERS = {
    **{"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"},
    **{"INT32": "<i4", "INT64": "<i8", "UINT8": "|u1"},
}
INPUTS = (
    {"name": "image", "datatype": "BYTES", "shape": [-1]},
    {"name": "prompt", "datatype": "BYTES", "shape": [-1]},
    {"name": "boxes", "datatype": "FP32", "shape": [-1, 4]},
    {"name": "negative_boxes", "datatype": "FP32", "shape": [-1, 4]},
)
OUTPUTS = (
    {"name": "image", "datatype": "INT32", "shape": [-1]},
    {"name": "prompt", "datatype": "BYTES", "shape": [-1]},
    {"name": "score", "datatype": "FP32", "shape": [-1]},
    {"name": "box", "datatype": "FP32", "shape": [-1, 4]},
    {"name": "mask", "datatype": "BYTES", "shape": [-1]},
    {"name": "size", "datatype": "INT32", "shape": [-1, 2]},
)


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")  # clients say more than a server knows


Name = Annotated[str, Field(max_length=200)]
Side = Annotated[int, Field(ge=0, le=1 << 31)]


class InputTensor(_Message):
    """A tensor of a request; its data are in `data`, or follow the JSON as bytes."""

    name: Name
    datatype: Name
    shape: list[Side] = Field(max_length=8)
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class RequestedOutput(_Message):
    """A tensor that shall be answered."""

    name: Name
    parameters: dict[str, Any] = {}


class InferRequest(_Message):
    """A request's JSON."""

    id: Name = ""
    parameters: dict[str, Any] = {}
    inputs: list[InputTensor] = Field(min_length=1, max_length=len(INPUTS))
    outputs: list[RequestedOutput] = Field([], max_length=len(OUTPUTS))


@dataclass(frozen=True)
class Asking:
    """Hold what a request asks for.

    Attributes:
        outputs: name → whether it shall follow the JSON as bytes.
    """

    id: str
    images: list[Uploaded]
    question: Question
    outputs: dict[str, bool]


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the protocol's routes."""
    routes = APIRouter(prefix="/v2", route_class=answering(_respond), include_in_schema=False)

    @routes.get("")
    async def server() -> dict[str, Any]:
        """Tell what server this is."""
        return {
            "name": "sam3-finetuning",
            "version": __version__,
            "extensions": ["binary_tensor_data"],
        }

    @routes.get("/health/live")
    async def live() -> Response:
        """Tell whether the server lives."""
        alive = all(engine.alive for engine in models.all())
        return _state({"live": alive}, alive)

    @routes.get("/health/ready")
    async def ready(request: Request) -> Response:
        """Tell whether requests are taken."""
        is_ready = not request.app.state.closing
        return _state({"ready": is_ready}, is_ready)

    @routes.get("/models/{model}/ready")
    @routes.get("/models/{model}/versions/{version}/ready")
    async def model_ready(request: Request, model: str, version: str = "") -> Response:
        """Tell whether a model takes requests."""
        engine = _choose(models, model, version)
        is_ready = engine.alive and not request.app.state.closing
        return _state({"name": engine.name, "ready": is_ready}, is_ready)

    @routes.get("/models/{model}")
    @routes.get("/models/{model}/versions/{version}")
    async def metadata(model: str, version: str = "") -> dict[str, Any]:
        """Tell what a model takes and answers."""
        engine = _choose(models, model, version)
        return {
            "name": engine.name,
            "versions": [each.version for each in models.all() if each.name == engine.name],
            "platform": "sam3-finetuning",
            "inputs": INPUTS,
            "outputs": OUTPUTS,
        }

    @routes.post("/models/{model}/infer")
    @routes.post("/models/{model}/versions/{version}/infer")
    async def infer(request: Request, model: str, version: str = "") -> Response:
        """Find what the prompts name in images."""
        engine = _choose(models, model, version)
        body, length = await request.body(), request.headers.get(LENGTH)
        if (packed := request.headers.get("content-encoding", "identity")) != "identity":
            problem = Problem("Content-Encoding", f"'{packed[:40]}' is not read", "send it plain")
            raise Refused(415, "The body is packed.", [problem])
        asking = await asyncio.to_thread(_read, body, length, settings.limits)
        asked, most = asking.question.asked(engine.finder.prompts), asking.question.max_detections
        found = await find(models, engine, asking.images, asked, most, settings.limits.seconds)
        return await asyncio.to_thread(_answer, engine, asking, found)

    return routes


def _choose(models: Models, model: str, version: str) -> Engine:
    return models.choose(f"{model}:{version}" if version else model)


def _state(content: dict[str, Any], is_well: bool) -> Response:
    body = answers.to_json(content)
    return Response(body, 200 if is_well else 503, media_type=JSON)


def _respond(refusal: Refused) -> Response:
    status = 400 if refusal.status == 422 else refusal.status  # the protocol's word for it
    body = answers.to_json({"error": in_words(refusal)})
    return Response(body, status, refusal.headers, media_type=JSON)


# --- reading -------------------------------------------------------------------------------------


def _read(body: bytes, length: str | None, limits: Limits) -> Asking:
    """Return what a request asks for.

    Args:
        length: bytes of its JSON, in decimal; None: all of them.

    Raises:
        Refused: what is wrong with it.
    """
    if length is not None and not (length.isdecimal() and int(length[:20]) <= len(body)):
        raise _wrong(LENGTH, f"is {length[:40]!r}", "give the number of bytes of the JSON")
    size = len(body) if length is None else int(length)
    request = read_json(InferRequest, body[:size])
    tensors = _tensors(request.inputs, memoryview(body)[size:])
    if "image" not in tensors:
        raise _wrong("inputs", "have no tensor 'image'", "give image files as BYTES")
    files = _texts(tensors["image"])
    if not 1 <= len(files) <= limits.images:
        raise _wrong("image", f"has {len(files)} files", f"give 1 to {limits.images}")
    images = [
        uploads.check(file, limits, f"image {index}")
        if isinstance(file, bytes)
        else uploads.from_base64(file, limits, f"image {index}")
        for index, file in enumerate(files)
    ]
    question = _question(request.parameters, tensors)
    if question.format == "geojson":
        raise _wrong("parameters.format", "is geojson", "choose rle, polygon or png")
    return Asking(
        id=request.id,
        images=images,
        question=question,
        outputs=_outputs(request),
    )


def _tensors(
    inputs: Sequence[InputTensor], rest: memoryview
) -> dict[str, tuple[InputTensor, list[Any] | NDArray[Any]]]:
    """Return tensors by their names, each with its elements: numbers as an array, BYTES as a list.

    Args:
        rest: what follows the JSON: the tensors that are not in it, one after the other.
    """
    known = {str(each["name"]): str(each["datatype"]) for each in INPUTS}
    found: dict[str, tuple[InputTensor, list[Any] | NDArray[Any]]] = {}
    for tensor in inputs:
        place = f"inputs.{tensor.name}"
        if tensor.name not in known or tensor.name in found:
            raise _wrong(place, "is not known, or given twice", f"there is {', '.join(known)}")
        is_bytes = known[tensor.name] == "BYTES"
        if is_bytes != (tensor.datatype == "BYTES") or not (is_bytes or tensor.datatype in NUMBERS):
            remedy = "give BYTES" if is_bytes else f"give one of {', '.join(NUMBERS)}"
            raise _wrong(place, f"is of the type {tensor.datatype}", remedy)
        count = math.prod(tensor.shape)
        size = tensor.parameters.get("binary_data_size")
        elements: list[Any] | NDArray[Any]
        if size is None:
            elements = list(_flat(tensor.data or []))
        elif type(size) is not int or not 0 <= size <= len(rest):
            raise _wrong(place, f"has {size!r} bytes", f"{len(rest)} bytes are left of the body")
        elif is_bytes:
            elements = list(_split(rest[:size], place))
        else:
            width = np.dtype(NUMBERS[tensor.datatype]).itemsize
            elements = np.frombuffer(rest[: size // width * width], NUMBERS[tensor.datatype])
        if size is not None:
            rest = rest[size:]
        if len(elements) != count:
            raise _wrong(place, f"has {len(elements)} elements and the shape {tensor.shape}", "")
        found[tensor.name] = tensor, elements
    return found


def _flat(data: Iterable[Any]) -> Iterable[Any]:
    """Yield the elements of nested lists; pydantic has bounded their depth."""
    for each in data:
        if isinstance(each, list):
            yield from _flat(each)
        else:
            yield each


def _split(data: memoryview, place: str) -> Iterable[bytes]:
    """Yield the elements of a BYTES tensor: each follows its length, four bytes."""
    while data:
        (size,) = struct.unpack("<I", data[:4]) if len(data) >= 4 else (len(data),)
        if size > len(data) - 4:
            raise _wrong(place, "is cut short", "each element follows its length, four bytes")
        yield bytes(data[4 : 4 + size])
        data = data[4 + size :]


def _texts(tensor: tuple[InputTensor, list[Any] | NDArray[Any]]) -> list[str | bytes]:
    _, elements = tensor
    if not all(isinstance(each, str | bytes) for each in elements):
        raise _wrong(f"inputs.{tensor[0].name}", "has an element that is no text", "give texts")
    return list(elements)


def _question(
    parameters: dict[str, Any], tensors: dict[str, tuple[InputTensor, list[Any] | NDArray[Any]]]
) -> Question:
    """Return what to find, checked as a request to /v1/predict is."""
    words: Any = parameters.get("prompts")
    if isinstance(words, str):
        words = [each for each in map(str.strip, words.split(",")) if each]
    if "prompt" in tensors:
        words = [
            each.decode("utf-8", "replace") if isinstance(each, bytes) else each
            for each in _texts(tensors["prompt"])
        ]
    boxes = {}
    for name in ("boxes", "negative_boxes"):
        if name in tensors:
            tensor, elements = tensors[name]
            if tensor.shape[-1:] != [4]:
                raise _wrong(f"inputs.{name}", f"has the shape {tensor.shape}", "give (N, 4)")
            try:
                boxes[name] = np.asarray(elements, np.float64).reshape(-1, 4).tolist()
            except (TypeError, ValueError):
                raise _wrong(f"inputs.{name}", "has an element that is no number", "") from None
    content: dict[str, Any] = {
        key: parameters[key]
        for key in ("threshold", "max_detections", "format")
        if key in parameters
    }
    if words:
        content["prompts"] = [{"text": text, **boxes} for text in words]
    elif boxes:
        content["prompts"] = [boxes]
    return read_json(Question, json.dumps(content).encode())


def _outputs(request: InferRequest) -> dict[str, bool]:
    known = [str(each["name"]) for each in OUTPUTS]
    binary = bool(request.parameters.get("binary_data_output", False))
    for each in request.outputs:
        if each.name not in known:
            raise _wrong("outputs", f"{each.name} is not known", f"there is {', '.join(known)}")
    wanted = {o.name: bool(o.parameters.get("binary_data", binary)) for o in request.outputs}
    return wanted or dict.fromkeys(known, binary)


def _wrong(field: str, message: str, remedy: str) -> Refused:
    return Refused(400, "The request cannot be answered.", [Problem(field, message, remedy)])


# --- answering -----------------------------------------------------------------------------------


def _answer(engine: Engine, asking: Asking, found: Sequence[Detections]) -> Response:
    """Return the answer: JSON, then the tensors that shall follow it."""
    tensors = _columns(found, asking.question.format)
    described, parts = [], []
    for each in OUTPUTS:
        name = str(each["name"])
        if name not in asking.outputs:
            continue
        values = tensors[name]
        shape = [len(values), *each["shape"][1:]]
        output: dict[str, Any] = {"name": name, "datatype": each["datatype"], "shape": shape}
        if asking.outputs[name]:
            parts.append(_packed(values))
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            output["data"] = _as_json(values)
        described.append(output)
    content: dict[str, Any] = {"model_name": engine.name, "model_version": engine.version}
    if asking.id:
        content["id"] = asking.id
    head = answers.to_json({**content, "outputs": described})
    if not any(asking.outputs.values()):
        return Response(head, media_type=JSON)
    return Response(
        b"".join([head, *parts]), 200, {LENGTH: str(len(head))}, "application/octet-stream"
    )


def _columns(found: Sequence[Detections], form: str) -> dict[str, list[bytes] | NDArray[Any]]:
    """Return the tensors of an answer: BYTES as lists, numbers as arrays."""
    rows = [(number, each, i) for number, each in enumerate(found) for i in range(len(each))]
    return {
        "image": np.array([number for number, _, _ in rows], "<i4"),
        "prompt": [each.prompts[int(each.prompt_ids[i])].encode() for _, each, i in rows],
        "score": np.array([each.scores[i] for _, each, i in rows], "<f4"),
        "box": np.array([box_xywh(each, i) for _, each, i in rows], "<f4").reshape(-1, 4),
        "mask": [b"" if e.masks is None else _mask(e.masks[i], form) for _, e, i in rows],
        "size": np.array([[each.height, each.width] for each in found], "<i4"),
    }


def _mask(mask: Rle, form: str) -> bytes:
    written = answers.MASKS[form](mask)
    return base64.b64decode(written) if form == "png" else answers.to_json(written)


def _packed(values: list[bytes] | NDArray[Any]) -> bytes:
    if isinstance(values, list):
        return b"".join(struct.pack("<I", len(each)) + each for each in values)
    return values.tobytes()


def _as_json(values: list[bytes] | NDArray[Any]) -> list[Any]:
    """Return a tensor's elements, one after the other; bytes that are no text as base64."""
    if not isinstance(values, list):
        flat: list[Any] = values.ravel().tolist()
        return flat
    return [_text(each) for each in values]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return uploads.to_base64(data)
