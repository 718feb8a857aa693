"""Pixels of more than 8 bits: scaled by the range that a set has, in training and prediction alike
(FAULTS 4; microscopes of 12 bits, thermal cameras, CT in Hounsfield units, floats)."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from app.config.compose import load_model_config
from app.datasets.checked_copy import check
from app.datasets.coco import Dataset
from app.datasets.decoding import find_unusable
from app.datasets.huggingface.convert import _ending, _save
from app.datasets.images import ImageError, open_image, open_small
from app.datasets.levels import describe, find_levels, scale
from app.datasets.queries import QueryDataset
from app.datasets.writing import write_split
from app.evaluation import record
from app.evaluation.record import Record
from app.inference.batch import Job, predict_batches
from app.inference.detections import Detections
from app.inference.finder import Finder
from app.inference.settings import Settings
from app.model.weights import Header
from tests.corpus.making import coco, put, read, scenes, survey_of


def deep(folder: Path, factor: float, dtype: type = np.uint16, low: float = 0) -> dict:
    """Scenes whose grays, 0 to 255, are multiplied; the scene has grays of 76 to 222 or so."""
    made = scenes(folder, ending="tif")
    for name in made:
        path = folder / "images" / name
        with Image.open(path) as image:
            gray = np.asarray(image.convert("L")).astype(float)
        put(path, Image.fromarray((gray * factor + low).astype(dtype)))
    put(folder / "annotations.json", coco(made))
    return made


def grays(dataset: Dataset) -> np.ndarray:
    """The pixels of the first image as training sees them."""
    image = dataset.images[0]
    return np.asarray(open_image(image.path, image.levels))[..., 0]


@pytest.mark.parametrize("bits", range(9, 17))
def test_pixels_of_9_to_16_bits(tmp_path, bits):
    deep(tmp_path, (2**bits - 1) / 255)
    found = read(tmp_path)
    assert {image.levels for image in found.train.images} == {(0, 2**bits - 1)}
    assert f"pixels of {bits} bits: 0 to {2**bits - 1} become 0 to 255" in found.said
    assert found.kinds["bits"] == 6
    assert "dark" not in found.kinds
    with Image.open(tmp_path / "images/img_0.tif") as image:
        wanted = np.asarray(image) * (255 / (2**bits - 1))
    assert np.abs(grays(found.train) - wanted).max() <= 0.51


@pytest.mark.parametrize(
    ("factor", "low", "dtype", "levels"),
    [
        (1 / 255, 0, np.float32, (0, 1)),
        (1, 0, np.float32, (0, 255)),
        (1, 0, np.uint16, (0, 255)),  # 8 bits in 16
        (10, 0, np.int32, (0, 4095)),
    ],
)
def test_plain_ranges(tmp_path, factor, low, dtype, levels):
    deep(tmp_path, factor, dtype, low)
    assert read(tmp_path).train.images[0].levels == levels


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_below_0_and_beyond_255(tmp_path, dtype):
    deep(tmp_path, 10, dtype, -1000)  # Hounsfield units
    found = read(tmp_path)
    low, high = found.train.images[0].levels
    assert -1000 <= low < high <= 1550
    assert f"pixels: {low:g} to {high:g} become 0 to 255" in found.said
    pixels = grays(found.train)
    assert pixels.min() == 0
    assert pixels.max() == 255


def test_one_range_for_all_splits_the_widest(tmp_path):
    for split, factor, start in (("train", 4, 0), ("valid", 16, 50)):
        made = scenes(tmp_path / split, sub=".", ending="png", start=start)
        for name in made:
            path = tmp_path / split / name
            with Image.open(path) as image:
                gray = np.asarray(image.convert("L")).astype(np.uint16)
            put(path, Image.fromarray(gray * factor))
        put(tmp_path / split / "_annotations.coco.json", coco(made))
    splits = survey_of(tmp_path).splits
    assert {i.levels for dataset in splits.values() for i in dataset.images} == {(0, 4095)}


def test_images_of_8_bits_have_no_range(tmp_path):
    deep(tmp_path, 16)
    with Image.open(tmp_path / "images/img_0.tif") as image:
        gray = np.asarray(image) // 16
    put(tmp_path / "images/img_0.tif", Image.fromarray(gray.astype(np.uint8)))
    images = {image.path.name: image for image in read(tmp_path).train.images}
    assert images["img_0.tif"].levels is None
    assert images["img_1.tif"].levels == (0, 4095)


def test_nearly_black_images_are_said(tmp_path):
    made = deep(tmp_path, 1)
    for index, name in enumerate(made):
        values = np.full((120, 160), index, np.uint16)
        values[:1] = 65_535  # a scale bar
        put(tmp_path / "images" / name, Image.fromarray(values))
    found = read(tmp_path)
    assert found.kinds["dark"] == 1
    assert "the images are nearly black then" in found.said
    put(tmp_path / "images/img_0.tif", Image.fromarray(values * 0 + 60_000))
    assert "dark" not in read(tmp_path).kinds  # one of six is bright


def test_training_validation_report_and_copy_use_the_range_of_the_set(tmp_path):
    deep(tmp_path / "set", 16)
    path = tmp_path / "set/images/img_0.tif"
    with Image.open(path) as image:
        faint = np.asarray(image) // 20  # an image that uses a part of the range
    put(path, Image.fromarray(faint.astype(np.uint16)))
    dataset = survey_of(tmp_path / "set").splits["train"]
    first = dataset.images[0]
    assert np.asarray(open_image(path)).max() > 150  # by its own range
    wanted = np.asarray(open_image(path, (0, 4095)))
    assert wanted.max() < 20
    datapoint = QueryDataset(dataset, [], seed=0)[0]
    assert (np.asarray(datapoint.images[0].data) == wanted).all()
    assert np.asarray(open_small(path, 8, first.levels)).max() < 20
    write_split(dataset, tmp_path / "copy", {}, lambda _: None)
    with Image.open(tmp_path / "copy/images/img_0.png") as image:
        assert (np.asarray(image) == wanted).all()
    copied = json.loads((tmp_path / "copy/_annotations.coco.json").read_text())
    assert "levels" not in copied["images"][0]


def test_the_range_is_part_of_the_record_and_the_hash(tmp_path):
    deep(tmp_path, 16)
    dataset = read(tmp_path).train
    record.write(tmp_path / "run", Record("valid", dataset, []))
    assert record.read(tmp_path / "run").truth.images == dataset.images
    plain = Dataset(
        tuple(type(i)(i.id, i.path, i.width, i.height) for i in dataset.images),
        dataset.annotations,
        dataset.categories,
    )
    assert plain.content_hash() != dataset.content_hash()


def test_the_same_image_in_two_splits_is_found_at_another_depth(tmp_path):
    deep(tmp_path, 257)
    dataset = read(tmp_path).train
    with Image.open(tmp_path / "images/img_0.tif") as image:
        gray = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    copy = put(tmp_path / "copy.png", gray)
    other = Dataset((type(dataset.images[0])(1, copy, 160, 120),), (), dataset.categories)
    unusable, findings = find_unusable({"train": dataset, "valid": other}, tmp_path, lambda _: None)
    assert [fault.kind for fault in findings.faults] == ["in two splits"]
    assert unusable["train"] == {1}


def test_headers_with_and_without_a_range():
    model = load_model_config("nano")
    old = Header(model=model).model_dump(exclude={"levels"})
    assert Header.model_validate(old).levels is None
    header = Header(model=model, levels=(0, 4095))
    assert Header.model_validate_json(header.model_dump_json()).levels == (0, 4095)
    with pytest.raises(ValidationError):
        Header(model=model, levels=(0, float("nan")))


def test_a_prediction_uses_the_range_of_the_weights(tmp_path):
    """Each image alone would be stretched to its own range, and so differ from training."""
    made = deep(tmp_path / "set", 2)  # 9 bits: of 12 they are faint
    seen = []

    class Stub(Finder):
        prompts, threshold = ("circle",), 0.5

        def _find(self, images, query):
            seen.extend(np.asarray(image).max() for image in images)
            nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
            return [Detections(*nothing, query.prompts, [], *image.size) for image in images]

    settings = Settings(checkpoint="x", prompts=("circle",), save=())
    jobs = [Job(tmp_path / "set/images" / name, name, "x") for name in list(made)[:1]]
    for levels in (None, (0.0, 4095.0)):
        Stub.levels = levels
        list(predict_batches(Stub(), settings, tmp_path, [jobs]))
    assert seen[0] > 7 * seen[1] > 0


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (np.zeros((4, 4), np.uint16), (0, 255)),
        (np.zeros((4, 4), np.float32), (0, 1)),
        (np.full((4, 4), np.nan, np.float32), (0, 1)),
        (np.full((4, 4), -7, np.int32), (-7, -6)),
        (np.full((4, 4), 70_000, np.int32), (70_000, 70_001)),
        (np.array([[0.5, np.inf]], np.float32), (0, 1)),
        (np.array([[0.5, np.nan, 200]], np.float32), (0, 255)),
        (np.zeros((0, 4), np.uint16), (0, 1)),
        (np.full((4, 4), 256, np.uint16), (0, 511)),
    ],
)
def test_ranges_of_odd_images(values, levels):
    assert find_levels(values) == levels
    assert scale(values, levels).dtype == np.uint8


def test_a_few_hot_pixels_do_not_widen_the_range():
    values = np.full((200, 200), 3000, np.uint16)
    values[0, :20] = 65_535
    assert find_levels(values) == (0, 4095)
    assert scale(values, (0, 4095)).max() == 255


def test_what_is_no_number_is_black():
    values = np.array([[np.nan, -np.inf, np.inf, 0.5]], np.float32)
    assert scale(values, (0, 1)).tolist() == [[0, 0, 255, 128]]


def test_a_range_is_described():
    assert describe((0, 4095)) == "pixels of 12 bits: 0 to 4095 become 0 to 255"
    assert describe((0, 1)) == "pixels: 0 to 1 become 0 to 255"
    assert describe((-1000, 400)) == "pixels: -1000 to 400 become 0 to 255"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_tiffs_of_the_hub_keep_their_values(tmp_path, dtype):
    values = np.arange(12, dtype=dtype).reshape(3, 4) * 300
    path = put(tmp_path / "a.tif", Image.fromarray(values))
    with Image.open(path) as picture:
        kept = tmp_path / f"kept{_ending(picture)}"
        _save(picture, path.read_bytes(), kept)
    with Image.open(kept) as picture:
        assert (np.asarray(picture) == values).all()


def test_damaged_deep_images_are_left_to_the_full_decode(tmp_path):
    deep(tmp_path, 16)
    path = tmp_path / "images/img_0.tif"
    path.write_bytes(path.read_bytes()[:-9000])
    levels = {image.levels for image in survey_of(tmp_path).splits["train"].images}
    assert (0, 4095) in levels
    assert "image damaged" in {fault.kind for fault in check(tmp_path, "auto").faults}


def test_colours_of_12_bits_in_16_are_nearly_black_and_said(tmp_path):
    """Pillow reads the upper 8 bits of each colour, so that 12 bits leave 0 to 15."""
    made = deep(tmp_path, 1)
    for name in made:
        with Image.open(tmp_path / "images" / name) as image:
            gray = np.asarray(image)
        cv2.imwrite(str(tmp_path / "images" / name), np.stack([gray * 4] * 3, axis=2))
    found = read(tmp_path)
    assert found.kinds["bits"] == 6
    assert found.kinds["dark"] == 1
    assert found.train.images[0].levels is None
    for name in made:
        with Image.open(tmp_path / "images" / name) as image:
            colors = np.asarray(image).astype(np.uint16)
        cv2.imwrite(str(tmp_path / "images" / name), colors * 16_000)
    assert "dark" not in read(tmp_path).kinds


def test_tiffs_that_pillow_cannot_open_are_told_how_to_convert(tmp_path):
    for name, content in (
        ("floats", np.full((30, 40, 3), 0.5, np.float32)),
        ("doubles", np.full((30, 40), 0.5)),
    ):
        path = tmp_path / f"{name}.tif"
        cv2.imwrite(str(path), content)
        with pytest.raises(ImageError, match="convert it to RGB of 8 bits"):
            open_image(path)
