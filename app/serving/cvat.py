"""A function of CVAT's auto-annotation, which asks a server of this project: one file, no torch.

    pip install "cvat-cli" "cvat-sdk[masks]"
    cvat-cli task auto-annotate TASK --function-file app/serving/cvat.py \
        -p server=str:http://127.0.0.1:8000 -p type=str:polygon

It runs for CVAT Community as well: `cvat-cli` takes the images of a task, and gives shapes back. A
task's labels are found by their names: those of the model's classes, or of `prompts`.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import cvat_sdk.auto_annotation as cvataa
import numpy as np
from PIL import Image

TYPES = ("mask", "polygon", "rectangle")
SECONDS = 120.0  # that an answer may take


def create(
    server: str = "http://127.0.0.1:8000",
    key: str = "",
    prompts: str = "",
    type: str = "mask",
    threshold: float = -1.0,
    model: str = "",
) -> Function:
    """Return the function, as cvat-cli makes it with `-p NAME=TYPE:VALUE`.

    Args:
        server: its address.
        key: that it asks for.
        prompts: labels to find, parted by commas; empty: the model's classes.
        type: of the shapes: mask, polygon (of the largest piece) or rectangle.
        threshold: least score; below 0: CVAT's, or else the weights' own.
        model: which one of several; empty: the first.

    Raises:
        ValueError: another type, or the model has no classes and no prompts are given.
        ConnectionError: the server does not answer, or refuses; says why.
    """
    if type not in TYPES:
        raise ValueError(f"type is {type}: give {', '.join(TYPES)}")
    names = [each.strip() for each in prompts.split(",") if each.strip()]
    ask = Server(server, key)
    if not names:
        models = ask("/v1/models")["models"]
        chosen = [each for each in models if each["name"] == model] if model else models
        names = list(chosen[0]["prompts"]) if chosen else []
    if not names:
        raise ValueError("the model has no classes: give prompts, such as -p prompts=str:pothole")
    return Function(ask, names, type, threshold if threshold >= 0 else None, model or None)


class Server:
    """Asks a server of this project."""

    def __init__(self, address: str, key: str) -> None:
        self._address, self._key = address.rstrip("/"), key

    def __call__(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON of an answer."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["X-API-Key"] = self._key
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            told = error.read().decode("utf-8", "replace")[:500]
            raise ConnectionError(f"{self._address}: answers {error.code}: {told}") from None
        except OSError as error:
            raise ConnectionError(f"{self._address}: does not answer ({error})") from None


class Function:
    """Finds objects in the images of a task."""

    def __init__(
        self,
        ask: Server,
        names: Sequence[str],
        type: str,
        threshold: float | None,
        model: str | None,
    ) -> None:
        self._ask, self._names, self._type = ask, list(names), type
        self._threshold, self._model = threshold, model
        labels = [cvataa.label_spec(name, id, type=type) for id, name in enumerate(names)]
        self.spec = cvataa.DetectionFunctionSpec(labels=labels)

    def detect(self, context: Any, image: Image.Image) -> list[Any]:
        """Return the shapes of one image."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        least = context.conf_threshold if context.conf_threshold is not None else self._threshold
        prompts: list[dict[str, Any]] = [{"text": name} for name in self._names]
        if least is not None:
            prompts = [{**prompt, "threshold": least} for prompt in prompts]
        kind = "polygon" if self._type == "mask" and context.conv_mask_to_poly else self._type
        body: dict[str, Any] = {
            "images": [{"data": base64.b64encode(buffer.getvalue()).decode()}],
            "prompts": prompts,
            "format": "png" if kind == "mask" else "polygon",
        }
        if self._model is not None:
            body["model"] = self._model
        (result,) = self._ask("/v1/predict", body)["results"]
        shapes = [self._shape(found, kind) for found in result["detections"]]
        return [shape for shape in shapes if shape is not None]

    def _shape(self, found: dict[str, Any], kind: str) -> Any:
        """Return a detection as CVAT's shape; None where it covers nothing."""
        label, (x, y, width, height) = self._names.index(found["prompt"]), found["box"]
        if kind == "mask" and found["mask"] is not None:
            from cvat_sdk.masks import encode_mask

            with Image.open(io.BytesIO(base64.b64decode(found["mask"]))) as picture:
                pixels = np.asarray(picture).astype(bool)
            return cvataa.mask(label, encode_mask(pixels)) if pixels.any() else None
        if kind == "polygon" and found["mask"]:
            ring = max(found["mask"], key=_area)
            return cvataa.polygon(label, [float(side) for side in ring])
        if kind == "polygon":  # of a model without masks
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            return cvataa.polygon(label, corners)
        return cvataa.rectangle(label, [x, y, x + width, y + height])


def _area(ring: Sequence[float]) -> float:
    x, y = np.array(ring[::2]), np.array(ring[1::2])
    return float(abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()))
