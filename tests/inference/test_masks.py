"""Masks enlarged where they are, against the plain way: whole, then thresholded and encoded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from app.inference import masks as masks_module
from app.inference.masks import bool_masks, encode_masks, place
from benchmarks.inference import discs


def _plain(logits: torch.Tensor, height: int, width: int) -> list[dict]:
    resized = F.interpolate(logits[:, None], (height, width), mode="bilinear", align_corners=False)
    binary = (resized[:, 0].sigmoid() > 0.5).permute(1, 2, 0).numpy().astype(np.uint8)
    encoded = coco_mask.encode(np.asfortranarray(binary))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in encoded]


SIZES = [(45, 70), (333, 120), (16, 16), (9, 5), (200, 30), (1, 1)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_plain_way_is_equalled_bit_for_bit(height: int, width: int) -> None:
    noise = torch.randn(20, 16, 16, generator=torch.Generator().manual_seed(1))
    corner = torch.full((4, 16, 16), -1.0)
    corner[0, 0, 0] = corner[1, 0, 15] = corner[2, 15, 0] = corner[3, 15, 15] = 9
    constant = torch.stack([torch.full((16, 16), value) for value in (-1.0, 0.0, 1.0)])
    for logits in (noise, corner, constant, discs(20, 72)):
        assert encode_masks(logits, height, width) == _plain(logits, height, width)


def test_no_masks() -> None:
    assert encode_masks(torch.zeros(0, 16, 16), 30, 20) == []
    assert bool_masks([], 30, 20).shape == (0, 30, 20)


def test_a_pixel_on_the_threshold_goes_the_plain_way(monkeypatch) -> None:
    asked = []
    plain = masks_module.plain_mask
    monkeypatch.setattr(masks_module, "plain_mask", lambda *a: asked.append(a) or plain(*a))
    logits = torch.full((2, 2, 12), -1.0)
    logits[0, :, -1], logits[1, :, -1] = 1.5, 1.0
    assert encode_masks(logits[:1], 6, 30) == _plain(logits[:1], 6, 30)
    assert len(asked) == 0
    assert encode_masks(logits[1:], 6, 30) == _plain(logits[1:], 6, 30)  # 0 at column 27
    assert len(asked) == 1
    assert encode_masks(-logits[:1], 6, 30) == _plain(-logits[:1], 6, 30)  # most of the image
    assert len(asked) == 2


@pytest.mark.parametrize("seed", range(20))
def test_a_mask_is_placed_in_its_image(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 12, 2)
    top, left = random.integers(0, height + 1), random.integers(0, width + 1)
    h, w = random.integers(0, height - top + 1), random.integers(0, width - left + 1)
    crop = random.random((h, w)) < random.choice([0, 0.5, 0.9, 1])
    whole = np.zeros((height, width), dtype=np.uint8)
    whole[top : top + h, left : left + w] = crop
    rle = coco_mask.encode(np.asfortranarray(whole))
    expected = {"size": [height, width], "counts": rle["counts"].decode()}
    assert place(crop, left, top, int(height), int(width)) == expected
