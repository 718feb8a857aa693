"""Flip, scale, crop and rotation, with boxes and masks in step; and colour.

Upstream's own transforms lose objects without a mask (basic_for_api.py:1075), print warnings, and
resample once for each change; here one warp makes all of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from sam3.train.data.sam3_image_dataset import Datapoint, Object
from sam3.train.data.sam3_image_dataset import Image as DatapointImage
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import to_dtype
from torchvision.transforms.v2.functional._color import _hsv_to_rgb, _rgb_to_hsv

GROUND = (128, 128, 128)  # RGB beyond the image's edge: zero once normalised
HUE = "hue_factor"
ADJUST = {  # by the names that ColorJitter has for their factors, in its order
    "brightness_factor": functional.adjust_brightness,
    "contrast_factor": functional.adjust_contrast,
    "saturation_factor": functional.adjust_saturation,
    HUE: functional.adjust_hue,
}
TURNED = 4  # images whose hues are turned at once: each takes ten times its own memory
Changes = tuple[tuple[str, float], ...]  # of an image: which of `ADJUST`, by what; in their order
Matrix = NDArray[np.float64]  # (2, 3), of points of the image to points of the window, in pixels


class Augment:
    """A transform between `DecodeRle` and the resize to the model's square.

    An object of which less than `min_visible` is left in view is taken from its prompt's answers.

    Args:
        flip, flip_vertical: 0..1, share of images mirrored.
        scale: least and most size of an object beside its own; above 1 the image is cropped, below
            1 it has a border.
        rotate: degrees, most, either way.
        min_visible: 0..1, of an object's area.
    """

    def __init__(
        self,
        *,
        flip: float,
        flip_vertical: float,
        scale: tuple[float, float],
        rotate: float,
        min_visible: float,
    ) -> None:
        self.flip, self.flip_vertical = flip, flip_vertical
        self.scale = scale
        self.rotate = rotate
        self.min_visible = min_visible

    def __call__(self, datapoint: Datapoint, **_: Any) -> Datapoint:
        image = datapoint.images[0]
        matrix, (width, height) = self._draw(*image.data.size)
        if _is_identity(matrix, (width, height), image.data.size):
            return datapoint
        pixels = _warp(np.asarray(image.data), matrix, (width, height), cv2.INTER_LINEAR, GROUND)
        for thing in image.objects:
            _move(thing, matrix, (width, height), self.min_visible)
        image.data, image.size = PILImage.fromarray(pixels), (height, width)
        return datapoint

    def _draw(self, width: int, height: int) -> tuple[Matrix, tuple[int, int]]:
        """Draw a random window; return the matrix into it, and its width and height in pixels."""
        low, high = self.scale
        zoom = math.exp(random.uniform(math.log(low), math.log(high)))
        window = max(round(width / zoom), 1), max(round(height / zoom), 1)
        angle = math.radians(random.uniform(-self.rotate, self.rotate))
        across = -1 if random.random() < self.flip else 1
        down = -1 if random.random() < self.flip_vertical else 1
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        linear = turn @ np.diag([across, down])
        room = np.array([window[0] - width, window[1] - height])
        centre = np.array(window) / 2 + room * [random.uniform(-0.5, 0.5) for _ in room]
        offset = centre - linear @ (np.array([width, height]) / 2)
        if not self.rotate:
            offset = np.round(offset)  # whole pixels: nothing is resampled
        return np.column_stack([linear, offset]), window


class Recolor:
    """A transform after the resize, where there are the fewest pixels to change.

    What it draws is left at the image, as `changes`, and made by `to_numbers` where the model is:
    a GPU does in a moment what takes a loading process 0.1 s at full size.

    Args:
        color: 0..1, most change of brightness, contrast and saturation; hue takes a fifth of it.
    """

    def __init__(self, color: float) -> None:
        self.jitter = v2.ColorJitter(color, color, color, color / 5) if color else None

    def __call__(self, datapoint: Datapoint, **_: Any) -> Datapoint:
        if self.jitter is not None:
            drawn, names = self.jitter.make_params([]), list(ADJUST)
            order = [names[index] for index in drawn["fn_idx"].tolist()]
            image: Any = datapoint.images[0]
            image.changes = tuple((name, drawn[name]) for name in order)
        return datapoint


def changes_of(image: DatapointImage) -> Changes:
    """Return the changes of color that an image is to have."""
    return getattr(image, "changes", ())


def to_numbers(pixels: Tensor, changes: Sequence[Changes]) -> Tensor:
    """Return images (B, 3, R, R) uint8 as float32 in -1..1, recolored, on their device.

    Numbers are returned as they are: transforms of one's own have made them.

    Args:
        changes: of each image.
    """
    if pixels.is_floating_point():
        return pixels
    numbers = to_dtype(pixels, torch.float32, scale=True)  # 0..1
    if any(changes):
        numbers = _recolor(numbers, changes)
    return numbers.sub(0.5).div_(0.5)


def _recolor(numbers: Tensor, changes: Sequence[Changes]) -> Tensor:
    """Return images (B, 3, R, R), 0..1, each with its own changes.

    Hues of several are turned at once, which takes fifty operations: each image has what comes
    before, waits for the others, and has what comes after.
    """
    images = list(numbers.unbind())
    after: list[Changes] = []
    for index, each in enumerate(changes):
        names = [name for name, _ in each]
        turn = names.index(HUE) if HUE in names else len(each)
        images[index] = _adjust(images[index], each[:turn])
        after.append(each[turn:])
    turned = [index for index, each in enumerate(after) if each]
    for first in range(0, len(turned), TURNED):
        some = turned[first : first + TURNED]
        hues = torch.tensor([after[index][0][1] for index in some])
        found = _turn_hues(torch.stack([images[index] for index in some]), hues)
        for index, image in zip(some, found, strict=True):
            images[index] = _adjust(image, after[index][1:])
    return torch.stack(images)


def _adjust(image: Tensor, changes: Changes) -> Tensor:
    for name, factor in changes:
        image = ADJUST[name](image, factor)
    return image


def _turn_hues(images: Tensor, factors: Tensor) -> Tensor:
    """Return images (B, 3, R, R), 0..1, as adjust_hue does, with a factor (B,) for each."""
    hue, saturation, value = _rgb_to_hsv(images).unbind(dim=-3)
    turns = factors.to(images.device, non_blocking=True)[:, None, None]
    return _hsv_to_rgb(torch.stack([hue.add_(turns).remainder_(1.0), saturation, value], dim=-3))


def _is_identity(matrix: Matrix, window: tuple[int, int], size: tuple[int, int]) -> bool:
    return window == size and np.array_equal(matrix, np.eye(2, 3))


def _warp(
    pixels: NDArray[np.uint8],
    matrix: Matrix,
    window: tuple[int, int],
    interpolation: int,
    ground: tuple[int, ...],
) -> NDArray[np.uint8]:
    """Warp an image or a mask, (H, W) or (H, W, 3), into the window.

    OpenCV counts from the centers of pixels and boxes from their corners, so that the matrix is
    shifted by half a pixel on either side.
    """
    shifted = matrix.copy()
    shifted[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    warped = cv2.warpAffine(pixels, shifted, window, flags=interpolation, borderValue=ground)
    return np.asarray(warped, dtype=np.uint8)


def _move(thing: Object, matrix: Matrix, window: tuple[int, int], min_visible: float) -> None:
    """Move one object's box and mask into the window; area 0 drops it where too little is left.

    The box is the mask's; without a mask, the one around the turned box.
    """
    if thing.segment is not None:
        before = float(thing.segment.sum())
        mask = _warp(thing.segment.numpy(), matrix, window, cv2.INTER_NEAREST, (0,))
        thing.segment = torch.from_numpy(mask)
        thing.bbox = _box_of(mask)
        share = float(mask.sum()) / max(before, 1.0)
    else:
        x0, y0, x1, y1 = thing.bbox.flatten().tolist()
        corners = np.array([[x0, y0, 1], [x1, y0, 1], [x0, y1, 1], [x1, y1, 1]]) @ matrix.T
        whole = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
        thing.bbox = torch.tensor(np.clip(whole, 0, [*window, *window]), dtype=torch.float32)
        share = _area(thing.bbox) / max((whole[2] - whole[0]) * (whole[3] - whole[1]), 1e-6)
    thing.area = _area(thing.bbox) if share >= min_visible else 0.0


def _box_of(mask: NDArray[np.uint8]) -> Tensor:
    """Return the mask's box, (4,) float32 xyxy in pixels; zeros where the mask is empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return torch.zeros(4)
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def _area(box_xyxy: Tensor) -> float:
    x0, y0, x1, y1 = box_xyxy.tolist()
    return float((x1 - x0) * (y1 - y0))
