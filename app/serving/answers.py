"""Detections → what a client is answered, in the format that it asked for."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from app.datasets.rle import Rle, decode
from app.inference.detections import Detections
from app.inference.outputs import box_xywh, feature_collection
from app.inference.polygons import polygons
from app.serving.uploads import to_base64


def result(name: str, found: Detections, form: str) -> dict[str, Any]:
    """Return what was found in one image, as `messages.Answer` describes it.

    Args:
        form: rle, polygon, png or geojson.
    """
    best = found.best_score
    answer: dict[str, Any] = {
        "name": name,
        "width": found.width,
        "height": found.height,
        "best_score": best if best is not None and math.isfinite(best) else None,
    }
    if form == "geojson":
        return answer | {"features": feature_collection(found)}
    masks: Sequence[Rle | None] = (None,) * len(found) if found.masks is None else found.masks
    write = MASKS[form]
    detections = [
        {
            "prompt": found.prompts[int(prompt)],
            "score": float(score),
            "box": box_xywh(found, index),
            "mask": None if mask is None else write(mask),
        }
        for index, (prompt, score, mask) in enumerate(
            zip(found.prompt_ids, found.scores, masks, strict=True)
        )
    ]
    return answer | {"detections": detections}


def to_json(value: Any) -> bytes:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def results(
    names: Sequence[str], found: Sequence[Detections], form: str, model: dict[str, Any]
) -> bytes:
    """Return the answer for several images as JSON; takes milliseconds: call it in a thread."""
    answers = [result(name, each, form) for name, each in zip(names, found, strict=True)]
    return to_json({"model": model, "results": answers})


def _rings(mask: Rle) -> list[list[int]]:
    """Return the rings of a mask, outer ones and holes, which the even-odd rule fills."""
    return [
        [side for point in ring[:-1] for side in point]
        for polygon in polygons(mask)
        for ring in polygon
    ]


def _png(mask: Rle) -> str:
    buffer = io.BytesIO()
    Image.fromarray(decode(mask)).save(buffer, "PNG")
    return to_base64(buffer.getvalue())


MASKS: dict[str, Callable[[Rle], Any]] = {"rle": dict, "polygon": _rings, "png": _png}
