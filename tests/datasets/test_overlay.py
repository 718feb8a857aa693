"""Pictures of objects: outlines seen on any ground, colours kept, labels beside small things."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.overlay import PALETTE, color_of, draw_objects

SIZE = (640, 480)


def _disc(x: int, y: int, radius: int) -> tuple[list[float], dict, np.ndarray]:
    rows, columns = np.mgrid[: SIZE[1], : SIZE[0]]
    inside = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
    box = [float(side) for side in (x - radius, y - radius, x + radius, y + radius)]
    return box, coco_mask.encode(np.asfortranarray(inside, np.uint8)), inside


def _differs(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(pixels.astype(int) - color).max(axis=-1)


def test_what_is_under_a_mask_keeps_its_colour() -> None:
    red = (220, 30, 30)
    box, rle, inside = _disc(300, 200, 60)
    image = Image.new("RGB", SIZE, (90, 90, 90))
    image.paste(red, (0, 0), Image.fromarray(inside))
    drawn = np.asarray(draw_objects(image, np.array([box]), [rle], ["x"], [color_of(0)]))
    middle = drawn[180:220, 280:320]
    assert _differs(middle, red).max() <= 40
    assert (middle[..., 0] > 2 * middle[..., 2]).all()  # red still, under a blue mask
    assert _differs(middle, red).min() > 0  # but filled


@pytest.mark.parametrize("ground", [0, 127, 255, "palette"])
def test_an_outline_is_seen_on_any_ground(ground: int | str) -> None:
    """Around the mask there are pixels far from the ground, whatever the two colours."""
    for index, color in enumerate(PALETTE):
        behind = color if ground == "palette" else (int(ground),) * 3
        box, rle, _ = _disc(300, 200, 60)
        picture = draw_objects(
            Image.new("RGB", SIZE, behind), np.array([box]), [rle], [""], [color_of(index)]
        )
        ring = np.asarray(picture)[200, 355:365]
        assert _differs(ring, behind).max() >= 100


def test_colours_are_apart() -> None:
    distances = [
        np.abs(np.subtract(one, other)).max()
        for i, one in enumerate(PALETTE)
        for other in PALETTE[:i]
    ]
    assert min(distances) >= 60
    assert color_of(len(PALETTE)) == color_of(0)


@pytest.mark.parametrize("place", [(20, 20), (320, 240), (630, 470), (8, 470)])
def test_a_label_covers_no_small_thing(place: tuple[int, int]) -> None:
    """The pixels of a small thing are the same with a label and without one, also at the edge."""
    box, rle, inside = _disc(*place, 8)
    image = Image.new("RGB", SIZE, (90, 90, 90))
    drawn = [
        np.asarray(draw_objects(image, np.array([box]), [rle], [text], [color_of(1)]))
        for text in ("", "a long name 0.97")
    ]
    assert (drawn[0][inside] == drawn[1][inside]).all()
    assert (drawn[0] != drawn[1]).any(axis=-1).sum() > 1000  # the label is there


def test_labels_of_things_side_by_side_are_apart() -> None:
    discs = [_disc(200 + 40 * i, 240, 15) for i in range(4)]
    boxes, rles = np.array([d[0] for d in discs]), [d[1] for d in discs]
    image = Image.new("RGB", SIZE, (90, 90, 90))
    colors = [color_of(i) for i in range(4)]
    drawn = np.asarray(draw_objects(image, boxes, rles, ["name 0.9"] * 4, colors))
    patches = [(_differs(drawn, color) == 0).sum() for color in colors]
    alone = []
    for i, color in enumerate(colors):
        one = draw_objects(image, boxes[i : i + 1], rles[i : i + 1], ["name 0.9"], [color])
        alone.append((_differs(np.asarray(one), color) == 0).sum())
    assert patches == alone  # no patch lies on another one, nor on a thing


@pytest.mark.parametrize("size", [(640, 480), (3840, 2160), (64, 48)])
def test_text_grows_with_the_image(size: tuple[int, int]) -> None:
    """At least 2.5 % of the longer side: 10 pixels of a phone's 400. Never under 11 pixels."""
    box = np.array([[0.3 * size[0], 0.5 * size[1], 0.5 * size[0], 0.7 * size[1]]])
    drawn = np.asarray(
        draw_objects(Image.new("RGB", size, (90, 90, 90)), box, None, ["H"], [color_of(0)])
    )
    patch = (_differs(drawn, color_of(0)) == 0)[: int(0.5 * size[1]) - 1]
    rows = np.flatnonzero(patch.any(axis=1))
    assert rows[-1] - rows[0] + 1 >= max(11, 0.025 * max(size))


def test_a_thing_without_a_mask_is_its_box() -> None:
    image = Image.new("RGB", SIZE, (90, 90, 90))
    drawn = np.asarray(
        draw_objects(image, np.array([[100, 100, 200, 180.0]]), None, [""], [(0, 150, 255)])
    )
    assert (drawn[140, 100] == (0, 150, 255)).all()
    assert (drawn[140, 150] == 90).all()
    assert np.asarray(image)[140, 100].max() == 90  # the image itself is as it was
