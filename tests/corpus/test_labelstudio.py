"""Label Studio's exports (labelstud.io/guide/export): JSON, YOLO, COCO, and those not read."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from app.datasets.formats.embedded import brush_mask
from tests.corpus.making import (
    CLASSES,
    HEIGHT,
    WIDTH,
    Thing,
    coco,
    mask_iou,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
    yolo,
)


def packed(mask: np.ndarray, literal: bool = False) -> list[int]:
    """Pack an alpha mask as thi.ng's rle-pack does: run lengths of 3, 4, 8 and 16 bits."""
    values = np.repeat(mask.ravel().astype(np.uint8) * 255, 4)
    sizes = [3, 4, 8, 16]
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    at = 0
    while at < len(values):
        end = at + 1
        if literal:
            end = min(at + 200, len(values))
        else:
            while end < len(values) and values[end] == values[at] and end - at < 60000:
                end += 1
        count = end - at - 1
        index = next(i for i, size in enumerate(sizes) if count < 2**size)
        bits += f"{int(not literal)}{index:02b}{count:0{sizes[index]}b}"
        words = values[at:end] if literal else values[at : at + 1]
        bits += "".join(f"{word:08b}" for word in words)
        at = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def result(thing: Thing, kind: str = "rectangle", **more: object) -> dict:
    name, x, y, side = thing
    px, py, pw, ph = 100 * x / WIDTH, 100 * y / HEIGHT, 100 * side / WIDTH, 100 * side / HEIGHT
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + side, x : x + side] = True
    value = {
        "rectangle": {"x": px, "y": py, "width": pw, "height": ph, "rotation": 0},
        "polygon": {
            "points": [[px, py], [px + pw, py], [px + pw, py + ph], [px, py + ph]],
            "closed": True,
        },
        "ellipse": {"x": px + pw / 2, "y": py + ph / 2, "radiusX": pw / 2, "radiusY": ph / 2},
        "brush": {"format": "rle", "rle": packed(mask) if kind == "brush" else []},
        "keypoint": {"x": px, "y": py, "width": 0.5},
    }[kind]
    return {
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": {**value, f"{kind}labels": [name]},
        **{"id": "Dx_aB91ISN", "from_name": "label", "to_name": "image", "type": f"{kind}labels"},
        **more,
    }


def task(image: str, results: list, **more: object) -> dict:
    annotation = {"id": 1, "was_cancelled": False, "result": results, "lead_time": 1.5}
    return {
        **{"id": 7, "annotations": [annotation], "file_upload": "x", "predictions": []},
        **{"data": {"image": image}, "meta": {}, **more},
    }


def tasks(made: dict[str, list[Thing]], kind: str = "rectangle", name: str = "{}") -> list[dict]:
    return [task(name.format(n), [result(t, kind) for t in its]) for n, its in made.items()]


def test_rectangles(tmp_path):
    made = scenes(tmp_path)
    put(tmp_path / "project-1-at-2026-01-02-03-04-1234abcd.json", tasks(made))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.said.startswith("no COCO JSON: read as Label Studio")
    assert not found.kinds


@pytest.mark.parametrize(("kind", "least"), [("polygon", 1), ("brush", 1), ("ellipse", 0.75)])
def test_masks(tmp_path, kind, least):
    made = scenes(tmp_path)
    put(tmp_path / "export.json", tasks(made, kind))
    assert mask_iou(read(tmp_path).train, made) >= least


@pytest.mark.parametrize(
    "name",
    [
        "/data/upload/1/1a2b3c4d-{}",  # uploaded by hand: 8 digits are put before the name
        "/data/upload/{}",
        "/data/local-files/?d=photos/{}",
        "/data/local-files/?d=C%3A%5Cphotos%5C{}",
        "s3://bucket/some/{}",
        "https://example.org/a/{}?token=x",
        "../../upload/1/{}",
        "images\\{}",
        "http://localhost:8080/data/upload/1/1a2b3c4d-{}",
    ],
)
def test_names_of_images(tmp_path, name):
    made = scenes(tmp_path)
    put(tmp_path / "export.json", tasks(made, name=name))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)


@pytest.mark.parametrize("literal", [False, True])
def test_brush_strokes_are_unpacked(literal):
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5
    assert np.array_equal(brush_mask(packed(mask, literal), WIDTH, HEIGHT), mask)


def test_the_packing_of_label_studios_own_converter():
    """encode_rle of label-studio-sdk, for 2 x 1 pixels of which the second is set."""
    # 8 words; words of 8 bits; lengths of 3, 4, 8, 16 bits; 4 x 0 and 4 x 255, repeated
    bits = (
        f"{8:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}"
        + f"100{3:03b}{0:08b}"
        + f"100{3:03b}{255:08b}"
    )
    bits += "0" * (-len(bits) % 8)
    numbers = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert brush_mask(numbers, 2, 1).tolist() == [[False, True]]


def test_a_rectangle_turns_clockwise_around_its_upper_left_corner(tmp_path):
    scenes(tmp_path, 2)
    regions = [result(("car", 60, 50, 30)), result(("car", 60, 50, 30))]
    regions[0]["value"] |= {"rotation": 90, "width": 100 * 40 / WIDTH, "height": 100 * 10 / HEIGHT}
    regions[1]["value"] |= {"rotation": 30, "width": 100 * 40 / WIDTH, "height": 100 * 10 / HEIGHT}
    put(tmp_path / "e.json", [task(f"img_{i}.png", [r]) for i, r in enumerate(regions)])
    upright, slanted = read(tmp_path).train.annotations
    assert upright.bbox_xywh == (50, 50, 10, 40)
    mask = coco_mask.decode(slanted.segmentation)
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    for along, across, inside in ((20, 5, 1), (38, 8, 1), (20, -3, 0), (20, 13, 0), (44, 5, 0)):
        x, y = 60 + along * cos - across * sin, 50 + along * sin + across * cos
        assert mask[int(y), int(x)] == inside


def test_the_last_annotation_counts_and_cancelled_ones_do_not(tmp_path):
    made = scenes(tmp_path)
    document = tasks(made)
    wrong = [result(("circle", 1, 1, 99))]
    for index, entry in enumerate(document):
        (right,) = entry["annotations"]
        right["updated_at"] = "2026-02-03T10:00:00.000000Z"
        old = {"result": wrong, "updated_at": "2026-02-02T10:00:00.000000Z", "was_cancelled": False}
        skipped = {"result": wrong, "updated_at": "2027-01-01", "was_cancelled": True}
        entry["annotations"] = [[right, old, skipped], [skipped, old, right]][index % 2]
        entry["predictions"] = [{"result": wrong, "updated_at": "2028"}]
    put(tmp_path / "export.json", document)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.kinds == {"several labels": 6}
    assert "updated 2026-02-03" in found.said


def test_tasks_without_annotations_are_not_taken_for_empty_images(tmp_path):
    made = scenes(tmp_path, 8)
    document = tasks(made)
    document[0]["annotations"] = []
    document[1]["annotations"][0]["was_cancelled"] = True
    document[2]["annotations"][0]["result"] = []  # submitted: there is nothing in it
    put(tmp_path / "export.json", document)
    found = read(tmp_path)
    del made["img_0.png"], made["img_1.png"]
    assert things_of(found.train) == sorted_things({**made, "img_2.png": []})
    assert found.kinds == {"unlisted": 1}
    assert "2 tasks have no annotation" in found.said


# The template for OCR, and choices of a region: HumanSignal/label-studio-converter,
# tests/data/test_export_yolo/data.json
def test_what_is_said_of_a_region_is_no_region_of_its_own(tmp_path):
    made = scenes(tmp_path)
    listed = tasks(made)
    for entry in listed:
        results = entry["annotations"][0]["result"]
        for number, region in enumerate(list(results)):
            place = {k: v for k, v in region["value"].items() if not k.endswith("labels")}
            own = {**region, "id": f"region {number}"}
            region["id"] = own["id"]
            results.insert(0, {**own, "type": "rectangle", "value": place})
            results.append({**own, "type": "textarea", "value": {**place, "text": ["ABC 1"]}})
            results.append({**own, "type": "choices", "value": {**place, "choices": ["unsure"]}})
    put(tmp_path / "export.json", listed)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.kinds == {"tag": 1}
    assert "24 results" in found.said


def test_the_choice_of_a_region_without_labels_is_its_class(tmp_path):
    made = scenes(tmp_path)
    listed = tasks(made)
    for entry in listed:
        results = entry["annotations"][0]["result"]
        for number, region in enumerate(list(results)):
            (name,) = region["value"].pop("rectanglelabels")
            region.update(id=f"region {number}", type="rectangle")
            value = {**region["value"], "choices": [name]}
            results.append({**region, "type": "choices", "value": value})
    put(tmp_path / "export.json", listed)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert not found.kinds
    for entry in listed:  # of several choices none is the class
        for result in entry["annotations"][0]["result"]:
            if "choices" in result["value"]:
                result["value"]["choices"].append("unsure")
    put(tmp_path / "export.json", listed)
    assert "must be the class's name" in refusal(tmp_path)


# dagshub-annotation-converter 0.3.0, tests/label_studio_video/res/sample_task.json
def test_videos_are_named(tmp_path):
    made = scenes(tmp_path)
    film = task("/data/upload/film.mp4", [result(t) for t in made["img_0.png"]])
    put(tmp_path / "export.json", [*tasks(made), film])
    assert "film.mp4': is a video: label images of its frames" in refusal(tmp_path)


def test_choices_are_passed_over_and_keypoints_left_out(tmp_path):
    made = scenes(tmp_path)
    document = tasks(made)
    choice = {
        "value": {"choices": ["good"]},
        "from_name": "c",
        "to_name": "image",
        "type": "choices",
    }
    document[0]["annotations"][0]["result"].append(choice)
    put(tmp_path / "export.json", document)
    found = read(tmp_path)
    assert found.kinds == {"tag": 1}
    assert things_of(found.train) == sorted_things(made)
    document[0]["annotations"][0]["result"].append(result(("eye", 9, 9, 9), "keypoint"))
    put(tmp_path / "export.json", document)
    assert "is none of rectangles, polygons" in refusal(tmp_path)
    assert read(tmp_path, max_drop=0.1).kinds == {"tag": 1, "shape": 1}


def test_other_ways_to_write_it(tmp_path):
    """`completions` of old versions, `labels` in place of `rectanglelabels`, a key of one's own."""
    made = scenes(tmp_path)
    document = tasks(made)
    for entry in document:
        entry["completions"] = entry.pop("annotations")
        entry["data"] = {"caption": "see x", "photo": entry["data"]["image"]}
        for found in entry["completions"][0]["result"]:
            found["to_name"] = "photo"
            found["value"]["labels"] = found["value"].pop("rectanglelabels")
            del found["original_width"], found["image_rotation"]
    put(tmp_path / "export.json", document)
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_two_labels_of_a_region_are_two_objects(tmp_path):
    scenes(tmp_path, 3)
    region = result(("circle", 10, 10, 30))
    region["value"]["rectanglelabels"] = ["circle", "red"]
    put(tmp_path / "e.json", [task(f"img_{i}.png", [region]) for i in range(3)])
    assert len(read(tmp_path).train.annotations) == 6


def test_splits_by_the_names_of_files_and_a_task_a_file(tmp_path):
    for split, start in (("train", 0), ("val", 20)):
        made = scenes(tmp_path, 3, f"images/{split}", start=start)
        put(tmp_path / f"{split}.json", tasks({f"{split}/{n}": its for n, its in made.items()}))
    found = read(tmp_path)
    assert (len(found.train.images), len(found.splits["valid"].images)) == (3, 3)
    folder = tmp_path / "apart"
    made = scenes(folder)
    for index, entry in enumerate(tasks(made)):
        put(folder / f"annotations/{index}_test.json", entry)
    assert things_of(read(folder).train) == sorted_things(made)


def test_a_file_an_annotation_as_its_storages_have_them(tmp_path):
    made = scenes(tmp_path)
    for index, entry in enumerate(tasks(made)):
        (annotation,) = entry.pop("annotations")
        put(tmp_path / f"annotations/{index}.json", {**annotation, "task": entry})
    assert things_of(read(tmp_path).train) == sorted_things(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": None}, "must have finite numbers"),
        ({"x": float("nan")}, "must have finite numbers"),
        ({"width": 0}, "must have a width and a height"),
        ({"x": 120}, "lies outside its image"),
        ({"rectanglelabels": []}, "must be the class's name"),
        ({"rectanglelabels": [7]}, "must be the class's name"),
        ({"points": [[1, 2], 3]}, "pairs of x and y"),
        ({"points": [[1, 2], [3, "x"], [4, 5]]}, "must have finite numbers"),
        ({"points": [[1, 2], [3, 4]]}, "three or more"),
        ({"radiusX": -1, "radiusY": 2}, "radius above 0"),
        ({"rle": None}, "must be a brush stroke"),
        ({"rle": [1, 2, 3]}, "must be a brush stroke"),
        ({"rle": [255] * 99}, "must be a brush stroke of 160 x 120"),
        ({"rle": packed(np.ones((HEIGHT, WIDTH)))[:12]}, "must be a brush stroke"),
        ({"rle": packed(np.zeros((HEIGHT, WIDTH)))}, "covers no pixel"),
        ({"rle": [300]}, "must be a brush stroke"),
    ],
)
def test_bad_regions_are_named(tmp_path, change, said):
    made = scenes(tmp_path)
    document = tasks(made)
    region = result(made["img_0.png"][0])
    region["value"] |= change
    document[0]["annotations"][0]["result"] = [region]
    put(tmp_path / "export.json", document)
    assert said in refusal(tmp_path)
    assert things_of(read(tmp_path, max_drop=0.1).train) == sorted_things({**made, "img_0.png": []})


def test_bad_tasks_are_named(tmp_path):
    made = scenes(tmp_path)
    document = tasks(made)
    document[0]["data"] = {"image": "/etc/passwd"}
    document[1]["annotations"][0]["result"][0]["original_width"] = 99
    document[2]["data"] = {"image": "data:image/png;base64,AAAA" * 400}
    document[3]["data"] = {"images": ["a.png", "b.png"]}
    document[4]["annotations"][0]["result"][0]["image_rotation"] = 90
    document[5] = 7
    put(tmp_path / "export.json", document)
    said = refusal(tmp_path)
    for part in (
        *("[0]: data is '/etc/passwd': no such file", "[1]: result[0] is (99, 120): must be"),
        *("[2]: data is", "[3]: data is ['a.png', 'b.png']", "turned by 90", "[5] is 7"),
    ):
        assert part in said
    put(tmp_path / "export.json", '[{"data": {}, "annotations": [{"result": [}]')
    assert "broken JSON" in refusal(tmp_path, "labelstudio")


# its YOLO export: classes.txt, notes.json, images/, labels/ (HumanSignal/label-studio#7294)
def test_its_yolo(tmp_path):
    made = scenes(tmp_path)
    put(tmp_path / "classes.txt", "\n".join(CLASSES))
    categories = [{"id": id, "name": name} for id, name in enumerate(CLASSES)]
    put(tmp_path / "notes.json", {"categories": categories, "info": {"year": 2026, "version": "1"}})
    for name, things in made.items():
        put(tmp_path / "labels" / name.replace("png", "txt"), yolo(things))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert "read as YOLO" in found.said


# its COCO export: result.json and images/, names as of the system it ran on (label-studio#6608)
@pytest.mark.parametrize(
    "name", ["images\\{}", "images/{}", "../../upload/1/{}", "/data/upload/{}"]
)
def test_its_coco(tmp_path, name):
    made = scenes(tmp_path)
    put(tmp_path / "result.json", coco({name.format(n): things for n, things in made.items()}))
    assert things_of(read(tmp_path).train) == sorted_things(made)
