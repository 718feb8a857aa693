"""Objects drawn on their image: outlines, a light fill, and labels beside them."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from app.datasets.fonts import text_image
from app.datasets.rle import Rle, area, decode_crop

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

# Vivid, and far apart from one another.
PALETTE: tuple[Color, ...] = (
    *((0, 150, 255), (255, 140, 0), (60, 220, 60), (255, 60, 170), (255, 230, 0), (0, 225, 225)),
    *((190, 110, 255), (255, 70, 50), (170, 255, 160), (255, 190, 210), (150, 120, 30)),
    *((120, 150, 255),),
)
OPACITY = 0.15  # of a mask's fill: what lies below keeps its colour
FONT_SHARE = 38  # of the longer side: 17 pixels at 640, 101 at 4K, 10 of a phone's
LEAST_FONT = 11  # pixels
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def color_of(index: int) -> Color:
    """Return a color for a class or prompt, far from those of its neighbors."""
    return PALETTE[index % len(PALETTE)]


def draw_objects(
    image: Image.Image,
    boxes_xyxy: np.ndarray,
    masks: Sequence[Rle | None] | None,
    labels: Sequence[str],
    colors: Sequence[Color],
) -> Image.Image:
    """Draw objects on a copy of the image: the first is drawn last, on top.

    Each is outlined in its color, between two lines of black or white that show it on any ground,
    and filled lightly. A label stands outside of its box, where it covers least.

    Args:
        boxes_xyxy: (N, 4) pixels.
        masks: RLEs of the image's size; None where there is no mask, then the box is drawn.
    """
    canvas = np.array(image.convert("RGB"))
    drawn = [*(masks or []), *[None] * (len(labels) - len(masks or []))]
    scale = max(image.size)
    near = np.clip(boxes_xyxy, -scale, 2 * scale)  # OpenCV draws to no number of more than 32 bits
    boxes: list[Box] = [(float(a), float(b), float(c), float(d)) for a, b, c, d in near]
    width = max(2, round(scale / 320))
    for box, mask, color in reversed(list(zip(boxes, drawn, colors, strict=True))):
        if mask is not None and area(mask):
            _draw_mask(canvas, mask, color, width)
        else:
            _draw_box(canvas, box, color, width)
    picture = Image.fromarray(canvas)
    size = max(LEAST_FONT, scale // FONT_SHARE)
    outer = [(x1 - width, y1 - width, x2 + width, y2 + width) for x1, y1, x2, y2 in boxes]
    patches: list[Box] = []
    for box, label, color in zip(outer, labels, colors, strict=True):
        if label:
            patches.append(_draw_label(picture, label, box, [*outer, *patches], color, size))
    return picture


def titled(picture: Image.Image, title: str) -> Image.Image:
    """Return the picture under a white band with a title in it."""
    size = max(14, picture.width // 40)
    text = text_image(title, size)
    sheet = Image.new("RGB", (picture.width, picture.height + size + 10), "white")
    sheet.paste(picture, (0, size + 10))
    sheet.paste(BLACK, (6, 4), text)
    return sheet


def _draw_mask(canvas: NDArray[np.uint8], mask: Rle, color: Color, width: int) -> None:
    inside, left, top = decode_crop(mask)
    window = canvas[top : top + inside.shape[0], left : left + inside.shape[1]]
    window[inside] = window[inside] * (1 - OPACITY) + np.array(color) * OPACITY
    crop = inside.astype(np.uint8)
    contours, _ = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(left, top))
    cv2.drawContours(canvas, contours, -1, _edge(color), width + 2)
    cv2.drawContours(canvas, contours, -1, color, width)


def _draw_box(canvas: NDArray[np.uint8], box: Box, color: Color, width: int) -> None:
    left, top, right, bottom = (round(side) for side in box)
    for line, thickness in ((_edge(color), width + 2), (color, width)):
        cv2.rectangle(canvas, (left, top), (right, bottom), line, thickness)


def _edge(color: Color) -> Color:
    """Return black or white, whichever stands out from a color."""
    red, green, blue = color
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else WHITE


def _draw_label(
    picture: Image.Image, label: str, box: Box, taken: Sequence[Box], color: Color, size: int
) -> Box:
    """Write text on a patch of color outside of the box, where it covers least; return the patch.

    Args:
        taken: boxes and labels that it had better not cover.
    """
    text, pad = text_image(label, size), max(2, size // 6)
    width, height = text.width + 2 * pad, text.height + pad
    left, top, right, bottom = box
    places = (
        *((left, top - height), (left, bottom), (right - width, top - height)),
        *((right - width, bottom), (right, top), (left - width, top), (left, top)),
    )
    patches = []
    for x, y in places:
        x = min(max(x, 0), max(picture.width - width, 0))
        y = min(max(y, 0), max(picture.height - height, 0))
        patches.append((x, y, x + width, y + height))
    patch = min(patches, key=lambda one: sum(_overlap(one, other) for other in taken))
    corner = round(patch[0]), round(patch[1])
    ImageDraw.Draw(picture).rectangle(
        (*corner, corner[0] + width - 1, corner[1] + height - 1), fill=color
    )
    picture.paste(_edge(color), (corner[0] + pad, corner[1] + pad // 2), text)
    return patch


def _overlap(one: Box, other: Box) -> float:
    """Return how much of the other box is covered: a small thing counts as much as a large one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / max((other[2] - other[0]) * (other[3] - other[1]), 1.0)
