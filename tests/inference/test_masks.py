"""Masks by their outlines alone, against the plain way: enlarged whole, thresholded, encoded."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from app.inference.masks import bool_masks, encode_masks, place
from app.inference.predictor import SMALL, encode_where_they_are, enlarge_and_encode
from benchmarks.inference import discs


def _plain(logits: torch.Tensor, height: int, width: int, *, sigmoid: bool = True) -> list[dict]:
    """Return masks as upstream makes them, or without the sigmoid, which takes 1e-8 for 0."""
    resized = F.interpolate(logits[:, None], (height, width), mode="bilinear", align_corners=False)
    inside = resized[:, 0].sigmoid() > 0.5 if sigmoid else resized[:, 0] > 0
    binary = inside.permute(1, 2, 0).numpy().astype(np.uint8)
    encoded = coco_mask.encode(np.asfortranarray(binary))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in encoded]


SIZES = [(45, 70), (333, 120), (16, 16), (9, 5), (200, 30), (1, 1), (1, 50), (70, 1)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_plain_way_is_equalled_bit_for_bit(height: int, width: int) -> None:
    noise = torch.randn(20, 16, 16, generator=torch.Generator().manual_seed(1))
    corner = torch.full((4, 16, 16), -1.0)
    corner[0, 0, 0] = corner[1, 0, 15] = corner[2, 15, 0] = corner[3, 15, 15] = 9
    constant = torch.stack([torch.full((16, 16), value) for value in (-1.0, 0.0, 1.0)])
    for logits in (noise, corner, constant, discs(20, 72)):
        expected = _plain(logits, height, width)
        assert encode_masks(logits.numpy(), height, width) == expected
        assert encode_where_they_are(list(logits), height, width) == expected
        assert enlarge_and_encode(logits, height, width) == expected


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_on_the_threshold_fall_where_torch_puts_them(height: int, width: int) -> None:
    """As many as there can be; in the smallest images torch has another order of sums."""
    board = torch.ones(2, 16, 16)
    board[0, ::2, ::2] = board[0, 1::2, 1::2] = -1
    board[1] = -board[0]
    whole = torch.randn(20, 16, 16, generator=torch.Generator().manual_seed(1)).round()
    for logits in (board, whole):
        expected = _plain(logits, height, width, sigmoid=False)
        assert encode_where_they_are(list(logits), height, width) == expected
        assert enlarge_and_encode(logits, height, width) == expected
        if height + width > SMALL:
            assert encode_masks(logits.numpy(), height, width) == expected


@pytest.mark.parametrize("seed", range(40))
def test_any_size_is_resized_to_any_other(seed: int) -> None:
    """Odd ones, of one pixel, larger and smaller; logits of any magnitude, and zeros."""
    random = np.random.default_rng(seed)
    h, w = random.integers(1, random.choice([3, 40]), 2)
    height, width = (int(side) for side in random.integers(1, random.choice([4, 30, 500]), 2))
    values = random.normal(random.choice([-1, 0, 1]), 10.0 ** random.integers(0, 4), (5, h, w))
    values[random.random(values.shape) < 0.1] = 0
    logits = torch.from_numpy(values.astype(np.float32))
    expected = _plain(logits, height, width)
    assert encode_masks(logits.numpy(), height, width) == expected
    assert enlarge_and_encode(logits, height, width) == expected


def test_masks_of_12_megapixels_are_equal_and_take_no_memory() -> None:
    logits = torch.cat([discs(2, 288), discs(2, 288, 0.2, 0.45)])
    tracemalloc.start()
    found = encode_masks(logits.numpy(), 3000, 4001)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3000 * 4001  # bytes: one mask would be as large
    assert found == _plain(logits, 3000, 4001)


def test_logits_that_are_no_numbers_are_outside() -> None:
    logits = np.full((1, 4, 4), np.nan, np.float32)
    assert not bool_masks(encode_masks(logits, 30, 20), 30, 20).any()
    logits[0, :2] = 1
    found = bool_masks(encode_masks(logits, 30, 20), 30, 20)
    assert found[0, :8].all()
    assert not found[0, 20:].any()


def test_no_masks() -> None:
    assert encode_masks(np.zeros((0, 16, 16), np.float32), 30, 20) == []
    assert encode_where_they_are([], 30, 20) == []
    assert bool_masks([], 30, 20).shape == (0, 30, 20)


def test_a_pixel_on_the_threshold_is_outside() -> None:
    logits = torch.full((3, 2, 12), -1.0)
    logits[0, :, -1], logits[1, :, -1] = 1.5, 1.0  # 0 at column 27 of the second
    logits[2] = -logits[0]  # most of it
    found = encode_masks(logits.numpy(), 6, 30)
    assert found == _plain(logits, 6, 30)
    first, second, most = bool_masks(found, 6, 30)
    assert first[:, 27].all()
    assert not second[:, 27].any()
    assert second[:, 28].all()
    assert most.mean() > 0.5


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
