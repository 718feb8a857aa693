from __future__ import annotations

import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.build import decode, survey
from app.datasets.check import Doubled, keep_doubled
from app.datasets.check import check as check_document
from app.datasets.faults import KINDS, Action, Findings, lines, page
from app.datasets.geometry import clip_box, decode_counts
from app.datasets.image_files import find_files
from app.datasets.images import open_image
from app.datasets.names import Names
from tests.datasets.conftest import SQUARE, noise, sound_document
from tests.helpers import REPOSITORY

DROPPED, REFUSED = Action.DROPPED, Action.REFUSED


def check(document: Any, where: str) -> list[str]:
    """What is said of a document's own faults, those that only mend it left out."""
    found = Findings(where)
    check_document(document, found)
    return lines(fault for fault in found.faults if fault.action in (DROPPED, REFUSED))


NAN, INF = float("nan"), float("inf")


def test_a_sound_document_has_no_problems(document):
    assert check(document, "f.json") == []


@pytest.mark.parametrize("root", [None, [], "text", 3, True, NAN])
def test_a_root_that_is_no_object(root):
    (problem,) = check(root, "f.json")
    assert problem.startswith("f.json: its top level is")


def test_missing_lists_are_all_named():
    problems = check({"images": {}}, "f.json")
    assert len(problems) == 3
    for key, problem in zip(("images", "annotations", "categories"), problems, strict=True):
        assert f"'{key}'" in problem


def spoil(document: dict[str, Any], path: str, value: Any) -> None:
    """Set `document[a][1][b]` for the path `a.1.b`."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target: Any = document
    for part in parents:
        target = target[part]
    target[last] = value


RLE = {"size": [30, 40]}
BAD_VALUES = [
    ("images.0", 7, "must be a JSON object"),
    ("images.0.id", "1", "whole number"),
    ("images.0.id", True, "whole number"),
    ("images.0.id", 2**63, "whole number"),
    ("images.0.id", 2, "taken by images[0]"),
    ("images.0.width", 0, "number of pixels"),
    ("images.0.width", 40.0, "number of pixels"),
    ("images.0.height", True, "number of pixels"),
    ("images.0.height", 65536, "number of pixels"),
    ("images.0.file_name", None, "must be the image's path"),
    ("images.0.file_name", "", "must be the image's path"),
    ("images.0.file_name", "\ud800.png", "must be the image's path"),
    ("images.0.file_name", "a\0.png", "must be the image's path"),
    ("categories.0.id", None, "whole number"),
    ("categories.0.id", 4, "taken by categories[0]"),
    ("categories.0.name", " ", "class's name"),
    ("categories.0.name", 5, "class's name"),
    ("categories.0.name", "cat ", "also the name of"),
    ("annotations.0", [], "must be a JSON object"),
    ("annotations.0.iscrowd", "1", "0 or 1"),
    ("annotations.0.image_id", 9, "no image"),
    ("annotations.0.image_id", [1], "no image"),
    ("annotations.0.category_id", 9, "no category"),
    ("annotations.0.category_id", "3", "no category"),
    ("annotations.0.iscrowd", 2, "0 or 1"),
    ("annotations.0.bbox", [1, 2, 3], "four finite numbers"),
    ("annotations.0.bbox", [1, 2, 3, "4"], "four finite numbers"),
    ("annotations.0.bbox", [1, 2, NAN, 4], "four finite numbers"),
    ("annotations.0.bbox", [1, -INF, 3, 4], "four finite numbers"),
    ("annotations.0.bbox", [1, 2, True, 4], "four finite numbers"),
    ("annotations.0.bbox", [1, 2, 10**400, 4], "four finite numbers"),
    ("annotations.0.bbox", [1, 2, 0, 4], "above 0"),
    ("annotations.0.bbox", [1, 2, 3, -4], "above 0"),
    ("annotations.0.bbox", [40, 0, 5, 5], "outside its image"),
    ("annotations.0.bbox", [-5, 0, 5, 5], "outside its image"),
    ("annotations.2.bbox", None, "no segmentation"),
    ("annotations.0.segmentation", "abc", "list of polygons"),
    ("annotations.0.segmentation", SQUARE, "list of polygons"),
    ("annotations.0.segmentation", [[[1, 2], [3, 4], [5, 6]]], "flat list"),
    ("annotations.0.segmentation", [[]], "polygon of 0 numbers"),
    ("annotations.0.segmentation", [[1, 1, 9, 9]], "polygon of 4 numbers"),
    ("annotations.0.segmentation", [SQUARE, [*SQUARE, 3]], "polygon of 9 numbers"),
    ("annotations.0.segmentation", [[NAN, *SQUARE[1:]]], "finite"),
    ("annotations.0.segmentation", [[INF, *SQUARE[1:]]], "finite"),
    ("annotations.0.segmentation", [[1e9, *SQUARE[1:]]], "leaves its image"),
    ("annotations.0.segmentation", [[-1e9, *SQUARE[1:]]], "leaves its image"),
    ("annotations.0.segmentation", [[0, 0, 40, 30] * 60_000], "outline"),
    ("annotations.0.segmentation", {}, "image's size"),
    ("annotations.0.segmentation", {"size": [40, 30], "counts": [1200]}, "image's size"),
    ("annotations.0.segmentation", {"size": [30, 40.0], "counts": [1200]}, "image's size"),
    ("annotations.0.segmentation", {**RLE}, "must have 'counts'"),
    ("annotations.0.segmentation", {**RLE, "counts": [5, 5]}, "sum to"),
    ("annotations.0.segmentation", {**RLE, "counts": []}, "sum to"),
    ("annotations.0.segmentation", {**RLE, "counts": [1210, -10]}, "run lengths"),
    ("annotations.0.segmentation", {**RLE, "counts": [1200.0]}, "run lengths"),
    ("annotations.0.segmentation", {**RLE, "counts": [True, 1199]}, "run lengths"),
    ("annotations.0.segmentation", {**RLE, "counts": [2**32, 1200]}, "run lengths"),
    ("annotations.0.segmentation", {**RLE, "counts": ""}, "damaged or cut short"),
    ("annotations.0.segmentation", {**RLE, "counts": "05L"}, "sum to"),
    ("annotations.0.segmentation", {**RLE, "counts": "0P"}, "damaged or cut short"),
    ("annotations.0.segmentation", {**RLE, "counts": "0é5"}, "damaged or cut short"),
    ("annotations.0.segmentation", {**RLE, "counts": "o" * 7 + "1"}, "7 characters"),
]


@pytest.mark.parametrize(("path", "value", "says"), BAD_VALUES)
def test_a_bad_value_is_reported_with_its_place(document, path, value, says):
    spoil(document, path, value)
    problems = check(document, "f.json")
    head, _, tail = path.partition(".")
    index = int(tail.split(".")[0])
    # a repeated id is reported at its second place
    places = (f"f.json: {head}[{index}]", f"f.json: {head}[{index + 1}]")
    assert any(says in problem and problem.startswith(places) for problem in problems), problems


def test_all_problems_are_listed_and_a_thousand_of_one_kind_are_counted(document):
    template = document["annotations"][0]
    document["annotations"] = [{**template, "id": i, "bbox": [0, 0, 0, 0]} for i in range(1000)]
    document["images"][1]["width"] = -1
    problems = check(document, "f.json")
    assert len(problems) == 22
    assert "images[1].width is -1" in problems[0]
    assert problems[-1] == "f.json: and 980 more problems of this kind (bbox empty)"


def test_long_values_are_cut_short(document):
    document["categories"][0]["name"] = ""
    document["annotations"][0]["bbox"] = ["x" * 10_000] * 1000
    assert all(len(problem) < 700 for problem in check(document, "f.json"))


def test_clip_box():
    assert clip_box([1.1, 2.2, 3.3, 4.4], 40, 30) == (1.1, 2.2, 3.3, 4.4)
    assert clip_box([-5, 20, 100, 100], 40, 30) == (0, 20, 40, 10)


@given(
    st.integers(1, 12).flatmap(
        lambda h: st.lists(st.lists(st.booleans(), min_size=h, max_size=h), min_size=1, max_size=12)
    )
)
@settings(max_examples=100, deadline=None)
def test_decode_counts_agrees_with_the_mask_that_was_encoded(columns):
    mask = np.array(columns, dtype=np.uint8).T  # (height, width)
    flat = mask.ravel(order="F").tolist()
    runs = [len(list(group)) for _, group in groupby(flat)]
    expected = [0, *runs] if flat[0] else runs
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    assert decode_counts(counts, mask.size).tolist() == expected
    assert decode_counts(expected, mask.size).tolist() == expected


def test_decode_counts_of_a_mask_of_2_to_the_30_pixels():
    runs = [2**29 + 5, 7, 2**29 - 12]
    rle = coco_mask.frPyObjects({"size": [2**15, 2**15], "counts": runs}, 2**15, 2**15)
    assert decode_counts(rle["counts"].decode(), 2**30).tolist() == runs


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
@settings(max_examples=300, deadline=None)
def test_decode_counts_takes_only_strings_that_fill_the_mask(counts):
    try:
        runs = decode_counts(counts, 12)
    except ValueError:
        return
    assert runs.min() >= 0
    assert runs.sum() == 12


def files_problems(folder: Path, document: dict[str, Any]) -> list[str]:
    found = Findings("f.json")
    entries = [(f"images[{i}]", entry) for i, entry in enumerate(document["images"])]
    find_files(entries, Names([folder]), found)
    return lines(fault for fault in found.faults if fault.action in (DROPPED, REFUSED))


def test_a_missing_image_names_the_folders_searched(document, save):
    folder = save(document)
    (folder / "b.png").unlink()
    (problem,) = files_problems(folder, document)
    assert "images[1].file_name is 'b.png': no such file" in problem
    assert str(folder / "images") in problem


@pytest.mark.parametrize("size", [0, 4, 20, 30])
def test_a_file_that_is_no_image_or_lost_its_header(document, save, size):
    folder = save(document)
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:size])
    (problem,) = files_problems(folder, document)
    assert "cannot be opened as an image" in problem


def test_an_image_of_another_size(document, save):
    folder = save(document)
    Image.new("L", (41, 30)).save(folder / "a.png")
    (problem,) = files_problems(folder, document)
    assert "41 x 30 pixels, and its labels say 40 x 30" in problem


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_after_exif_rotation(document, save, orientation):
    folder = save(document)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(folder / "a.jpg", exif=exif)
    document["images"][0]["file_name"] = "a.jpg"
    problems = files_problems(folder, document)
    if orientation < 5:
        assert problems == []
    else:
        assert "30 x 40 pixels once turned as its EXIF orientation says" in problems[0]
        document["images"][0].update(width=30, height=40)
        assert files_problems(folder, document) == []


def test_a_link_out_of_the_dataset_is_refused_and_one_inside_is_not(document, save, tmp_path):
    folder = save(document)
    (folder / "a.png").rename(tmp_path / "outside.png")
    (folder / "a.png").symlink_to(tmp_path / "outside.png")
    (problem,) = files_problems(folder, document)
    assert "link that leads out of the dataset" in problem
    (folder / "a.png").unlink()
    (tmp_path / "outside.png").rename(folder / "c.png")
    (folder / "a.png").symlink_to("c.png")
    assert files_problems(folder, document) == []


def test_two_entries_for_one_file(document, save):
    folder = save(document)
    document["images"][1]["file_name"] = "./a.png"
    (problem,) = files_problems(folder, document)
    assert "same file as images[0]" in problem


def test_a_name_longer_than_file_systems_take_is_a_missing_file(document, save):
    folder = save(document)
    document["images"][0]["file_name"] = "x" * 5000
    (problem,) = files_problems(folder, document)
    assert "no such file" in problem


# --- each fault of a dataset: its kind, what becomes of it, and where it is said to be ------------


def faults_of(folder: Path) -> list[tuple[str, str, str]]:
    """Kind, action and place of every fault that a check finds, pixels included."""
    found = decode(survey(folder), folder, lambda _: None)
    return [(fault.kind, str(fault.action), fault.place) for fault in found.faults]


def removed(path: str) -> Callable[[Any], None]:
    """A change of a document: the key at `a.1.b` is gone."""

    def remove(document: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            document = document[part]
        del document[last]

    return remove


def changed(path: str, value: Any) -> Callable[[Any], None]:
    return lambda document: spoil(document, path, value)


BOXES = "annotations[0].bbox"
MASKS = "annotations[0].segmentation"
CORNERS = [10, 5, 20, 15]  # of the sound document's square
EACH_FAULT = [
    (changed("annotations.0.segmentation.0.2", NAN), "polygon", "dropped", MASKS),
    (changed("annotations.0.segmentation.0.2", INF), "polygon", "dropped", MASKS),
    (changed("annotations.0.segmentation.0.2", 1e9), "polygon", "dropped", MASKS),
    (changed("annotations.0.segmentation.0", SQUARE[:7]), "polygon", "dropped", MASKS),
    (changed("annotations.0.segmentation.0", SQUARE[:4]), "polygon", "dropped", MASKS),
    (changed("annotations.2.bbox", None), "no geometry", "dropped", "annotations[2].bbox"),
    (changed("annotations.0.segmentation", {**RLE, "counts": [9, 9]}), "RLE", "dropped", MASKS),
    (changed("annotations.0.segmentation", {**RLE, "counts": [1201]}), "RLE", "dropped", MASKS),
    (
        changed("annotations.0.segmentation", {"size": [40, 30], "counts": [600, 600]}),
        *("RLE", "dropped", MASKS),
    ),
    (changed("images.0.width", 0), "image size", "dropped", "images[0].width"),
    (changed("images.0.height", -30), "image size", "dropped", "images[0].height"),
    (changed("images.0.width", 10**9), "image size", "dropped", "images[0].width"),
    (changed("images.1.width", 41), "other size", "dropped", "images[1].file_name"),
    (
        changed("annotations.0.segmentation", {**RLE, "counts": [1200]}),
        *("zero area", "dropped", MASKS),
    ),
    (removed("annotations.0.iscrowd"), "no iscrowd", "mended", "annotations[0].iscrowd"),
    (removed("annotations.0.area"), "no area", "mended", "annotations[0].area"),
    (changed("annotations.0.area", NAN), "no area", "mended", "annotations[0].area"),
    (changed("annotations.0.area", -1), "no area", "mended", "annotations[0].area"),
    (removed("annotations.0.bbox"), "no bbox", "mended", BOXES),
    (removed("annotations.0.id"), "annotation id", "mended", "annotations[0].id"),
    (changed("annotations.0.id", "1"), "annotation id", "mended", "annotations[0].id"),
    (changed("annotations.1.id", 1), "annotation id", "mended", "annotations[1].id"),
    (changed("annotations.0.iscrowd", 2), "iscrowd", "dropped", "annotations[0].iscrowd"),
    (changed("annotations.0.bbox", [10, 5, -10, 10]), "bbox empty", "dropped", BOXES),
    (changed("annotations.0.bbox", [10, 5, 0, 10]), "bbox empty", "dropped", BOXES),
    (changed("annotations.0.bbox", [50, 5, 9, 9]), "bbox outside", "dropped", BOXES),
    (
        changed("annotations.2.bbox", [-5, 5, 25, 10]),
        *("bbox clipped", "mended", "annotations[2].bbox"),
    ),
    (changed("annotations.0.bbox", [1, NAN, 3, 4]), "bbox", "dropped", BOXES),
    (changed("annotations.0.bbox", CORNERS), "box convention", "dropped", BOXES),
    (changed("images.1.id", 1), "image id", "refused", "images[1].id"),
    (removed("images.1.id"), "image id", "refused", "images[1].id"),
    (changed("categories.1.id", 3), "category id", "refused", "categories[1].id"),
    (
        changed("annotations.0.image_id", 9),
        *("image reference", "dropped", "annotations[0].image_id"),
    ),
    (
        changed("annotations.0.category_id", 9),
        *("category reference", "dropped", "annotations[0].category_id"),
    ),
    (changed("images", []), "empty", "refused", "'images'"),
    (changed("annotations", []), "empty", "refused", "train: 'annotations'"),
    (changed("categories", []), "empty", "refused", "'categories'"),
    (removed("images"), "root", "refused", "'images'"),
    (removed("annotations"), "root", "refused", "'annotations'"),
    (removed("categories"), "root", "refused", "'categories'"),
    (changed("categories.0.name", ""), "category name", "refused", "categories[0].name"),
    (changed("categories.0.name", "x" * 10_240), "category name", "refused", "categories[0].name"),
    (changed("categories.0.name", "cat"), "alike names", "refused", "categories[1].name"),
    (changed("categories.1.name", "DOG"), "alike names", "refused", "categories[1].name"),
    (changed("categories.0.name", "dog "), "space in name", "mended", "categories[0].name"),
    (changed("images.0.file_name", "../a.png"), "other name", "mended", "images[0].file_name"),
    (changed("images.0.file_name", "/x/a.png"), "other name", "mended", "images[0].file_name"),
    (changed("images.0.file_name", "a\0.png"), "file name", "dropped", "images[0].file_name"),
    (changed("images.0.file_name", "c.png"), "image missing", "dropped", "images[0].file_name"),
    (changed("images.0.file_name", "b.png"), "listed twice", "refused", "images[1].file_name"),
    (
        changed("categories", [{"id": 0, "name": "things"}, *sound_document()["categories"]]),
        *("placeholder", "mended", "categories[0].name"),
    ),
]


@pytest.mark.parametrize(("change", "kind", "action", "place"), EACH_FAULT)
def test_each_fault_of_a_json_has_its_kind(complete, save, change, kind, action, place):
    folder = save(complete)
    change(complete)
    (folder / "_annotations.coco.json").write_text(json.dumps(complete))
    assert (kind, action, place) in faults_of(folder)
    others = {found[0] for found in faults_of(folder)} - {kind, "unlisted"}
    # a second id for one image makes the annotations of the id that is gone dangle
    assert others <= {"image reference", "category reference"}


@pytest.fixture
def complete(document):
    """The sound document with every key that may be left out, and so without any fault."""
    document["annotations"][1].update(bbox=[1, 2, 2, 3], area=6)
    document["annotations"][2].update(iscrowd=0, area=30)
    return document


def test_the_complete_document_has_no_fault(complete, save):
    assert faults_of(save(complete)) == []


def test_corners_without_masks_are_told_from_the_whole_file(complete, save):
    """Boxes alone: many that are inside as corners and leave as sizes; a few that leave are cut."""
    random = np.random.default_rng(0)
    template = {"category_id": 3, "iscrowd": 0, "area": 9, "image_id": 1}
    corners = np.concatenate([random.integers(0, 15, (20, 2)), random.integers(18, 30, (20, 2))], 1)
    complete["annotations"] = [
        {**template, "id": i + 1, "bbox": box.tolist()} for i, box in enumerate(corners)
    ]
    assert {(kind, action) for kind, action, _ in faults_of(save(complete))} == {
        ("box convention", "dropped")
    }
    for annotation in complete["annotations"]:
        x1, y1, x2, y2 = annotation["bbox"]
        annotation["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    complete["annotations"][0]["bbox"] = [30, 20, 38, 28]
    assert faults_of(save(complete)) == [("bbox clipped", "mended", "annotations[0].bbox")]


RAW = [
    ('{"images": [', "JSON", "refused"),
    ('\ufeff{"images": [], "annotations": [], "categories": []}', "BOM", "mended"),
    ("[]", "root", "refused"),
    ("null", "root", "refused"),
    ('{"images": [], "images": [], "annotations": []}', "duplicate key", "refused"),
    ('{"images": [{"id": 1, "id": 2}], "annotations": []}', "duplicate key", "refused"),
    ('{"images": [7], "annotations": [], "categories": []}', "entry", "dropped"),
]


@pytest.mark.parametrize(("text", "kind", "action"), RAW)
def test_each_fault_of_the_files_text(tmp_path, text, kind, action):
    (tmp_path / "_annotations.coco.json").write_text(text)
    assert (kind, action) in {found[:2] for found in faults_of(tmp_path)}


def test_a_key_twice_in_an_annotation_is_placed(complete, save):
    folder = save(complete)
    path = folder / "_annotations.coco.json"
    path.write_text(
        path.read_text().replace('"bbox": [0, 0', '"bbox": [1, 1, 2, 2], "bbox": [0, 0')
    )
    assert faults_of(folder) == [("duplicate key", "refused", "annotations[2]: 'bbox'")]


def save_as(mode: str, **options: Any) -> Callable[[Path], None]:
    return lambda path: noise("a").convert(mode).save(path, **options)


def bomb(path: Path) -> None:
    """A few bytes that say they are 60,000 x 60,000 pixels."""
    noise("a").save(path)
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = path.read_bytes()
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


def truncated(path: Path) -> None:
    """Cut within its pixels: the header is whole, and `verify` has nothing to say of JPEG."""
    noise("a").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-400])
    with Image.open(path) as image:
        image.verify()


EACH_IMAGE = [
    (truncated, "image damaged", "dropped"),
    (lambda path: path.write_bytes(b""), "image empty", "dropped"),
    (lambda path: path.write_text("<html>not found</html>"), "no image", "dropped"),
    (
        lambda path: path.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>'),
        "no image",
        "dropped",
    ),
    (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40)), "no image", "dropped"),
    (bomb, "image enormous", "dropped"),
    (save_as("CMYK", format="JPEG"), "CMYK", "mended"),
    (save_as("P", format="PNG"), "palette", "mended"),
    (save_as("RGBA", format="PNG"), "alpha", "mended"),
    (save_as("LA", format="PNG"), "alpha", "mended"),
    (save_as("I;16", format="PNG"), "bits", "mended"),
    (lambda path: noise("a", (8, 30)).save(path), "image tiny", "dropped"),
]


@pytest.mark.parametrize(("spoil_file", "kind", "action"), EACH_IMAGE)
def test_each_fault_of_an_image_file(complete, save, spoil_file, kind, action):
    folder = save(complete)
    spoil_file(folder / "a.png")
    found = faults_of(folder)
    assert [fault[:2] for fault in found] == [(kind, action)]
    assert found[0][2] in ("images[0].file_name", "a.png")


def test_exif_is_mended_and_a_link_out_is_refused(complete, save, tmp_path):
    folder = save(complete)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise("a", (30, 40)).save(folder / "a.png", exif=exif)
    assert faults_of(folder) == [("EXIF", "mended", "images[0].file_name")]
    (folder / "a.png").rename(tmp_path / "a.png")
    (folder / "a.png").symlink_to(tmp_path / "a.png")
    assert faults_of(folder) == [("link", "dropped", "images[0].file_name")]


def test_one_image_in_two_splits_is_told_by_its_pixels(complete, save, tmp_path):
    for split in ("train", "valid"):
        save(complete, f"set/{split}")
    folder = tmp_path / "set"
    assert faults_of(folder) == []
    Image.open(folder / "valid" / "b.png").save(folder / "train" / "a.png", compress_level=1)
    assert faults_of(folder) == [("in two splits", "dropped", "train/a.png")]
    shutil.copyfile(folder / "train" / "b.png", folder / "train" / "a.png")
    ((kind, action, place),) = faults_of(folder)
    assert (kind, action) == ("image twice", "warning")
    assert place == "train/b.png"


def test_a_test_split_that_is_the_validation_split_is_left_away(complete, save, tmp_path):
    for split in ("train", "valid", "test"):
        save(complete, f"set/{split}")
    for path in (tmp_path / "set/valid").glob("*.png"):
        shutil.copyfile(path, tmp_path / "set/test" / path.name)
    assert faults_of(tmp_path / "set") == [("same splits", "mended", "test")]


def test_a_split_without_images_is_refused(complete, save, tmp_path):
    save(complete, "set/train")
    empty = {**complete, "images": [], "annotations": []}
    save(empty, "set/test")
    assert faults_of(tmp_path / "set") == [("empty", "refused", "'images'")]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    pixels = np.asarray(open_image(tmp_path / "deep.png"))
    assert (pixels[..., 0].ravel() == np.arange(256)).all()


def test_the_page_of_faults_is_up_to_date():
    """Else: python -m app.datasets.faults > docs/faults.md"""
    assert (REPOSITORY / "docs" / "faults.md").read_text() == page()
    rows = [line.split(" | ")[:2] for line in page().splitlines() if line.startswith("| ")][1:]
    assert rows == [[f"| {kind.name}", kind.action] for kind in KINDS.values()]


def test_many_repeated_keys_are_found_at_once() -> None:
    """Counting each among all others took minutes."""
    pairs = [(str(number % 30_000), number) for number in range(60_000)]
    began = time.process_time()
    doubled = keep_doubled(pairs)
    assert isinstance(doubled, Doubled)
    assert len(doubled.twice) == 30_000
    assert time.process_time() - began < 1
