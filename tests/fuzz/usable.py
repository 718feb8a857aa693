"""What every dataset that comes out of a fuzzed one must be."""

from __future__ import annotations

import json

from pycocotools import mask as coco_mask

from app.datasets.coco import Dataset


def assert_usable(dataset: Dataset) -> None:
    json.dumps(dataset.to_json(), allow_nan=False)
    assert len({a.id for a in dataset.annotations}) == len(dataset.annotations)
    for annotation in dataset.annotations:
        x, y, w, h = annotation.bbox_xywh
        assert annotation.id > 0
        assert min(w, h) > 0
        assert 0 <= x <= x + w <= 40.0001
        assert 0 <= y <= y + h <= 30.0001
        if annotation.segmentation is not None:
            mask = coco_mask.decode(annotation.segmentation)
            assert mask.shape == (30, 40)
            assert mask.max() == 1
