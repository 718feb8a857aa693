"""Boxes in other conventions than COCO's (FAULTS 3)."""

from __future__ import annotations

import pytest

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.checked_copy import build
from tests.corpus.making import (
    HEIGHT,
    WIDTH,
    coco,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
)

OTHERS = {
    "xyxy": lambda x, y, s: [x, y, x + s, y + s],
    "cxcywh": lambda x, y, s: [x + s / 2, y + s / 2, s, s],
    # Azure ML exports shares
    "shares": lambda x, y, s: [x / WIDTH, y / HEIGHT, s / WIDTH, s / HEIGHT],
    "cxcywh-shares": lambda x, y, s: [
        (x + s / 2) / WIDTH,
        (y + s / 2) / HEIGHT,
        s / WIDTH,
        s / HEIGHT,
    ],
}


def boxes(folder, convert, *, masks: bool, count: int = 12):
    made = scenes(folder, count)
    document = coco(made)
    for annotation in document["annotations"]:
        x, y, side, _ = annotation["bbox"]
        annotation["bbox"] = convert(x, y, side)
        if not masks:
            annotation["segmentation"] = []
    put(folder / "annotations.json", document)
    return sorted_things(made)


@pytest.mark.parametrize("name", OTHERS)
def test_beside_masks_each_convention_is_told_and_the_advice_works(tmp_path, name):
    made = boxes(tmp_path, OTHERS[name], masks=True)
    assert f"--boxes {name}" in refusal(tmp_path)
    assert things_of(read(tmp_path, boxes=name).train) == made
    assert things_of(read(tmp_path, boxes="masks").train) == made


@pytest.mark.parametrize("name", ["xyxy", "shares", "cxcywh"])
def test_without_masks_they_are_told_from_all_boxes(tmp_path, name):
    made = boxes(tmp_path, OTHERS[name], masks=False, count=30)
    assert f"--boxes {name}" in refusal(tmp_path)
    assert things_of(read(tmp_path, boxes=name).train) == made


# otx 2.6.0, tests/assets/tiling_small_objects: corners where there is no mask, COCO's boxes else
@pytest.mark.parametrize("name", ["xyxy", "shares", "cxcywh"])
def test_a_flag_does_not_spoil_boxes_that_are_their_masks(tmp_path, name):
    made = mixed(tmp_path, plain=OTHERS[name])
    assert f"--boxes {name}" in refusal(tmp_path)
    assert things_of(read(tmp_path, boxes=name).train) == made


def test_one_flag_reads_corners_with_and_without_masks(tmp_path):
    made = mixed(tmp_path, plain=OTHERS["xyxy"], masked=OTHERS["xyxy"])
    assert "--boxes masks" not in refusal(tmp_path)
    assert things_of(read(tmp_path, boxes="xyxy").train) == made


def test_no_flag_is_advised_that_spoils_boxes_without_masks(tmp_path):
    made = mixed(tmp_path, masked=OTHERS["xyxy"])
    said = refusal(tmp_path)
    assert "--boxes masks" in said
    assert "--boxes xyxy" not in said
    assert things_of(read(tmp_path, boxes="masks").train) == made


def mixed(folder, plain=lambda *box: [*box, box[2]], masked=lambda *box: [*box, box[2]]):
    """Circles have masks, rectangles none."""
    made = scenes(folder, 20)
    document = coco(made)
    for annotation in document["annotations"]:
        x, y, side, _ = annotation["bbox"]
        is_plain = annotation["category_id"] == 2
        annotation["bbox"] = (plain if is_plain else masked)(x, y, side)
        if is_plain:
            annotation["segmentation"] = []
    put(folder / "annotations.json", document)
    return sorted_things(made)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x, y, s: [x, y, s / 2, s / 2],  # half the size
        lambda x, y, s: [x * 2, y * 2, s * 2, s * 2],  # of an image of twice the size
        lambda x, y, s: [y, x, s, s],  # y before x
        lambda x, y, s: [0, 0, WIDTH, HEIGHT],
    ],
)
def test_a_box_far_from_its_mask_is_a_fault_whatever_it_is(tmp_path, convert):
    made = boxes(tmp_path, convert, masks=True)
    assert "--boxes masks" in refusal(tmp_path)
    assert things_of(read(tmp_path, boxes="masks").train) == made


@pytest.mark.parametrize("masks", [True, False])
def test_sound_boxes_are_no_other_convention(tmp_path, masks):
    made = boxes(tmp_path, lambda x, y, s: [x, y, s, s], masks=masks, count=30)
    found = read(tmp_path)
    assert things_of(found.train) == made
    assert "box convention" not in found.kinds


def test_a_mask_that_is_loosely_boxed_is_sound(tmp_path):
    """As Roboflow's rotations leave them."""
    boxes(tmp_path, lambda x, y, s: [x - 3, y - 3, s + 6, s + 6], masks=True)
    assert "box convention" not in read(tmp_path).kinds


# otx 2.6.0, tests/assets/tiling_small_objects: the box leaves the image, and the mask ends with it
def test_a_box_that_goes_on_beyond_the_image_is_its_masks(tmp_path):
    made = scenes(tmp_path, 12)
    document = coco(made)
    for annotation in document["annotations"]:
        x, y, side, _ = annotation["bbox"]
        annotation["bbox"] = [x, -side, side, y + 2 * side]
        annotation["segmentation"] = [[x, 0, x + side, 0, x + side, y + side, x, y + side]]
    put(tmp_path / "annotations.json", document)
    found = read(tmp_path)
    assert found.kinds == {"bbox clipped": 24}
    assert {a.bbox_xywh for a in found.train.annotations} == {
        (x, 0, side, y + side) for things in made.values() for _, x, y, side in things
    }


def test_data_fix_writes_what_was_decided(tmp_path):
    made = boxes(tmp_path / "set", OTHERS["cxcywh"], masks=False)
    config = load_config(["dataset.reading.boxes=cxcywh"])
    build(tmp_path / "set", tmp_path / "fixed", config)
    splits = load_splits(tmp_path / "fixed")
    parts = [splits.train, splits.valid, *([splits.test] if splits.test else [])]
    assert {k: v for part in parts for k, v in things_of(part).items()} == made
