"""Supervisely (developer.supervisely.com, annotation format): ann/, img/ and meta.json."""

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.corpus.making import (
    CLASSES,
    HEIGHT,
    WIDTH,
    Thing,
    mask_iou,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
)


def bitmap(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(zlib.compress(buffer.getvalue())).decode()


def entry(thing: Thing, kind: str = "rectangle", **more: object) -> dict:
    name, x, y, side = thing
    last = {"rectangle": side - 1}.get(kind, side)
    corners = [[x, y], [x + last, y + last]]
    outline = [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]
    points = {"exterior": outline if kind == "polygon" else corners, "interior": []}
    own = {"points": points} if kind != "bitmap" else {}
    if kind == "bitmap":  # white, and seen where its alpha is
        drawn = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        own = {"bitmap": {"data": bitmap(drawn), "origin": [x, y]}}
    return {"id": 1, "classId": 2, "classTitle": name, "geometryType": kind, **own, **more}


def document(objects: list, tags: tuple[str, ...] = ()) -> dict:
    size = {"height": HEIGHT, "width": WIDTH}
    listed = [{"name": tag, "value": None} for tag in tags]
    return {"description": "", "tags": listed, "size": size, "objects": objects}


def project(folder: Path, kind: str = "rectangle", dataset: str = "ds1", start: int = 0):
    made = scenes(folder, 6, f"{dataset}/img", start=start)
    for name, things in made.items():
        objects = [entry(thing, kind) for thing in things]
        put(folder / dataset / "ann" / f"{name}.json", document(objects))
    classes = [{"title": name, "shape": kind, "color": "#00ff00"} for name in CLASSES]
    put(folder / "meta.json", {"classes": classes, "tags": [], "projectType": "images"})
    return made


def test_rectangles(tmp_path):
    made = project(tmp_path)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.said.startswith("no COCO JSON: read as Supervisely")
    assert not found.kinds
    assert things_of(read(tmp_path / "ds1").train) == sorted_things(made)  # a dataset by itself


@pytest.mark.parametrize("kind", ["polygon", "bitmap"])
def test_masks(tmp_path, kind):
    made = project(tmp_path, kind)
    assert mask_iou(read(tmp_path).train, made) == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA"])
def test_bitmaps_of_any_mode(tmp_path, mode):
    made = project(tmp_path)
    drawn = Image.new("L", (30, 20), 0)
    drawn.paste(255, (0, 0, 10, 20))
    if mode == "P":
        picture = Image.fromarray((np.asarray(drawn) > 0).astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 255, 255, 255])
    elif mode in ("RGBA", "LA"):
        picture = Image.new(mode, (30, 20))
        picture.putalpha(drawn)
    else:
        picture = drawn.convert(mode)
    one = entry(made["img_0.png"][0], "bitmap", bitmap={"data": bitmap(picture), "origin": [5, 6]})
    put(tmp_path / "ds1/ann/img_0.png.json", document([one]))
    (annotation,) = read(tmp_path).train.annotations_by_image[1]
    assert annotation.bbox_xywh == (5, 6, 10, 20)


def test_holes_of_polygons(tmp_path):
    made = project(tmp_path, "polygon")
    one = entry(("circle", 10, 10, 30), "polygon")
    one["points"]["interior"] = [[[15, 15], [25, 15], [25, 25], [15, 25]]]
    put(tmp_path / "ds1/ann/img_0.png.json", document([one]))
    (annotation,) = read(tmp_path).train.annotations_by_image[1]
    mask = coco_mask.decode(annotation.segmentation)
    assert mask.sum() == 30 * 30 - 10 * 10
    assert not mask[20, 20]
    assert len(made) == 6


def test_datasets_are_splits_by_their_names(tmp_path):
    starts = {"train": 0, "val": 20}
    made = {name: project(tmp_path, dataset=name, start=start) for name, start in starts.items()}
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train"])
    assert things_of(found.splits["valid"]) == sorted_things(made["val"])


def test_datasets_of_other_names_are_all_trained_on(tmp_path):
    project(tmp_path, dataset="monday")
    project(tmp_path, dataset="tuesday", start=20)
    found = read(tmp_path)
    assert len(found.train.images) == 12
    assert len({image.path for image in found.train.images}) == 12
    project(tmp_path, dataset="val", start=40)
    assert "the datasets 'monday', 'tuesday': beside others that are splits" in refusal(tmp_path)


def test_tags_are_splits(tmp_path):
    made = project(tmp_path)
    tags = ["train", "train", "Train", "val", "test", "night"]
    for (name, things), tag in zip(made.items(), tags, strict=True):
        put(tmp_path / "ds1/ann" / f"{name}.json", document([entry(t) for t in things], (tag,)))
    found = read(tmp_path)
    assert {split: len(part.images) for split, part in found.splits.items()} == {
        **{"train": 3, "valid": 1, "test": 1}
    }
    assert "1 images have no tag train or val, such as img_5.png" in found.said
    assert found.kinds == {"unlisted": 1}


# supervisely/docs, assets/legacy/all_images/json_format_demo: objects do not say their shape
@pytest.mark.parametrize("kind", ["rectangle", "polygon", "bitmap"])
@pytest.mark.parametrize("listed", ["classes.json", "meta.json"])
def test_shapes_that_only_the_classes_say(tmp_path, kind, listed):
    made = project(tmp_path, kind)
    for path in (tmp_path / "ds1/ann").iterdir():
        written = json.loads(path.read_text())
        for one in written["objects"]:
            del one["geometryType"]
            one.setdefault("bitmap", None)
        put(path, written)
    if listed == "classes.json":
        classes = json.loads((tmp_path / "meta.json").read_text())["classes"]
        (tmp_path / "meta.json").unlink()
        put(tmp_path / "classes.json", classes)
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_names_without_the_ending_as_older_projects_have_them(tmp_path):
    made = project(tmp_path)
    for name in made:
        path = tmp_path / "ds1/ann" / f"{name}.json"
        path.rename(path.with_name(name.replace("png", "json")))
    assert things_of(read(tmp_path).train) == sorted_things(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"geometryType": "point"}, "is a point: understood are rectangle, polygon and bitmap"),
        ({"geometryType": "line"}, "is a line"),
        ({"classTitle": ""}, "must be the class's name"),
        ({"points": None}, "must have two corners"),
        ({"points": {"exterior": [[1, 2], [3, float("nan")]]}}, "pairs of finite numbers"),
        ({"geometryType": "polygon", "points": {"exterior": [[1, 2]]}}, "three or more"),
        ({"geometryType": "bitmap"}, "must have points"),
        (
            {"geometryType": "bitmap", "bitmap": {"data": "AAAA", "origin": [1, 2]}},
            "is no PNG mask",
        ),
        ({"geometryType": "bitmap", "bitmap": {"data": 7, "origin": [1, 2]}}, "as base64 text"),
        (
            {
                "geometryType": "bitmap",
                "bitmap": {"data": bitmap(Image.new("1", (500, 5), 1)), "origin": [1, 2]},
            },
            "larger than its image",
        ),
        (
            {
                "geometryType": "bitmap",
                "bitmap": {
                    "data": base64.b64encode(zlib.compress(bytes(50_000_000))).decode(),
                    "origin": [1, 2],
                },
            },
            "is no PNG mask",  # unpacked no further than an image of this size can be
        ),
    ],
)
def test_bad_objects_are_named(tmp_path, change, said):
    made = project(tmp_path)
    one = {**entry(made["img_0.png"][0]), **change}
    put(tmp_path / "ds1/ann/img_0.png.json", document([one]))
    assert said in refusal(tmp_path)
    assert things_of(read(tmp_path, max_drop=0.1).train) == sorted_things({**made, "img_0.png": []})


def test_bad_files_are_named(tmp_path):
    project(tmp_path)
    at = tmp_path / "ds1/ann"
    put(at / "img_0.png.json", '{"objects"')
    put(at / "img_1.png.json", {"size": {"width": 9, "height": 9}, "objects": []})
    put(at / "img_2.png.json", {"size": 7, "objects": {}})
    put(at / "ghost.png.json", document([]))
    put(at / "img_3.png.json", json.dumps([1]))
    said = refusal(tmp_path)
    for part in (
        "broken JSON",
        "must be the image's 160 x 120",
        "objects is {}",
        "'ghost.png': no",
    ):
        assert part in said
