from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as mask_utils

from app.datasets.formats.outlines import polygon_mask
from app.datasets.overlay import color_of
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.masks import place
from app.inference.outputs import PER_IMAGE, coco_results, draw_detections
from app.inference.tables import TABLES
from tests.inference.test_polygons import fill


def _detections(**changes) -> Detections:
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[20:30, 10:30] = 1
    rle = mask_utils.encode(np.asfortranarray(mask))
    values = {
        "boxes_xyxy": np.array([[10, 20, 30, 30]], dtype=np.float32),
        "scores": np.array([0.75], dtype=np.float32),
        "prompt_ids": np.array([1]),
        "prompts": ("cat", "pothole"),
        "masks": [{"size": rle["size"], "counts": rle["counts"].decode()}],
        "width": 60,
        "height": 40,
    }
    return Detections(**{**values, **changes})


def test_an_overlay_changes_what_is_found_and_keeps_the_rest() -> None:
    image = Image.new("RGB", (60, 40), (100, 100, 100))
    drawn = np.array(draw_detections(image, _detections()))
    expected = 100 * (1 - 0.15) + np.array(color_of(1)) * 0.15
    assert np.allclose(drawn[25, 20], expected, atol=1)  # inside the mask
    assert (drawn == color_of(1)).all(axis=-1).any()  # its outline
    assert tuple(drawn[35, 50]) == (100, 100, 100)
    assert np.array_equal(np.array(image), np.full((40, 60, 3), 100))  # the original is untouched


def test_an_overlay_without_masks_or_detections() -> None:
    image = Image.new("RGB", (60, 40))
    assert tuple(np.array(draw_detections(image, _detections(masks=None)))[25, 20]) == (0, 0, 0)
    nothing = _detections(
        boxes_xyxy=np.zeros((0, 4), np.float32),
        scores=np.zeros(0, np.float32),
        prompt_ids=np.zeros(0, int),
        masks=[],
    )
    assert np.array_equal(np.array(draw_detections(image, nothing)), np.array(image))


def test_neighbouring_colors_differ() -> None:
    colors = [np.array(color_of(i)) for i in range(12)]
    assert all(abs(a - b).sum() > 60 for a, b in itertools.pairwise(colors))


def test_coco_results() -> None:
    detections = _detections()
    assert coco_results(detections, 7, [3, 5]) == [
        {
            "image_id": 7,
            "category_id": 5,
            "bbox": [10.0, 20.0, 20.0, 10.0],
            "score": 0.75,
            "segmentation": detections.masks[0],
        }
    ]
    assert "segmentation" not in coco_results(_detections(masks=None), 7, [3, 5])[0]


# --- each kind of output, read again -------------------------------------------------------------

HEIGHT, WIDTH = 80, 120


@pytest.fixture
def found() -> Detections:
    """A ring with an island in its hole; two far parts; a disc under the ring; an empty mask."""
    masks = np.zeros((4, HEIGHT, WIDTH), dtype=np.uint8)
    cv2.circle(masks[0], (40, 40), 30, 1, 8)
    cv2.circle(masks[0], (40, 40), 4, 1, -1)
    masks[1, 0:9, 100:] = masks[1, 60:75, 90:97] = 1
    cv2.circle(masks[2], (40, 40), 20, 1, -1)
    rles = [place(mask.astype(bool), 0, 0, HEIGHT, WIDTH) for mask in masks]
    boxes = np.array([mask_utils.toBbox(rle) for rle in rles], dtype=np.float32)
    boxes[3] = [5, 6, 10, 20]
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes_xyxy=boxes,
        scores=np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32),
        prompt_ids=np.array([1, 0, 1, 0]),
        prompts=("cat", "a/b: *ring*"),
        masks=rles,
        width=WIDTH,
        height=HEIGHT,
    )


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB")


def _write(kind: str, folder: Path, image: Image.Image, found: Detections) -> Path:
    path = folder / PER_IMAGE[kind].path.format("a.b")
    PER_IMAGE[kind].write(path, image, found)
    return path


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def test_yolo_labels_are_the_masks(tmp_path, image, found) -> None:
    path = _write("yolo", tmp_path, image, found)
    assert path == tmp_path / "labels/a.b.txt"
    lines = [line.split() for line in path.read_text().splitlines()]
    assert [int(line[0]) for line in lines] == [1, 0, 1, 0]
    for line, mask in zip(lines[:3], found.bool_masks(), strict=False):
        points = np.array(line[1:], dtype=float).reshape(-1, 2) * [WIDTH, HEIGHT]
        rle = polygon_mask(points.ravel().tolist(), WIDTH, HEIGHT)
        assert _iou(mask_utils.decode(rle).astype(bool), mask) >= 0.98
    assert np.allclose(
        np.array(lines[3][1:], dtype=float) * ([WIDTH, HEIGHT] * 2), [10, 16, 10, 20]
    )


def test_instances_are_numbered_with_the_highest_score_on_top(tmp_path, image, found) -> None:
    read = Image.open(_write("instances", tmp_path, image, found))
    assert read.mode == "I;16"
    ids, masks = np.array(read), found.bool_masks()
    assert np.array_equal(ids == 1, masks[0])
    assert np.array_equal(ids == 2, masks[1])
    assert np.array_equal(ids == 3, masks[2] & ~masks[0])
    assert ids.max() == 3


def test_more_instances_than_16_bits_hold_are_refused(tmp_path, image, found) -> None:
    many = found.select(np.zeros(65_536, dtype=int))
    with pytest.raises(UserError, match="65536 of them do not fit"):
        _write("instances", tmp_path, image, many)
    _write("semantic", tmp_path, image, found.select(np.zeros(3, dtype=int)))


def test_a_semantic_mask_has_the_prompts_numbers(tmp_path, image, found) -> None:
    ids = np.array(Image.open(_write("semantic", tmp_path, image, found)))
    ring, parts, disc, _ = found.bool_masks()
    assert np.array_equal(ids == 2, ring | disc)
    assert np.array_equal(ids == 1, parts)
    path, write = TABLES["semantic"]
    write(tmp_path / path, [], found.prompts)
    legend = json.loads((tmp_path / "semantic/legend.json").read_text())
    assert legend == {"0": "background", "1": "cat", "2": "a/b: *ring*"}


def test_cutouts_are_the_objects_with_their_masks_as_alpha(tmp_path, image, found) -> None:
    folder = _write("cutouts", tmp_path, image, found)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["001_a-b-ring_6_6.png", "002_cat_90_0.png", "003_a-b-ring_20_20.png"]
    for name, mask in zip(names, found.bool_masks(), strict=False):
        cut = Image.open(folder / name)
        left, top = map(int, name.removesuffix(".png").split("_")[-2:])
        alpha = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        alpha[top : top + cut.height, left : left + cut.width] = np.array(cut)[..., 3]
        assert np.array_equal(alpha, mask * 255)
        behind = np.array(image)[top : top + cut.height, left : left + cut.width]
        assert np.array_equal(np.array(cut)[..., :3], behind)


def test_geojson_has_the_masks_with_their_holes(tmp_path, image, found) -> None:
    read = json.loads(_write("geojson", tmp_path, image, found).read_text())
    assert (read["type"], read["image"]) == ("FeatureCollection", {"width": 120, "height": 80})
    features = read["features"]
    for feature, mask in zip(features[:3], found.bool_masks(), strict=False):
        assert np.array_equal(fill(feature["geometry"]["coordinates"], HEIGHT, WIDTH), mask)
    assert [len(polygon) for polygon in features[0]["geometry"]["coordinates"]] == [2, 1]
    assert features[0]["properties"] == {
        **{"prompt": "a/b: *ring*", "category_id": 2},
        "score": pytest.approx(0.9),
    }
    assert features[3]["geometry"]["coordinates"][0][0][:2] == [[5, 6], [15, 6]]


def _entries(found: Detections) -> list[tuple[int, dict]]:
    results = coco_results(found, 0, [1, 2])
    size = {"width": WIDTH, "height": HEIGHT}
    return [
        (3, {"file_name": "x/a,b.png", **size, "found": results}),
        (4, {"file_name": "x/empty.png", **size, "found": []}),
    ]


def test_a_csv_has_a_row_an_object(tmp_path, found) -> None:
    path, write = TABLES["csv"]
    write(tmp_path / path, _entries(found), found.prompts)
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["instance"] for row in rows] == ["1", "2", "3", "4"]
    for row, mask, box in zip(rows, found.bool_masks(), found.boxes_xyxy, strict=True):
        assert (row["file_name"], row["image_id"]) == ("x/a,b.png", "3")
        assert int(row["area"]) == mask.sum()
        size = [int(row["image_height"]), int(row["image_width"])]
        assert np.array_equal(mask_utils.decode({"size": size, "counts": row["counts"]}), mask)
        x, y, w, h = (float(row[key]) for key in ("x", "y", "width", "height"))
        assert np.allclose([x, y, x + w, y + h], box)
    assert [row["prompt"] for row in rows] == ["a/b: *ring*", "cat"] * 2


def test_coco_results_of_a_run(tmp_path, found) -> None:
    path, write = TABLES["coco"]
    write(tmp_path / path, _entries(found), found.prompts)
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert [r["segmentation"] for r in results] == found.masks
    assert {(r["image_id"], r["file_name"]) for r in results} == {(3, "x/a,b.png")}
    write(tmp_path / path, [], found.prompts)
    assert json.loads((tmp_path / "predictions.json").read_text()) == []


def test_yolos_classes_are_the_prompts(tmp_path, found) -> None:
    path, write = TABLES["yolo"]
    write(tmp_path / path, [], found.prompts)
    assert yaml.safe_load((tmp_path / path).read_text()) == {"names": ["cat", "a/b: *ring*"]}


def _boxes_only(found: Detections) -> Detections:
    return Detections(**{**vars(found), "masks": None})


def test_without_a_mask_head_boxes_are_written_or_it_is_said(tmp_path, image, found) -> None:
    boxes = _boxes_only(found)
    for kind in ("instances", "semantic", "cutouts"):
        with pytest.raises(UserError, match=f"--save {kind}: these weights have no mask head"):
            _write(kind, tmp_path, image, boxes)
    assert len(_write("yolo", tmp_path, image, boxes).read_text().split()) == 4 * 5
    read = json.loads(_write("geojson", tmp_path, image, boxes).read_text())
    assert len(read["features"]) == 4
    TABLES["csv"][1](tmp_path / "a.csv", _entries(boxes), found.prompts)
    assert (tmp_path / "a.csv").read_text().splitlines()[1].endswith(",,120,80,")


@pytest.mark.parametrize("kind", PER_IMAGE)
def test_nothing_found_is_written_as_well(tmp_path, image, found, kind) -> None:
    assert _write(kind, tmp_path, image, found.select([])).exists()
