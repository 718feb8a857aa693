"""Flags about labels that a format has no use for are refused, and not passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.corpus.making import coco, put, read, refusal, scenes
from tests.corpus.test_cityscapes import cityscapes
from tests.corpus.test_mask_folders import masked
from tests.corpus.test_panoptic import panoptic
from tests.corpus.test_voc_masks import voc
from tests.corpus.test_yolo import DATA, labelled


def _coco(folder: Path) -> None:
    put(folder / "annotations.json", coco(scenes(folder)))


def _yolo(folder: Path) -> None:
    labelled(folder)
    put(folder / "data.yaml", DATA)


@pytest.mark.parametrize(
    ("make", "name", "decided"),
    [
        (_coco, "COCO", {"void": 255, "masks": "classes", "attribute": "kind"}),
        (_yolo, "YOLO", {"boxes": "xyxy", "masks": "objects"}),
        (panoptic, "COCO panoptic", {"void": 0, "masks": "classes"}),
        (cityscapes, "Cityscapes", {"void": 255, "boxes": "masks"}),
        (masked, "mask PNGs", {"boxes": "masks", "attribute": "kind"}),
        (voc, "Pascal VOC's masks", {"masks": "objects"}),
    ],
)
def test_a_decision_that_nothing_reads_is_refused(
    tmp_path: Path, make: Any, name: str, decided: dict[str, Any]
) -> None:
    make(tmp_path)
    assert read(tmp_path).train.annotations
    lines = refusal(tmp_path, **decided).splitlines()
    assert len(lines) == len(decided)
    for key, value in decided.items():
        said = f"--{key} {value}: nothing reads it in a dataset that is read as {name}; leave"
        assert any(line.startswith(said) for line in lines)


def test_boxes_of_masks_that_are_none_are_said(tmp_path: Path) -> None:
    document = coco(scenes(tmp_path))
    put(tmp_path / "annotations.json", document)
    assert "--boxes" not in read(tmp_path, boxes="masks").said
    for annotation in document["annotations"]:
        annotation["segmentation"] = []
    put(tmp_path / "annotations.json", document)
    assert "--boxes masks: changes nothing" in read(tmp_path, boxes="masks").said


def test_crowds_that_are_none_are_said(tmp_path: Path) -> None:
    _coco(tmp_path)
    assert "--crowd instances: changes nothing" in read(tmp_path, crowd="instances").said
    assert "--crowd" not in read(tmp_path).said
