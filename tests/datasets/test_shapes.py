from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.coco import Category, read
from app.datasets.shapes import make_shapes
from app.errors import UserError

SMALL = {"train": 4, "valid": 2, "width": 120, "height": 90}


def read_split(folder: Path):
    return read(folder / "_annotations.coco.json", [folder])


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


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


def test_masks_are_exactly_the_pixels_of_one_colour(tmp_path):
    make_shapes(tmp_path / "set", train=6, width=160, height=120, min_shapes=5, max_shapes=8)
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
