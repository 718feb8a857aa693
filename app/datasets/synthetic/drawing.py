"""Draws an image of shapes, and knows which pixels each of them shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.config.shapes import Thing

COLORS = {  # RGB
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 40),
    "orange": (245, 135, 20),
    "purple": (130, 40, 170),
    "pink": (250, 140, 190),
    "brown": (115, 65, 25),
    "cyan": (40, 210, 220),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
}
RATIOS = {  # low and high; the other kinds have none
    "rectangle": (0.5, 1.0),  # shorter to longer side
    "ellipse": (0.4, 0.65),  # shorter to longer axis
    "ring": (0.5, 0.7),  # inner to outer radius
    "cross": (0.3, 0.4),  # an arm's width to the length of both
    "blob": (0.0, 1.0),  # seeds its outline: no two blobs are alike
}
BLOB_POINTS = (4, 10)  # least and most, of its outline
BLOB_REACH = ((0.25, 0.55), (0.75, 1.0))  # of one half of them and of the other, before scaling
MIN_VISIBLE = 0.5  # of a shape's own area, once later shapes lie on it
MIN_RADIUS = 4  # pixels; below it a turned shape may cover none
PLACEMENTS = 200  # tries a shape before the image is begun anew, with smaller ones
SHRINK = 0.9
CONTRAST = 40  # levels in some channel, between colors that differ
JITTER = 12  # levels a channel, around a named color
FOG = (200, 205, 210)  # RGB
JITTER_APART = 6  # levels in some channel, between shapes of one named color
SPREAD = {"plain": 0, "gradient": 40, "texture": 20}  # most levels around the background's color
CANDIDATES = 64  # colors tried for the background
GRADIENT_STEPS = 256  # colors between its ends
TEXTURE_CELLS = 32  # of a texture's tile, across and down
TEXTURE_CELL = (1, 2, 4, 8)  # pixels

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]  # (height, width)
Pixels = NDArray[np.uint8]  # (height, width, RGB)
Color = NDArray[np.int64]  # (3,) RGB, 0..255


class Frame(NamedTuple):
    """The limits of shapes: pixels, radius as shares of the shorter side, turn in degrees."""

    width: int
    height: int
    radius: tuple[float, float]
    turn: float


class Stamp(NamedTuple):
    """A shape's pixels: rows and columns of the image, and which of those it covers."""

    rows: slice
    columns: slice
    mask: Mask  # (rows, columns)


@dataclass(frozen=True)
class Shape:
    """A kind at a place: center and radius of the circle around it in pixels, turn in radians."""

    kind: str
    x: float
    y: float
    radius: float
    turn: float
    ratio: float

    def stamp(self) -> Stamp:
        """Return the pixels whose centers the shape covers; it must lie inside the image."""
        rows = slice(math.floor(self.y - self.radius), math.ceil(self.y + self.radius) + 1)
        columns = slice(math.floor(self.x - self.radius), math.ceil(self.x + self.radius) + 1)
        x = np.arange(columns.start, columns.stop)[None, :] - self.x
        y = np.arange(rows.start, rows.stop)[:, None] - self.y
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        along, across = x * cos + y * sin, y * cos - x * sin
        return Stamp(rows, columns, INSIDE[self.kind](along, across, self.radius, self.ratio))


def draw_image(
    things: Sequence[Thing],
    *,
    width: int,
    height: int,
    background: str,
    shun: Sequence[str],
    radius: tuple[float, float],
    turn: float,
    random: np.random.Generator,
    fog: float = 0.0,
) -> tuple[Pixels, list[Mask]]:
    """Draw one image; return it with the visible pixels of each thing, later ones on top.

    Args:
        things: at most 254.
        width, height: pixels.
        background: one of SPREAD.
        shun: named colors that the background keeps away from, whether drawn or not.
        radius: least and most, of the image's shorter side.
        turn: degrees, most, either way.
        fog: 0..1, how much of each pixel is FOG.
    """
    frame = Frame(width, height, radius, turn)
    while (placed := _place(things, frame, random)) is None:
        low, high = frame.radius
        frame = frame._replace(radius=(SHRINK * low, SHRINK * high))
    stamps, top = placed
    colors = shape_colors(things, random)
    others = [*colors, *(np.array(COLORS[name]) for name in shun)]
    pixels = paint_background(background, width, height, others, random)
    for (rows, columns, mask), color in zip(stamps, colors, strict=True):
        pixels[rows, columns][mask] = color
    if fog:
        pixels = np.rint((1 - fog) * pixels + fog * np.array(FOG)).astype(np.uint8)
    return pixels, [top == index for index in range(1, len(things) + 1)]


def _place(
    things: Sequence[Thing], frame: Frame, random: np.random.Generator
) -> tuple[list[Stamp], NDArray[np.uint8]] | None:
    """Return stamps in drawing order, and for each pixel (height, width) 1 + the topmost's index.

    None where a thing found no room. Column-major, as COCO's RLE counts.
    """
    top = np.zeros((frame.height, frame.width), np.uint8, order="F")
    visible: Floats = np.zeros(len(things) + 1)  # pixels of each; 0 is the background
    least: Floats = np.zeros(len(things) + 1)
    stamps: list[Stamp] = []
    for index, thing in enumerate(things, start=1):
        alike = [
            i for i, t in enumerate(things[: index - 1], 1) if t.color and t.color == thing.color
        ]
        for attempt in range(PLACEMENTS):
            stamp = _random_shape(thing.kind, frame, random).stamp()
            below = top[stamp.rows, stamp.columns]
            covered = np.bincount(below[stamp.mask], minlength=len(visible))
            # One color on itself has no edge to see: only where there is little room.
            blends = attempt < PLACEMENTS // 2 and covered[alike].any()
            if not blends and (visible - covered >= least)[1:].all():
                break
        else:
            return None
        below[stamp.mask] = index
        visible -= covered
        visible[index] = stamp.mask.sum()
        least[index] = MIN_VISIBLE * visible[index]
        stamps.append(stamp)
    return stamps, top


def _random_shape(kind: str, frame: Frame, random: np.random.Generator) -> Shape:
    """Draw a shape of random size, place, turn and ratio, wholly inside the image."""
    low, high = (max(share * min(frame.width, frame.height), MIN_RADIUS) for share in frame.radius)
    radius = random.uniform(low, high)
    x = random.uniform(radius + 1, frame.width - 2 - radius)
    y = random.uniform(radius + 1, frame.height - 2 - radius)
    turn = math.radians(random.uniform(-frame.turn, frame.turn))
    return Shape(kind, x, y, radius, turn, random.uniform(*RATIOS.get(kind, (1, 1))))


def _circle(along: Floats, across: Floats, radius: float, _: float) -> Mask:
    return along**2 + across**2 <= radius**2


def _ellipse(along: Floats, across: Floats, radius: float, ratio: float) -> Mask:
    return (along * ratio) ** 2 + across**2 <= (radius * ratio) ** 2


def _ring(along: Floats, across: Floats, radius: float, ratio: float) -> Mask:
    squared = along**2 + across**2
    return (squared <= radius**2) & (squared >= (radius * ratio) ** 2)


def _rectangle(along: Floats, across: Floats, radius: float, ratio: float) -> Mask:
    half_length = radius / math.hypot(1, ratio)
    return (abs(along) <= half_length) & (abs(across) <= half_length * ratio)


def _cross(along: Floats, across: Floats, radius: float, ratio: float) -> Mask:
    return _rectangle(along, across, radius, ratio) | _rectangle(across, along, radius, ratio)


def _triangle(along: Floats, across: Floats, radius: float, _: float) -> Mask:
    return _edges_beyond(along, across, 3, radius * math.cos(math.pi / 3)) == 0


def _hexagon(along: Floats, across: Floats, radius: float, _: float) -> Mask:
    return _edges_beyond(along, across, 6, radius * math.cos(math.pi / 6)) == 0


def _star(along: Floats, across: Floats, radius: float, _: float) -> Mask:
    """Cover a pentagram: inside all five lines is its core, beyond one of them a point."""
    return _edges_beyond(along, across, 5, radius * math.cos(math.pi * 2 / 5)) <= 1


def _blob(along: Floats, across: Floats, radius: float, seed: float) -> Mask:
    """Cover an outline through random points around the center, the farthest at `radius`."""
    random = np.random.default_rng(int(seed * 2**32))
    count = random.integers(BLOB_POINTS[0], BLOB_POINTS[1] + 1)
    angles = (np.arange(count) + random.uniform(0, 0.8, count)) * 2 * math.pi / count - math.pi
    near, far = (random.uniform(*reach, count) for reach in BLOB_REACH)
    reach = np.where(random.permutation(count) < count // 2, near, far)
    outline = np.interp(np.arctan2(across, along), angles, reach / reach.max(), period=2 * math.pi)
    return along**2 + across**2 <= (radius * outline) ** 2


def _edges_beyond(
    along: Floats, across: Floats, count: int, distance: float
) -> NDArray[np.integer]:
    """Count the lines that a point is beyond: `count`, evenly turned at `distance` pixels."""
    angles = [2 * math.pi * index / count for index in range(count)]
    beyond = [along * math.cos(a) + across * math.sin(a) > distance for a in angles]
    return np.sum(beyond, axis=0)


INSIDE: dict[str, Callable[[Floats, Floats, float, float], Mask]] = {
    "circle": _circle,
    "rectangle": _rectangle,
    "triangle": _triangle,
    "ellipse": _ellipse,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "hexagon": _hexagon,
    "blob": _blob,
}


def shape_colors(things: Sequence[Thing], random: np.random.Generator) -> list[Color]:
    """Choose a color each, no two the same: near the named one, or with CONTRAST to the others."""
    colors: list[Color] = []
    for thing in things:
        while True:
            color, apart = random.integers(0, 256, 3), CONTRAST
            if thing.color is not None:
                jitter = random.integers(-JITTER, JITTER + 1, 3)
                color, apart = np.clip(COLORS[thing.color] + jitter, 0, 255), JITTER_APART
            if _distance(color, colors) >= apart:
                break
        colors.append(color)
    return colors


def _distance(color: Color, others: Sequence[Color]) -> int:
    """Return the levels to the nearest of `others`, in the channel that differs most, or 256."""
    return min((int(abs(color - other).max()) for other in others), default=256)


def paint_background(
    style: str, width: int, height: int, others: Sequence[Color], random: np.random.Generator
) -> Pixels:
    """Paint around a color with CONTRAST to `others`, or with the most that a few tries reach."""
    candidates = random.integers(0, 256, (CANDIDATES, 3))
    distances = [_distance(color, others) for color in candidates]
    enough = [i for i, d in enumerate(distances) if d >= CONTRAST + SPREAD[style]]
    chosen = enough[0] if enough else int(np.argmax(distances))
    spread = min(SPREAD[style], max(distances[chosen] - CONTRAST, SPREAD[style] // 4))
    color = candidates[chosen]
    if style == "gradient":
        return _gradient(width, height, color, spread, random)
    if style == "texture":
        return _texture(width, height, color, spread, random)
    return np.tile(color.astype(np.uint8), (height, width, 1))


def _gradient(
    width: int, height: int, color: Color, spread: int, random: np.random.Generator
) -> Pixels:
    """Paint from one end of `color` ± spread to the other, in a random direction."""
    turn = random.uniform(0, 2 * math.pi)
    change = random.uniform(-1, 1, 3)
    change *= spread / abs(change).max()
    steps = np.linspace(-1, 1, GRADIENT_STEPS)[:, None]
    table = (color + steps * change).clip(0, 255).astype(np.uint8)  # (GRADIENT_STEPS, 3)
    across, down = abs(math.cos(turn)), abs(math.sin(turn))
    share = (GRADIENT_STEPS - 1) / (across + down)
    x = np.linspace(0, across * share, width).astype(np.int16)
    y = np.linspace(0, down * share, height).astype(np.int16)
    x, y = x[:: 1 if math.cos(turn) > 0 else -1], y[:: 1 if math.sin(turn) > 0 else -1]
    return table[x[None, :] + y[:, None]]


def _texture(
    width: int, height: int, color: Color, spread: int, random: np.random.Generator
) -> Pixels:
    """Paint a repeated tile of random cells of `color` ± spread."""
    size = (TEXTURE_CELLS, TEXTURE_CELLS, 3)
    tile = (color + random.integers(-spread, spread + 1, size)).clip(0, 255).astype(np.uint8)
    cell_height, cell_width = (int(cell) for cell in random.choice(TEXTURE_CELL, 2))
    tile = tile.repeat(cell_height, axis=0).repeat(cell_width, axis=1)
    times = (-(-height // len(tile)), -(-width // tile.shape[1]), 1)
    return np.tile(tile, times)[:height, :width]
