"""Proposals in the forms of labelling tools: what their readers make of them is what was found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from app.config.reading import ReadingConfig
from app.datasets.build import load_splits
from app.datasets.coco import Dataset
from app.datasets.formats.embedded import brush_mask
from app.inference.proposals import brush_rle, label_config, region, rewrite
from tests.helpers import REPOSITORY, Command

NANO = REPOSITORY / "app" / "assets" / "nano"
SCENE = REPOSITORY / "examples" / "scene.png"
WORDS = ("--prompt", "circle", "--prompt", "red thing", "--threshold", "0.3")


@given(runs=st.lists(st.integers(0, 90), min_size=1, max_size=40), width=st.integers(1, 40))
def test_a_brush_is_packed_as_it_is_read(runs: list[int], width: int) -> None:
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask = np.zeros((len(flat) // width + 1, width), dtype=bool)
    mask.ravel()[: len(flat)] = flat
    assert np.array_equal(brush_mask(brush_rle(mask), width, len(mask)), mask)


def test_long_runs_are_cut() -> None:
    mask = np.zeros((400, 300), dtype=bool)
    mask[7:390] = True
    assert np.array_equal(brush_mask(brush_rle(mask), 300, 400), mask)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(SCENE, tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def found(command: Command, photos: Path, tmp_path: Path) -> Dataset:
    """What COCO has of it."""
    words = ("label", "--input", photos, "--checkpoint", NANO, *WORDS)
    assert command(*words, "--output-dir", tmp_path / "coco").code == 0
    return load_splits(tmp_path / "coco", valid_fraction=0.5, test_fraction=0).train


def _masks(dataset: Dataset) -> list[tuple[str, np.ndarray]]:
    names = {category.id: category.name for category in dataset.categories}
    first = dataset.images[0].id
    masks = [
        (names[a.category_id], coco_mask.decode(a.segmentation))
        for a in dataset.annotations
        if a.image_id == first
    ]
    return sorted(masks, key=lambda each: (each[0], np.nonzero(each[1])[0].mean()))


@pytest.mark.parametrize("form", ["labelme", "label-studio"])
def test_its_tool_and_our_reader_see_what_was_found(
    command: Command, photos: Path, found: Dataset, tmp_path: Path, form: str
) -> None:
    out = tmp_path / form
    words = ("label", "--input", photos, "--checkpoint", NANO, *WORDS, "--to", form)
    done = command(*words, "--output-dir", out)
    assert done.code == 0, done.err
    assert "open it: " in done.out
    if form == "label-studio":
        tasks = json.loads((out / "tasks.json").read_text())
        for task in tasks:  # as a person accepts them
            (prediction,) = task.pop("predictions")
            assert prediction["model_version"] == str(NANO)
            scores = [each["score"] for each in prediction["result"]]
            assert prediction["score"] == pytest.approx(np.mean(scores))
            task["annotations"] = [{"result": prediction["result"]}]
        (out / "tasks.json").write_text(json.dumps(tasks))
    else:
        (name,) = {path.name for path in (out / "images").glob("a*.json")}
        shapes = json.loads((out / "images" / name).read_text())["shapes"]
        assert {shape["label"] for shape in shapes} == {"circle", "red thing"}
        assert all(0.3 < shape["score"] <= 1 for shape in shapes)
    read = load_splits(out, valid_fraction=0.5, test_fraction=0).train
    for (name, mask), (label, expected) in zip(_masks(read), _masks(found), strict=True):
        assert name == label
        # LabelMe's polygons have no holes, and their edges go through the pixels.
        least = 1.0 if form == "label-studio" else 0.9
        assert (mask & expected).sum() >= least * (mask | expected).sum()
    assert all(a.score is None for a in read.annotations)  # a person has seen them


def test_boxes_alone_are_rectangles(found: Dataset, tmp_path: Path) -> None:
    for form in ("labelme", "label-studio"):
        folder = tmp_path / f"boxes-{form}"
        (folder / "images").mkdir(parents=True)
        document = found.to_json()
        for entry in document["images"]:
            name = Path(entry["file_name"]).name
            shutil.copy(entry["file_name"], folder / "images" / name)
            entry["file_name"] = f"images/{name}"
        for entry in document["annotations"]:
            entry["segmentation"] = []
        (folder / "_annotations.coco.json").write_text(json.dumps(document))
        rewrite(folder, form, "weights")  # type: ignore[arg-type]
        text = next(iter(folder.rglob("*.json"))).read_text()
        assert ("rectanglelabels" if form == "label-studio" else '"rectangle"') in text
        assert not (folder / "_annotations.coco.json").exists()


def test_a_polygon_is_the_largest_piece_in_percent(found: Dataset) -> None:
    annotation, image = found.annotations[0], found.images[0]
    shown = region(annotation, "a", image.width, image.height, kind="polygonlabels", from_name="x")
    points = np.array(shown["value"]["points"]) * [image.width / 100, image.height / 100]
    count, labels = cv2.connectedComponents(coco_mask.decode(annotation.segmentation), None, 4)
    largest = max(range(1, count), key=lambda label: (labels == label).sum())
    rows, columns = np.nonzero(labels == largest)
    assert points.min(axis=0) == pytest.approx([columns.min(), rows.min()])
    assert points.max(axis=0) == pytest.approx([columns.max() + 1, rows.max() + 1])
    assert shown["from_name"] == "x"


def test_names_are_escaped() -> None:
    root = ElementTree.fromstring(label_config(['a "<b>" & c', "d"]))
    values = [label.get("value") for label in root.iter("Label")]
    assert values == ['a "<b>" & c', "d"] * 3


def test_proposals_are_told_and_chosen_from(found: Dataset, tmp_path: Path, command) -> None:
    """A class of a doubtful one is not asked for in its image: it is a crowd."""
    scores = sorted(a.score for a in found.annotations if a.score is not None)
    assert len(scores) == len(found.annotations) > 1
    splits = load_splits(tmp_path / "coco", valid_fraction=0.5, test_fraction=0)
    (note,) = [n for n in splits.notes if "nobody has looked at" in n and n.startswith("train")]
    assert f"{len(scores)} of {len(scores)} objects are proposals" in note
    assert f"with scores from {scores[0]:.2f}" in note
    least = scores[0] + 1e-4
    chosen = load_splits(
        tmp_path / "coco",
        valid_fraction=0.5,
        test_fraction=0,
        reading=ReadingConfig(accept_above=least),
    ).train
    assert [a.iscrowd for a in chosen.annotations] == [
        a.score is not None and a.score < least for a in chosen.annotations
    ]
    assert any(a.iscrowd for a in chosen.annotations)
    done = command("data", "check", tmp_path / "coco")
    assert "nobody has looked at" in done.out
