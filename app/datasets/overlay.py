"""Objects drawn on their image: masks, boxes and labels."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_utils

_OPACITY = 0.45
Color = tuple[int, int, int]


def color_of(index: int) -> Color:
    """Return a color for a class or prompt: hues a golden angle apart, so that neighbors differ."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + index * 0.381966) % 1, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_objects(
    image: Image.Image,
    boxes_xyxy: np.ndarray,
    masks: Sequence[dict[str, Any] | None] | None,
    labels: Sequence[str],
    colors: Sequence[Color],
) -> Image.Image:
    """Draw objects on a copy of the image: the first is drawn last, on top.

    Args:
        boxes_xyxy: (N, 4) pixels.
        masks: RLEs of the image's size; None where there is no mask.
    """
    canvas = np.array(image.convert("RGB"))
    for mask, color in zip(reversed(masks or []), reversed(list(colors)), strict=False):
        if mask is not None:
            _paint_mask(canvas, mask, color)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    scale = max(image.width, image.height)
    font = ImageFont.load_default(size=max(11, scale // 50))
    for box, label, color in reversed(list(zip(boxes_xyxy, labels, colors, strict=True))):
        left, top, right, bottom = (float(side) for side in box)
        draw.rectangle((left, top, right, bottom), outline=color, width=max(1, scale // 400))
        _draw_label(draw, label, (left, top), image.size, color, font)
    return picture


def titled(picture: Image.Image, title: str) -> Image.Image:
    """Return the picture under a white band with a title in it."""
    band = max(14, picture.width // 40)
    sheet = Image.new("RGB", (picture.width, picture.height + band + 10), "white")
    sheet.paste(picture, (0, band + 10))
    font = ImageFont.load_default(size=band)
    ImageDraw.Draw(sheet).text((6, 4), title, fill="black", font=font)
    return sheet


def _paint_mask(canvas: np.ndarray, mask: dict[str, Any], color: Color) -> None:
    binary = mask_utils.decode(mask).astype(bool)
    canvas[binary] = canvas[binary] * (1 - _OPACITY) + np.array(color) * _OPACITY
    contours, _ = cv2.findContours(binary.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, color, max(1, max(canvas.shape[:2]) // 500))


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    at: tuple[float, float],
    size: tuple[int, int],
    color: Color,
    font: Any,
) -> None:
    """Write text on a patch of color above the corner, moved where it would leave the image."""
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(at[0], 0), max(size[0] - width, 0))
    y = at[1] - height if at[1] >= height else at[1]
    y = min(max(y, 0), max(size[1] - height, 0))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + 3 - left, y + 3 - top), label, fill=(0, 0, 0), font=font)
