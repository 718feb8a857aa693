from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from app.config.shapes import KINDS
from app.datasets.coco import Category, read
from app.datasets.synthetic import shapes
from app.datasets.synthetic.drawing import COLORS, JITTER, Shape
from app.errors import UserError

# Crowded, small and clear, where the defaults are few, large and in fog.
PLAIN = {"fog": 0.0, "radius": [0.08, 0.25], "max_shapes": 5}
SMALL = {"train": 4, "valid": 2, "width": 120, "height": 90}


def make_shapes(output: Path, **settings) -> None:
    shapes.make_shapes(output, **(PLAIN | settings))


def read_split(folder: Path):
    return read(folder / "_annotations.coco.json", [folder])


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def things(folder: Path):
    """Category name, mask, pixels of the image, of each annotation."""
    dataset = read_split(folder)
    names = {category.id: category.name for category in dataset.categories}
    for image in dataset.images:
        pixels = np.asarray(Image.open(image.path))
        for annotation in dataset.annotations_by_image[image.id]:
            mask = coco_mask.decode(annotation.segmentation).astype(bool)
            yield names[annotation.category_id], mask, pixels


def nearest_color(color) -> str:
    return min(COLORS, key=lambda name: np.square(np.subtract(COLORS[name], color)).sum())


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        make_shapes(tmp_path / name, seed=seed, **SMALL)
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys()
    assert not any(one[name] == three[name] for name in one)


def test_the_set_is_as_asked_for(tmp_path):
    make_shapes(tmp_path / "set", min_shapes=3, max_shapes=4, **SMALL)
    for split, count in (("train", 4), ("valid", 2)):
        dataset = read_split(tmp_path / "set" / split)
        assert len(dataset.images) == count
        assert dataset.categories == tuple(
            Category(id, name) for id, name in enumerate(("circle", "rectangle", "triangle"), 1)
        )
        for image in dataset.images:
            with Image.open(image.path) as file:
                assert file.size == (image.width, image.height) == (120, 90)
            assert 3 <= len(dataset.annotations_by_image[image.id]) <= 4


@pytest.mark.parametrize("background", ["plain", "gradient", "texture", "mixed"])
def test_masks_are_exactly_the_pixels_of_one_color(tmp_path, background):
    size = {"train": 8, "width": 160, "height": 120, "min_shapes": 5, "max_shapes": 8}
    make_shapes(tmp_path / "set", kinds=KINDS, background=background, **size)
    dataset = read_split(tmp_path / "set" / "train")
    for image in dataset.images:
        pixels, colours = np.asarray(Image.open(image.path)), []
        for annotation in dataset.annotations_by_image[image.id]:
            mask = coco_mask.decode(annotation.segmentation).astype(bool)
            colour = pixels[mask][0]
            assert (mask == (pixels == colour).all(axis=-1)).all()
            assert all(abs(colour - other).max() >= 40 for other in colours)
            colours.append(colour.astype(int))
            rows, columns = np.nonzero(mask)
            x, y, w, h = annotation.bbox_xywh
            assert (x, y) == (columns.min(), rows.min())
            assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)
            assert annotation.area == mask.sum()


def test_half_of_the_least_circle_stays_visible(tmp_path):
    make_shapes(tmp_path / "set", train=8, valid=0, min_shapes=8, max_shapes=8, seed=1)
    dataset = read_split(tmp_path / "set" / "train")
    circles = [a for a in dataset.annotations if a.category_id == 1]
    least = 0.5 * np.pi * (0.06 * 480) ** 2
    assert min(a.area for a in circles) > 0.97 * least
    areas = [a.area / (a.bbox_xywh[2] * a.bbox_xywh[3]) for a in circles]
    assert max(areas) == pytest.approx(np.pi / 4, rel=0.02)  # a whole circle fills pi/4 of its box


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("args", [(1, 1, 3), (2, 1, 2), (3, 1, 1)])
def test_every_class_occurs_in_the_smallest_training_sets(tmp_path, seed, args):
    train, low, high = args
    size = {"width": 64, "height": 64, "seed": seed}
    make_shapes(tmp_path / "s", train=train, valid=0, min_shapes=low, max_shapes=high, **size)
    dataset = read_split(tmp_path / "s" / "train")
    assert {a.category_id for a in dataset.annotations} == {1, 2, 3}
    assert not (tmp_path / "s" / "valid").exists()


def test_the_training_split_does_not_depend_on_the_validation_split(tmp_path):
    make_shapes(tmp_path / "one", train=3, valid=1, width=64, height=64)
    make_shapes(tmp_path / "two", train=3, valid=2, width=64, height=64)
    images = [contents(tmp_path / name / "train" / "images") for name in ("one", "two")]
    assert images[0] == images[1]


@pytest.mark.parametrize("seed", range(5))
def test_crowded_small_images_are_made_and_every_shape_can_be_seen(tmp_path, seed):
    size = {"width": 32, "height": 32, "seed": seed}
    make_shapes(tmp_path / "s", train=3, valid=0, min_shapes=12, max_shapes=12, **size)
    annotations = read_split(tmp_path / "s" / "train").annotations
    assert len(annotations) == 36
    assert min(a.area for a in annotations) >= 8  # pixels


def test_settings_out_of_range_are_all_named(tmp_path):
    with pytest.raises(UserError) as caught:
        make_shapes(tmp_path / "s", train=0, valid=-1, width=1, min_shapes=6, seed=-1)
    text = str(caught.value)
    for key in ("train is 0", "valid is -1", "width is 1", "min_shapes is 6", "seed is -1"):
        assert key in text
    assert not (tmp_path / "s").exists()


def test_too_few_shapes_for_every_class(tmp_path):
    with pytest.raises(UserError, match="cannot hold each of circle"):
        make_shapes(tmp_path / "s", train=1, min_shapes=2, max_shapes=2)


def test_other_peoples_files_are_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    make_shapes(tmp_path / "mine", **SMALL)  # an empty folder holds nothing to lose
    make_shapes(tmp_path / "mine", **{**SMALL, "train": 3})  # nor does an earlier set
    assert len(read_split(tmp_path / "mine" / "train").images) == 3
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("dear to me")
    with pytest.raises(UserError, match="photos: holds something other"):
        make_shapes(tmp_path / "photos", **SMALL)
    assert contents(tmp_path / "photos") == {"cat.jpg": b"dear to me"}


def test_a_set_that_fails_leaves_the_one_before(tmp_path):
    make_shapes(tmp_path / "s", **SMALL)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes: no image can be written whole
    try:
        with pytest.raises(OSError, match="too large"):
            make_shapes(tmp_path / "s", **{**SMALL, "seed": 9})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_the_settings_are_kept_in_the_json(tmp_path):
    make_shapes(tmp_path / "s", **SMALL)
    document = json.loads((tmp_path / "s" / "train" / "_annotations.coco.json").read_text())
    assert SMALL.items() <= document["info"].items()


def test_masks_in_named_colors_are_exact_on_plain_backgrounds(tmp_path):
    size = {"train": 8, "width": 160, "height": 120, "min_shapes": 8, "max_shapes": 8}
    named = {"kinds": KINDS, "colors": ["red", "blue"], "label_by": "both"}
    make_shapes(tmp_path / "set", background="plain", **named, **size)
    for name, mask, pixels in things(tmp_path / "set" / "train"):
        color = pixels[mask][0].astype(int)
        assert (mask == (pixels == color).all(axis=-1)).all()
        assert nearest_color(color) == name.split()[0]
        assert abs(color - COLORS[name.split()[0]]).max() <= JITTER


AREAS = {  # of radius 1 and that ratio
    "circle": lambda ratio: math.pi,
    "ellipse": lambda ratio: math.pi * ratio,
    "ring": lambda ratio: math.pi * (1 - ratio**2),
    "rectangle": lambda ratio: 4 * ratio / (1 + ratio**2),
    "cross": lambda ratio: 4 * (2 * ratio - ratio**2) / (1 + ratio**2),
    "triangle": lambda ratio: 3 * math.sqrt(3) / 4,
    "hexagon": lambda ratio: 3 * math.sqrt(3) / 2,
    "star": lambda ratio: (
        5 * math.sin(math.pi / 5) * math.sin(math.pi / 10) / math.cos(math.pi / 5)
    ),
}


@pytest.mark.parametrize("kind", AREAS)
@pytest.mark.parametrize("turn", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("ratio", [0.4, 0.65])
def test_area_is_that_of_the_formula(kind, turn, ratio):
    for radius in (30.3, 75.0):
        mask = Shape(kind, 100.2, 90.7, radius, turn, ratio).stamp().mask
        assert mask.sum() == pytest.approx(AREAS[kind](ratio) * radius**2, rel=0.03)


def test_a_shape_stays_inside_its_circle_and_reaches_it():
    for kind in KINDS:
        rows, columns, mask = Shape(kind, 60.0, 50.0, 40.0, 0.3, 0.5).stamp()
        y, x = np.nonzero(mask)
        farthest = np.hypot(y + rows.start - 50, x + columns.start - 60).max()
        assert 38 < farthest <= 40 + 1e-9, kind


def test_no_two_blobs_are_alike():
    def area(seed: float, radius: float) -> float:
        return Shape("blob", 100.0, 100.0, radius, 0.0, seed).stamp().mask.sum() / radius**2

    areas = [area(seed, 60.0) for seed in np.linspace(0, 0.99, 50)]
    assert len({round(value, 3) for value in areas}) > 45
    assert min(areas) < 1.3 < 2.0 < max(areas)  # thin ones and full ones; a circle has 3.14
    assert area(0.5, 80.0) == pytest.approx(area(0.5, 40.0), rel=0.03)  # one outline, of any size


def test_a_ring_has_its_hole(tmp_path):
    one = {"min_shapes": 1, "max_shapes": 1, "background": "plain"}
    make_shapes(tmp_path / "s", train=6, valid=0, width=200, height=160, kinds=["ring"], **one)
    for _, mask, pixels in things(tmp_path / "s" / "train"):
        rows, columns = np.nonzero(mask)
        center = round(rows.mean()), round(columns.mean())
        assert not mask[center]
        assert (pixels[center] == pixels[0, 0]).all()  # the background shows through
        outer = np.pi / 4 * (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert 0.48 < mask.sum() / outer < 0.78  # 1 - ratio squared, of 0.5 to 0.7


@pytest.mark.parametrize(
    ("label_by", "names"),
    [
        ("kind", ["circle", "star"]),
        ("color", ["red thing", "blue thing"]),
        ("both", ["red circle", "blue circle", "red star", "blue star"]),
    ],
)
def test_categories_are_what_label_by_says(tmp_path, label_by, names):
    words = {"kinds": ["circle", "star"], "colors": ["red", "blue"], "label_by": label_by}
    make_shapes(tmp_path / "s", train=3, valid=0, width=64, height=64, **words)
    dataset = read_split(tmp_path / "s" / "train")
    assert dataset.class_names == names
    assert {a.category_id for a in dataset.annotations} == {c.id for c in dataset.categories}
    for name, mask, pixels in things(tmp_path / "s" / "train"):
        if label_by != "kind":
            assert nearest_color(pixels[mask][0]) == name.split()[0]


def test_excluded_pairs_never_occur(tmp_path):
    words = {"kinds": ["circle", "star"], "colors": ["red", "blue"], "exclude": ["red circle"]}
    size = {"train": 12, "valid": 0, "width": 96, "height": 96}
    make_shapes(tmp_path / "both", label_by="both", **words, **size)
    assert read_split(tmp_path / "both" / "train").class_names == [
        *("blue circle", "red star", "blue star")
    ]
    make_shapes(tmp_path / "kind", **words, **size)
    drawn = {
        (name, nearest_color(pixels[mask][0]))
        for name, mask, pixels in things(tmp_path / "kind" / "train")
    }
    assert drawn == {("circle", "blue"), ("star", "red"), ("star", "blue")}


def test_backgrounds_differ(tmp_path):
    def colors_behind(background: str) -> list[int]:
        folder = tmp_path / background
        make_shapes(folder, train=8, valid=0, width=128, height=96, background=background)
        dataset, counts = read_split(folder / "train"), []
        for image in dataset.images:
            pixels, behind = np.asarray(Image.open(image.path)), np.ones((96, 128), bool)
            for annotation in dataset.annotations_by_image[image.id]:
                behind &= ~coco_mask.decode(annotation.segmentation).astype(bool)
            counts.append(len(np.unique(pixels[behind], axis=0)))
        return counts

    assert set(colors_behind("plain")) == {1}
    gradient, texture = colors_behind("gradient"), colors_behind("texture")
    assert min(gradient) > 10
    assert max(gradient) <= 256 < 0.5 * max(texture)
    mixed = colors_behind("mixed")
    assert min(mixed) == 1 < max(mixed)


def test_fog_takes_contrast_and_no_mask(tmp_path):
    for name, fog in (("clear", 0), ("fog", 0.8)):
        make_shapes(tmp_path / name, fog=fog, **SMALL)
    pairs = zip(
        things(tmp_path / "clear" / "train"), things(tmp_path / "fog" / "train"), strict=True
    )
    for (name, mask, clear), (same, same_mask, faint) in pairs:
        assert name == same
        assert (mask == same_mask).all()
        expected = 0.2 * clear.astype(float) + 0.8 * np.array([200, 205, 210])
        assert abs(faint - expected).max() <= 0.5


def test_workers_change_no_byte(tmp_path):
    words = {"kinds": KINDS, "colors": list(COLORS), "label_by": "both", "train": 22, "valid": 3}
    for workers in (1, 2, 5):
        make_shapes(tmp_path / str(workers), workers=workers, width=96, height=64, **words)
    one, two, five = (contents(tmp_path / name) for name in "125")
    assert len(one) == 27
    assert one == two == five


@pytest.mark.parametrize("seed", range(3))
def test_every_pair_occurs_where_there_is_just_room(tmp_path, seed):
    words = {"kinds": KINDS[:4], "colors": ["red", "blue", "white"], "label_by": "both"}
    make_shapes(tmp_path / "s", train=3, valid=1, min_shapes=1, max_shapes=4, seed=seed, **words)
    assert len({a.category_id for a in read_split(tmp_path / "s" / "train").annotations}) == 12


def test_names_that_are_not_known_are_all_said(tmp_path):
    words = {"kinds": ["circle", "squid"], "colors": ["red", "blu"], "exclude": ["red star"]}
    choices = {"label_by": "shape", "background": "plaid", "train": 0, "max_shapes": 13}
    with pytest.raises(UserError) as caught:
        make_shapes(tmp_path / "s", **words, **choices)
    assert len(caught.value.problems) == 7
    text = str(caught.value)
    for part in ("'squid'", "Did you mean 'blue'", "'red star'", "'shape'", "Did you mean 'plain'"):
        assert part in text
    assert "train is 0" in text
    assert "max_shapes is 13" in text
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"kinds": []}, "kinds is empty"),
        ({"kinds": ["star", "star"]}, "kinds names one twice"),
        ({"label_by": "both"}, "needs colors"),
        ({"exclude": ["red circle"]}, "no such color and kind"),
        ({"kinds": ["star"], "colors": ["red"], "exclude": ["red star"]}, "nothing to draw"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        make_shapes(tmp_path / "s", **words)


def test_radius_and_turn_are_as_asked_for(tmp_path):
    """Upright rectangles whose corners lie on circles of one radius: their diagonals are alike."""
    make_shapes(
        tmp_path / "s", train=6, valid=0, width=200, height=100, kinds=["rectangle"], turn=0,
        radius=[0.2, 0.2], max_shapes=2,
    )  # fmt: skip
    whole = 0
    for _, mask, _ in things(tmp_path / "s" / "train"):
        rows, columns = np.nonzero(mask)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if mask.sum() == height * width:  # nothing lies over it: a rectangle fills its box
            whole += 1
            assert math.hypot(height, width) == pytest.approx(2 * 20, abs=1.5)
    assert whole >= 4
    make_shapes(
        tmp_path / "t", train=4, valid=0, kinds=["rectangle"], turn=180, radius=[0.2, 0.2], **SIZE
    )
    filled = [mask.sum() / _box_area(mask) for _, mask, _ in things(tmp_path / "t" / "train")]
    assert min(filled) < 0.8


def test_shapes_too_large_for_their_number_are_drawn_smaller(tmp_path):
    make_shapes(
        tmp_path / "s", train=2, valid=0, min_shapes=12, max_shapes=12, radius=[0.4, 0.45], **SIZE
    )
    assert len(list(things(tmp_path / "s" / "train"))) == 24


@pytest.mark.parametrize("radius", [[0.3, 0.2], [0, 0.2], [0.1, 0.5], [0.1]])
def test_a_radius_out_of_range(tmp_path, radius):
    with pytest.raises(UserError, match="radius is"):
        make_shapes(tmp_path / "s", radius=radius, **SMALL)


SIZE = {"width": 120, "height": 90}


def _box_area(mask) -> int:
    rows, columns = np.nonzero(mask)
    return (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
