"""Shapes as repositories hold them → run-length masks; nothing unchecked reaches pycocotools."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags
from PIL import Image as PILImage
from pycocotools import mask as coco_mask

from app.datasets.formats.mask_files import ONE_CHANNEL
from app.datasets.formats.outlines import Rle, encode, union
from app.datasets.formats.pieces import foreground
from app.datasets.geometry import decode_counts, polygon_fault
from app.files import parse_json

Numbers = NDArray[np.int64]  # (height, width)


def read_bytes(value: Any, roots: tuple[str, ...]) -> bytes:
    """Read an encoded image: held in the row, or in a file under one of `roots` and nowhere else.

    Raises:
        ValueError: there is none, or its address leads out of the dataset.
    """
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise ValueError("is missing")
    if value.get("bytes"):
        return bytes(value["bytes"])
    address = str(value["path"])
    holder = address.split("::")[-1]  # zip://a.png::/folder/images.zip
    if not holder.startswith("hf://"):
        holder = str(Path(holder).resolve())
    if not any(holder == root or holder.startswith(f"{root}/") for root in roots):
        raise ValueError(f"names a file outside the dataset, {address}")
    from datasets.utils.file_utils import xopen

    with xopen(address, "rb") as file:
        return bytes(file.read())


def open_picture(data: bytes) -> PILImage.Image:
    """Decode an image whole; raise ValueError where it is none, cut short or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            picture = PILImage.open(io.BytesIO(data))
            picture.load()
            return picture
    except Exception as error:  # Pillow raises nearly anything on damaged data
        raise ValueError(f"cannot be read as an image ({error})") from None


def upright_size(picture: PILImage.Image) -> tuple[int, int]:
    """Return width and height in pixels, turned by the EXIF orientation, as labels are."""
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return picture.size[::-1] if turned else picture.size


def read_map(data: bytes) -> NDArray[np.int64]:
    """Read (height, width, channels): 1 channel of palette indices or grays, else the colors."""
    picture = open_picture(data)
    if picture.mode not in ONE_CHANNEL:
        pixels = np.asarray(picture.convert("RGB")).astype(np.int64)
        grey = (pixels == pixels[:, :, :1]).all()
        return pixels[:, :, :1] if grey else pixels
    return np.asarray(picture).astype(np.int64)[:, :, None]


def shape_mask(
    value: Any, width: int, height: int, *, shares: bool, roots: tuple[str, ...]
) -> Rle | None:
    """Return the mask of one object; None where it has none.

    Args:
        value: polygons (flat lists, lists of pairs, or {"x", "y"}), an RLE, an image, or rows of
            pixels; or any of them as JSON text.
        shares: whether polygons are in shares of width and height rather than pixels.

    Raises:
        ValueError: it is none of these, is malformed, or covers no pixel; says why.
    """
    if isinstance(value, str):
        value = _parse_json(value)
    if value is None or value == [] or value == {}:
        return None
    if isinstance(value, dict):
        if "counts" in value:
            return _rle_mask(value, width, height)
        if "bytes" in value:
            return _binary_mask(read_map(read_bytes(value, roots))[:, :, 0], width, height)
    elif is_pixels(value, width, height):
        return _binary_mask(np.asarray(value), width, height)
    parts = polygons(value)
    return _polygons_mask(parts, width, height, shares) if parts else None


def polygons(value: Any) -> list[list[float]]:
    """Return flat lists [x1, y1, x2, …], one a part, from any nesting of them.

    Raises:
        ValueError: it is nothing of the kind.
    """
    if isinstance(value, str):
        value = _parse_json(value)
    if isinstance(value, dict) and all(isinstance(value.get(axis), list) for axis in "xy"):
        value = list(map(list, zip(value["x"], value["y"], strict=False)))
    if not isinstance(value, list):
        raise ValueError("must be polygons, an RLE or a mask")
    if value and all(map(_is_number, value)):
        return [[float(number) for number in value]]
    if value and all(map(_is_pair, value)):
        return [[float(number) for pair in value for number in pair]]
    return [part for item in value if item for part in polygons(item)]


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_json(text: str) -> Any:
    try:
        return parse_json(text) if text.strip() else None
    except ValueError:
        raise ValueError("is text, and no JSON") from None


def is_pixels(value: Any, width: int, height: int) -> bool:
    """Return whether nested lists are the rows of a mask."""
    return len(value) == height and all(isinstance(r, list) and len(r) == width for r in value)


def _polygons_mask(parts: list[list[float]], width: int, height: int, shares: bool) -> Rle:
    """Return the union of the parts, passing over those that cover no pixel if one does."""
    if shares:
        size = (width, height)
        parts = [[n * size[i % 2] for i, n in enumerate(part)] for part in parts]
    for part in parts:
        if fault := polygon_fault(part, width, height):
            raise ValueError(fault)
    return union(coco_mask.frPyObjects(parts, height, width))


def _rle_mask(rle: dict[str, Any], width: int, height: int) -> Rle:
    counts = rle["counts"]
    if list(rle.get("size") or [height, width]) != [height, width]:
        raise ValueError(f"must have the image's size [height, width] = [{height}, {width}]")
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    runs = decode_counts(counts, width * height)
    values = np.arange(len(runs)) % 2 == 1
    return encode(np.repeat(values, runs).reshape(width, height).T)


def _binary_mask(pixels: NDArray[Any], width: int, height: int) -> Rle:
    return encode(foreground(_sized(pixels, width, height)))


def _sized(pixels: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    if pixels.shape[:2] != (height, width):
        raise ValueError(
            f"has {pixels.shape[1]} x {pixels.shape[0]} pixels: must be its image's "
            f"{width} x {height}"
        )
    return pixels


def map_channel(pixels: Numbers, channel: int, width: int, height: int) -> Numbers:
    """Return the (height, width) numbers of a map.

    Args:
        channel: which to take where class and object share an image, as in ADE20K: 0 the class in
            red, 1 the object in green. A map of one channel has no other.

    Raises:
        ValueError: of another size than its image, or of colours that are no numbers.
    """
    pixels = _sized(pixels, width, height)
    if pixels.shape[2] == 1:
        return pixels[:, :, 0]
    if pixels[:, :, 2].any():
        raise ValueError("holds colours: must be an image of numbers")
    return pixels[:, :, channel]
