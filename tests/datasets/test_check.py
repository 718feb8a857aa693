from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.check import check as check_document
from app.datasets.faults import Action, Findings, lines
from app.datasets.geometry import clip_box, decode_counts
from app.datasets.image_files import find_files
from tests.datasets.conftest import SQUARE

DROPPED, REFUSED, MENDED = Action.DROPPED, Action.REFUSED, Action.MENDED


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
    assert problem.startswith("f.json: the file is")


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
    ("images.0.file_name", "/etc/a.png", "relative"),
    ("images.0.file_name", "C:\\a.png", "relative"),
    ("images.0.file_name", "a\0.png", "relative"),
    ("images.0.file_name", "x/../../a.png", "'..'"),
    ("images.0.file_name", "x\\..\\a.png", "'..'"),
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
    find_files(entries, [folder], found)
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
    assert "41 x 30 pixels, and the JSON says 40 x 30" in problem


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
