"""Bytes that a client has sent → an image that may be decoded."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from dataclasses import dataclass, field

from PIL import Image

from app.datasets.images import ImageError, stored_size
from app.serving.refusals import Problem, Refused
from app.serving.settings import Limits

SHOWN = 100  # characters of a name
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # of EXIF


@dataclass(frozen=True)
class Uploaded:
    """Hold an image file that a client has sent, of which the header alone was read.

    Attributes:
        name: as the client calls it.
        data: the file.
        digest: SHA-256 of the file, hexadecimal.
    """

    name: str
    data: bytes = field(repr=False)
    digest: str


def check(data: bytes, limits: Limits, name: str = "image") -> Uploaded:
    """Return a file as an image whose size is within the limits; it is not decoded.

    Takes milliseconds for large files: call it in a thread.

    Raises:
        Refused: it is no image, or has too many pixels.
    """
    name = name[:SHOWN]
    try:
        width, height = stored_size(data, name.replace("\0", ""))
    except ImageError as error:
        if error.kind == "image enormous":
            raise _too_large(name, error.reason, limits) from None
        raise unreadable(name, error) from None
    if width * height > limits.pixels:
        raise _too_large(name, f"{width} x {height} pixels", limits)
    return Uploaded(name, data, hashlib.sha256(data).hexdigest())


def size_of(image: Uploaded) -> tuple[int, int]:
    """Return the width and height of an image in pixels, upright."""
    width, height = stored_size(image.data)
    with Image.open(io.BytesIO(image.data)) as opened:
        turned = opened.getexif().get(ORIENTATION, 1) in SIDEWAYS
    return (height, width) if turned else (width, height)


def from_base64(text: str, limits: Limits, name: str = "image") -> Uploaded:
    """Return an image from base64, or from a `data:` URL with it, as `check` does.

    Raises:
        Refused: it is no base64; and as of `check`.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except (binascii.Error, ValueError):
        problem = Problem("images", f"{name}: is no base64", "send the file's bytes in base64")
        raise Refused(422, "An image is no base64.", [problem]) from None
    return check(data, limits, name)


def to_base64(data: bytes) -> str:
    """Return bytes as text."""
    return base64.b64encode(data).decode("ascii")


def unreadable(name: str, error: ImageError) -> Refused:
    """Return the refusal of a file that is no image, or damaged."""
    problem = Problem(
        "images", f"{name}: cannot be read as an image ({error.reason})", "send a JPEG or PNG"
    )
    return Refused(422, "An image cannot be read.", [problem])


def _too_large(name: str, size: str, limits: Limits) -> Refused:
    problem = Problem(
        "images", f"{name}: has {size}", f"send at most {limits.pixels:,} pixels: make it smaller"
    )
    return Refused(413, "An image has too many pixels.", [problem])
