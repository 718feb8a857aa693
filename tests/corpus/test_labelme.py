"""LabelMe: masks of its AI tools, JSONs in folders of their own, other systems (FAULTS 12)."""

from __future__ import annotations

import base64
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.datasets.formats.labelme import WRITE_OUT
from tests.corpus.making import (
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


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shape(thing: Thing, kind: str = "polygon", **more: object) -> dict:
    name, x, y, side = thing
    points = {
        "polygon": [[x, y], [x + side, y], [x + side, y + side], [x, y + side]],
        "rectangle": [[x + side, y + side], [x, y]],
        "circle": [[x + side / 2, y + side / 2], [x + side, y + side / 2]],
        "mask": [[x, y], [x + side - 1, y + side - 1]],
    }.get(kind, [[x, y], [x + side, y]])
    mask = png(Image.new("1", (side, side), 1)) if kind == "mask" else None
    own = {"mask": mask} if mask else {}
    return {"label": name, "points": points, "group_id": None, "shape_type": kind, **own, **more}


def document(name: str, shapes: list, **more: object) -> dict:
    sides = {"imageWidth": WIDTH, "imageHeight": HEIGHT}
    return {
        **{"version": "5.4.1", "flags": {}, "shapes": shapes},
        **{"imagePath": name, "imageData": None, **sides, **more},
    }


def labelled(folder: Path, kind: str = "polygon", sub: str = ".", at: str = ".", count: int = 6):
    made = scenes(folder, count, sub)
    for name, things in made.items():
        put(
            folder / at / name.replace("png", "json"),
            document(name, [shape(t, kind) for t in things]),
        )
    return made


@pytest.mark.parametrize("kind", ["polygon", "mask"])
def test_shapes_to_the_pixel(tmp_path, kind):
    """`mask` is what LabelMe 5.3's AI tools make: a PNG of the box's size."""
    made = labelled(tmp_path, kind)
    assert mask_iou(read(tmp_path).train, made) == 1


def test_rectangles_and_circles(tmp_path):
    made = labelled(tmp_path, "rectangle")
    assert things_of(read(tmp_path).train) == sorted_things(made)
    made = labelled(tmp_path, "circle")
    assert mask_iou(read(tmp_path).train, made) > 0.75  # pi / 4


@pytest.mark.parametrize(
    "write",
    [
        lambda name: f"..\\images\\{name}",
        lambda name: f"../images/{name}",
        lambda name: f"C:\\Users\\me\\Desktop\\{name}",
        lambda name: name,
        lambda name: name.replace("img", "old"),  # renamed with its JSON since
    ],
)
@pytest.mark.parametrize("at", ["labels", "annotations", "json", "a/b"])
def test_jsons_apart_from_their_images(tmp_path, write, at):
    made = scenes(tmp_path)
    for name, things in made.items():
        shapes = [shape(t) for t in things]
        put(tmp_path / at / name.replace("png", "json"), document(write(name), shapes))
    assert things_of(read(tmp_path).train) == sorted_things(made)


@pytest.mark.parametrize("layout", ["{0}", "{0}/labels", "labels/{0}"])
def test_splits_by_folder(tmp_path, layout):
    made = {}
    for split, start in (("train", 0), ("val", 20)):
        sub = {"{0}": "{0}", "{0}/labels": "{0}/images", "labels/{0}": "images/{0}"}[layout]
        made[split] = scenes(tmp_path, 3, sub.format(split), start=start)
        for name, things in made[split].items():
            path = tmp_path / layout.format(split) / name.replace("png", "json")
            put(path, document(name, [shape(t) for t in things]))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train"])
    assert things_of(found.splits["valid"]) == sorted_things(made["val"])
    assert not found.kinds


def test_the_same_names_in_folders_of_cameras(tmp_path):
    for camera, start in (("cam1", 0), ("cam2", 20)):
        for name, things in scenes(tmp_path, 3, f"{camera}/images", start=start).items():
            path = tmp_path / camera / "labels" / name.replace("png", "json")
            put(path, document(f"..\\images\\{name}", [shape(t) for t in things]))
    found = read(tmp_path).train
    for camera, start in (("cam1", 0), ("cam2", 20)):
        made = scenes(tmp_path / "again", 3, start=start)
        part = found.subset(i.id for i in found.images if camera in i.path.parts)
        assert things_of(part) == sorted_things(made)


def test_other_jsons_beside_are_passed_over(tmp_path):
    made = labelled(tmp_path)
    put(tmp_path / "aaa.json", {"labels": ["circle"]})
    put(tmp_path / "config.json", [1, 2])
    put(tmp_path / "zzz.json", '{"broken":')
    found = read(tmp_path)
    assert "read as LabelMe" in found.said
    assert things_of(found.train) == sorted_things(made)


def test_labels_in_images_of_all_splits(tmp_path):
    """JSONs in one folder, images in those of splits, whose names no two share."""
    for split, start in (("train", 0), ("val", 20)):
        for name, things in scenes(tmp_path, 3, f"images/{split}", start=start).items():
            own = f"{split}_{name}"
            (tmp_path / f"images/{split}" / name).rename(tmp_path / f"images/{split}" / own)
            path = tmp_path / "labels" / own.replace("png", "json")
            put(path, document(own, [shape(t) for t in things]))
    assert len(read(tmp_path).train.images) == 6


def test_hidden_files_and_links_out(tmp_path):
    folder = tmp_path / "set"
    made = labelled(folder)
    copy = document("img_0.png", [])
    put(folder / ".ipynb_checkpoints/img_0-checkpoint.json", copy)
    put(folder / "__MACOSX/._img_0.json", copy)
    put(folder / "._img_0.json", b"\x00\x05\x16")
    assert things_of(read(folder).train) == sorted_things(made)
    (folder / "out.json").symlink_to(put(tmp_path / "secret.json", copy))
    assert "leads out of the dataset's folder" in refusal(folder)


def test_turned_boxes_of_x_anylabeling(tmp_path):
    made = scenes(tmp_path, sub=".")
    for name, things in made.items():
        shapes = [{**shape(t), "shape_type": "rotation", "direction": 0} for t in things]
        put(tmp_path / name.replace("png", "json"), document(name, shapes))
    assert mask_iou(read(tmp_path).train, made) == 1


def test_points_and_lines_are_left_out_and_counted(tmp_path):
    made = labelled(tmp_path)
    name = next(iter(made))
    others = [shape(made[name][0], kind) for kind in ("point", "line", "linestrip", "points")]
    shapes = [shape(t) for t in made[name]] + others
    put(tmp_path / name.replace("png", "json"), document(name, shapes))
    assert "has shape_type 'line': understood are polygon, rectangle, circle and mask" in refusal(
        tmp_path
    )
    found = read(tmp_path, max_drop=0.3)
    assert found.kinds["shape"] == 4
    assert things_of(found.train) == sorted_things(made)


def test_names_of_no_class(tmp_path):
    made = labelled(tmp_path)
    for name, things in made.items():
        ignored = [shape(("__ignore__", *things[0][1:])), shape(("_background_", *things[1][1:]))]
        shapes = [shape(t) for t in things] + ignored
        put(tmp_path / name.replace("png", "json"), document(name, shapes))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.kinds == {"placeholder": 2}


def test_parts_of_a_group_are_one_object(tmp_path):
    made = scenes(tmp_path, sub=".")
    for name, things in made.items():
        halves = []
        for kind, x, y, side in things:
            for left, width in ((x, side // 2), (x + side // 2, side - side // 2)):
                right, low = left + width, y + side
                points = [[left, y], [right, y], [right, low], [left, low]]
                halves.append(shape((kind, x, y, side), points=points, group_id=kind == "circle"))
        put(tmp_path / name.replace("png", "json"), document(name, halves))
    found = read(tmp_path).train
    assert len(found.annotations) == 12
    assert mask_iou(found, made) == 1


def test_images_that_only_the_jsons_hold_are_written_out_as_advised(tmp_path):
    made = scenes(tmp_path, sub=".")
    for name, things in made.items():
        data = png(Image.open(tmp_path / name))
        shapes = [shape(t) for t in things]
        path = f"C:\\pictures\\{name}"
        put(tmp_path / name.replace("png", "json"), document(path, shapes, imageData=data))
        (tmp_path / name).unlink()
    said = refusal(tmp_path)
    assert "the JSON holds the image as imageData" in said
    assert not list(tmp_path.glob("*.png"))
    words = shlex.split(WRITE_OUT.replace("FOLDER", shlex.quote(str(tmp_path))))
    subprocess.run([sys.executable, *words[1:]], check=True)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)


def spoiled_mask(text: object, points: list | None = None) -> dict:
    made = shape(("circle", 10, 10, 20), "mask")
    return {**made, "mask": text, **({"points": points} if points else {})}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (spoiled_mask(None), "must be a mask as base64 text"),
        (spoiled_mask("!!"), "is no mask in base64"),
        (spoiled_mask(base64.b64encode(b"x" * 99).decode()), "is no PNG mask"),
        (spoiled_mask(png(Image.new("1", (400, 9)))), "larger than its image"),
        (spoiled_mask(png(Image.new("1", (20, 20), 1)), [[0, 0], [90, 90]]), "its two points"),
        (spoiled_mask(png(Image.new("1", (20, 20)))), "covers no pixel"),
        (spoiled_mask("A" * 10_000_000), "of no more pixels than its image"),
        ({"label": "circle", "points": None}, "pairs of finite numbers"),
        ({"label": " ", "points": []}, "must be the class's name"),
        ([], "must be the class's name"),
        (7, "must be the class's name"),
    ],
)
def test_bad_shapes(tmp_path, entry, said):
    made = labelled(tmp_path)
    put(tmp_path / "img_0.json", document("img_0.png", [entry]))
    assert said in refusal(tmp_path)
    kept = read(tmp_path, max_drop=0.1)
    assert things_of(kept.train) == sorted_things({**made, "img_0.png": []})


def test_a_mask_at_the_edge_is_cut_off(tmp_path):
    made = labelled(tmp_path)
    mask = spoiled_mask(png(Image.new("L", (20, 20), 255)), [[150, 110], [169, 129]])
    put(tmp_path / "img_0.json", document("img_0.png", [mask]))
    found = read(tmp_path).train
    (annotation,) = found.annotations_by_image[1]
    assert annotation.bbox_xywh == (150, 110, 10, 10)
    assert np.isclose(annotation.area, 100)
    assert len(found.images) == len(made)


def test_a_document_that_lost_its_shapes(tmp_path):
    labelled(tmp_path)
    put(tmp_path / "img_0.json", json.dumps({"shapes": {}, "imagePath": "img_0.png"}))
    put(tmp_path / "img_1.json", '{"shapes": [')
    said = refusal(tmp_path)
    assert "img_0.json: shapes is {}: must be a list" in said
    assert "img_1.json: broken JSON" in said
