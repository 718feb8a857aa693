"""What clients ask, as JSON or as a form, checked; and what they are answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.serving import uploads
from app.serving.engine import Asked
from app.serving.refusals import Problem, Refused
from app.serving.settings import Limits
from app.serving.uploads import Uploaded

MOST_PROMPTS = 200
MOST_BOXES = 100  # of a prompt
MOST_DETECTIONS = 1000
MOST_FIELDS = 1000  # of a form
NUMBERS = ("threshold", "max_detections", "every")  # fields of a form
LONGEST_FIELD = 1 << 20  # bytes of a field of a form that is no file
RED_SQUARE = (  # of 8 x 8 pixels
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mO8oyHHgA0wMeAAg1MCAOgSATLoWkZgAAAA"
    "AElFTkSuQmCC"
)
Format = Literal["rle", "polygon", "png", "geojson"]
Box = Annotated[
    list[FiniteFloat],
    Field(
        min_length=4, max_length=4, description="x, y, w, h in pixels", examples=[[8, 8, 40, 30]]
    ),
]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
ModelName = Annotated[
    str, Field(min_length=1, max_length=200, description="NAME, NAME:VERSION or NAME@ALIAS")
]


class Message(BaseModel):
    """What is common to all: no unknown keys, no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _has_words(text: str | None) -> str | None:
    if text is not None and not any(c.isalnum() for c in text):
        raise ValueError("has no letter or digit; name what to find")
    return text


class PromptRequest(Message):
    """One thing to find: words, examples of it, or both."""

    text: str | None = Field(None, max_length=500, examples=["pothole"])
    threshold: Share | None = Field(None, description="least score; that of the request")
    boxes: list[Box] = Field([], max_length=MOST_BOXES, description="examples of it")
    negative_boxes: list[Box] = Field([], max_length=MOST_BOXES, description="what is not meant")

    has_words = field_validator("text")(_has_words)

    @field_validator("boxes", "negative_boxes")
    @classmethod
    def _has_area(cls, boxes: list[list[float]]) -> list[list[float]]:
        if any(not (w > 0 and h > 0) for _, _, w, h in boxes):
            raise ValueError("a box is x, y, w, h in pixels; its w and h must be above 0")
        return boxes

    @model_validator(mode="after")
    def _names_something(self) -> PromptRequest:
        if self.text is None and not self.boxes:
            raise ValueError("names nothing; give text, or boxes of examples")
        return self


class Question(Message):
    """What is common to everything that asks for detections."""

    prompts: list[PromptRequest] | None = Field(
        None, min_length=1, max_length=MOST_PROMPTS, description="without: the weights' classes"
    )
    threshold: Share | None = Field(
        None, description="of prompts without one; the weights' own unless given"
    )
    max_detections: int = Field(100, ge=1, le=MOST_DETECTIONS, description="an image")
    format: Format = "rle"

    def asked(self, classes: Sequence[str]) -> list[Asked]:
        """Return what is to be found, each prompt with its threshold; without any, the classes."""
        if self.prompts is None:
            return [Asked(text, self.threshold) for text in classes]
        return [
            Asked(
                prompt.text,
                self.threshold if prompt.threshold is None else prompt.threshold,
                tuple(map(tuple, prompt.boxes)),  # type: ignore[arg-type]
                tuple(map(tuple, prompt.negative_boxes)),  # type: ignore[arg-type]
            )
            for prompt in self.prompts
        ]


class ImageIn(Message):
    """An image file in a JSON request."""

    data: str = Field(
        description="the file in base64, or a data: URL with it", examples=[RED_SQUARE]
    )
    name: str = Field("image", max_length=uploads.SHOWN)


class FormQuestion(Question):
    """What a form's part `request` may say; the images are parts of their own."""

    model: ModelName | None = None


class PredictRequest(FormQuestion):
    """What to find in images."""

    images: list[ImageIn] = Field(min_length=1)


class SessionRequest(Message):
    """An image that will be asked about several times."""

    image: ImageIn
    model: ModelName | None = None


class FormSession(Message):
    """What a form's part `request` may say where a session begins."""

    model: ModelName | None = None


class FilmPrompt(Message):
    """Words to follow."""

    text: str = Field(max_length=500, examples=["pothole"])

    has_words = field_validator("text")(_has_words)


class FilmQuestion(Message):
    """What a form's part `request` may say; the film is a part of its own."""

    prompts: list[FilmPrompt] | None = Field(
        None, min_length=1, max_length=MOST_PROMPTS, description="without: the weights' classes"
    )
    threshold: Share | None = Field(None, description="the weights' own unless given")
    every: int = Field(1, ge=1, le=1000, description="2 takes each second frame, …")
    fill_gaps: bool = Field(False, description="put a track where it was between two places")
    model: ModelName | None = None


# --- answers: these classes describe them, `answers.py` writes them -------------------------------


class RleMask(BaseModel):
    """COCO's compressed run lengths."""

    size: list[int] = Field(min_length=2, max_length=2, description="height, width")
    counts: str


class Found(BaseModel):
    """One detection; its mask is in the format asked for, null from a model without masks."""

    prompt: str
    score: float
    box: Box
    mask: RleMask | list[list[float]] | str | None = Field(
        description="rle; polygon: rings of x, y, x, y, …, filled by the even-odd rule; png: a PNG "
        "of one bit a pixel, of the image's size, in base64"
    )


class Answer(BaseModel):
    """What was found in one image; `features` takes the place of `detections` for geojson."""

    name: str
    width: int
    height: int
    best_score: float | None = Field(description="the highest of all, also below the threshold")
    detections: list[Found] | None = None
    features: dict[str, Any] | None = Field(None, description="a GeoJSON FeatureCollection")


class ModelUsed(BaseModel):
    """The model that answered."""

    name: str
    version: str
    alias: str | None


class PredictAnswer(BaseModel):
    """What was found."""

    model: ModelUsed
    results: list[Answer]


class SessionMade(BaseModel):
    """An image that can be asked about."""

    id: str
    model: ModelUsed
    width: int
    height: int
    expires_in: float = Field(description="seconds without a question, after which it ends")


class SessionAnswer(Answer):
    """What was found in a session's image."""

    model: ModelUsed


class ModelListed(BaseModel):
    """A model that can be asked."""

    name: str
    version: str
    aliases: list[str]
    default: bool
    prompts: list[str] = Field(description="its classes: asked for where a request names none")
    vocabulary: list[str] | None = Field(
        description="all that it can be asked for; null: any words"
    )
    threshold: float
    size: str
    resolution: int = Field(description="pixels of a side of what it sees")
    pin: str = Field(description="upstream's commit")
    masks: bool


class ModelList(BaseModel):
    """The models of this server."""

    models: list[ModelListed]


class ProblemOut(BaseModel):
    """One thing to mend."""

    field: str = Field(description="of the request, as prompts.0.threshold; empty: the whole")
    message: str
    remedy: str


class ErrorOut(BaseModel):
    """Every error of this server."""

    error: str
    problems: list[ProblemOut]


# --- reading -------------------------------------------------------------------------------------

Read = TypeVar("Read", bound=BaseModel)


def read_predict(kind: str, body: bytes, limits: Limits) -> tuple[FormQuestion, list[Uploaded]]:
    """Return the question and the images of a request.

    Args:
        kind: its Content-Type.

    Raises:
        Refused: another kind of body, or what is wrong with it, all problems at once.
    """
    if _is_json(kind):
        request = read_json(PredictRequest, body)
        _check_count(len(request.images), limits)
        return request, [_decoded(image, limits) for image in request.images]
    form = Form(kind, body)
    question = form.request(FormQuestion)
    _check_count(len(form.files), limits)
    return question, [uploads.check(data, limits, name) for name, data in form.files]


def read_session(kind: str, body: bytes, limits: Limits) -> tuple[str | None, Uploaded]:
    """Return the model's name and the image of a request for a session; otherwise as above."""
    if _is_json(kind):
        request = read_json(SessionRequest, body)
        return request.model, _decoded(request.image, limits)
    form = Form(kind, body)
    if len(form.files) != 1:
        problem = Problem("image", f"has {len(form.files)} of them", "give one file")
        raise Refused(422, "A session has one image.", [problem])
    ((name, data),) = form.files
    return form.request(FormSession).model, uploads.check(data, limits, name)


def read_film(kind: str, body: bytes) -> tuple[FilmQuestion, str, bytes]:
    """Return the question, name and content of a film; otherwise as `read_predict`."""
    if parse_options_header(kind)[0] != b"multipart/form-data":
        raise _other_kind(kind, "multipart/form-data")
    form = Form(kind, body, "film")
    if len(form.files) != 1:
        problem = Problem("film", f"has {len(form.files)} of them", "give one file")
        raise Refused(422, "One film is followed at a time.", [problem])
    ((name, data),) = form.files
    return form.request(FilmQuestion), name[: uploads.SHOWN], data


def read_question(kind: str, body: bytes) -> Question:
    """Return what is asked about a session's image."""
    if not _is_json(kind):
        raise _other_kind(kind, "application/json")
    return read_json(Question, body)


def read_json(form: type[Read], body: bytes) -> Read:
    """Return a JSON body as a message; raise Refused that lists every problem of it."""
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None


class Form:
    """A body of multipart/form-data, whole in memory.

    Args:
        file: name of the parts that are files.

    Attributes:
        files: name and content of each of these.
        fields: the other parts, in their order.

    Raises:
        Refused: it is none, or damaged.
    """

    def __init__(self, kind: str, body: bytes, file: str = "image") -> None:
        self._file = file
        media, options = parse_options_header(kind)
        if media != b"multipart/form-data":
            raise _other_kind(kind, "application/json or multipart/form-data")
        self.files: list[tuple[str, bytes]] = []
        self.fields: list[tuple[str, str]] = []
        self._begin()
        try:
            parser = MultipartParser(
                options.get(b"boundary", b""),
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_header_name,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_part_data": self._on_data,
                    "on_part_end": self._end,
                    "on_end": self._on_last,
                },
            )
            parser.write(body)
            parser.finalize()
        except FormParserError as error:
            raise _damaged(str(error)) from None
        if not self._whole:
            raise _damaged("it is cut short")

    _whole = False

    def _on_last(self) -> None:
        self._whole = True

    def _begin(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""
        self._data = bytearray()

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == self._file:
            file = options.get(b"filename", b"").decode("utf-8", "replace")
            self.files.append((file or name, bytes(self._data)))
        elif len(self._data) > LONGEST_FIELD or len(self.fields) >= MOST_FIELDS:
            raise _damaged(f"more than {MOST_FIELDS} fields, or {LONGEST_FIELD} bytes in one")
        else:
            self.fields.append((name, self._data.decode("utf-8", "replace")))

    def request(self, form: type[Read]) -> Read:
        """Return the part `request`, else the short form: prompt, threshold, format, …"""
        names = [name for name, _ in self.fields]
        if names == ["request"]:
            return read_json(form, self.fields[0][1].encode())
        if "request" in names:
            problem = Problem("request", "comes with other fields", "say all of it in `request`")
            raise Refused(422, "The form says things twice.", [problem])
        values: dict[str, Any] = {}
        for name, text in self.fields:
            if name == "prompt":
                values.setdefault("prompts", []).append({"text": text})
            elif name in values:
                problem = Problem(name, "is given twice", "give it once")
                raise Refused(422, "The form says things twice.", [problem])
            else:
                values[name] = _number(text) if name in NUMBERS else text
        return read_json(form, json.dumps(values).encode())


def _number(text: str) -> Any:
    """Return a field's text as a number; as it is where it is none, to be told so."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _decoded(image: ImageIn, limits: Limits) -> Uploaded:
    return uploads.from_base64(image.data, limits, image.name)


def _check_count(images: int, limits: Limits) -> None:
    if not 1 <= images <= limits.images:
        remedy = f"give 1 to {limits.images}; several requests are answered together as well"
        problem = Problem("images", f"has {images} of them", remedy)
        raise Refused(422 if not images else 413, "The number of images is not right.", [problem])


def _is_json(kind: str) -> bool:
    return parse_options_header(kind)[0] == b"application/json"


def _other_kind(kind: str, known: str) -> Refused:
    problem = Problem("Content-Type", f"'{kind[:100]}' is not read", f"send {known}")
    return Refused(415, "The body is of a kind that is not read.", [problem])


def _damaged(why: str) -> Refused:
    problem = Problem("", f"the form cannot be read: {why}", "send multipart/form-data")
    return Refused(422, "The form is damaged.", [problem])


def _invalid(error: ValidationError) -> Refused:
    """Return every problem of a body; what it said is not repeated, for it may be long."""
    problems = []
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        field = ".".join(map(str, detail["loc"]))
        message, _, remedy = detail["msg"].removeprefix("Value error, ").partition("; ")
        problems.append(Problem(field, message, remedy or REMEDIES.get(detail["type"], TYPES)))
    return Refused(422, "The request is not one that can be answered.", problems[:100])


TYPES = "see /docs for what it takes"
REMEDIES = {
    "extra_forbidden": "remove it; /docs lists what there is",
    "missing": "give it",
    "json_invalid": "send JSON",
}
