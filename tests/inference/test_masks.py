"""Masks enlarged where they are, against the plain way: whole, then thresholded and encoded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from app.datasets.rle import decode
from app.inference.masks import bool_masks, encode_clear_masks, encode_masks, place
from app.inference.predictor import encode_as_upstream, resize_and_threshold
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
        found = encode_as_upstream(logits.numpy(), height, width)
        assert found == _plain(logits, height, width)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_without_the_plain_way_only_pixels_on_the_threshold_may_differ(height, width) -> None:
    """Where the logit is so near 0 that the order of the sums decides; noise has hardly any."""
    noise = torch.randn(20, 16, 16, generator=torch.Generator().manual_seed(2))
    for logits in (noise, discs(20, 72)):
        values = F.interpolate(logits[:, None], (height, width), mode="bilinear")[:, 0].numpy()
        found = bool_masks(encode_masks(logits.numpy(), height, width), height, width)
        doubtful = np.abs(values) < 1e-5 * float(logits.abs().max())
        np.testing.assert_array_equal((found != (values > 0)) & ~doubtful, False)
        assert doubtful.mean() < 1e-3


def test_no_masks() -> None:
    assert encode_masks(np.zeros((0, 16, 16), np.float32), 30, 20) == []
    assert bool_masks([], 30, 20).shape == (0, 30, 20)


def test_a_mask_with_a_pixel_on_the_threshold_and_a_large_one_are_left_to_upstreams_way() -> None:
    logits = torch.full((3, 2, 12), -1.0)
    logits[0, :, -1], logits[1, :, -1] = 1.5, 1.0  # 0 at column 27 of the second
    logits[2] = -logits[0]  # most of it
    masks = encode_clear_masks(logits.numpy(), 6, 30)
    assert [mask is None for mask in masks] == [False, True, True]
    expected = _plain(logits, 6, 30)
    assert masks[0] == expected[0]
    assert encode_as_upstream(logits.numpy(), 6, 30) == expected
    most = encode_masks(logits.numpy(), 6, 30)[2]
    np.testing.assert_array_equal(decode(most), resize_and_threshold(logits[2].numpy(), 6, 30))


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
