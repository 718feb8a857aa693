"""Resize an image to the model's square without torch, equal to `app.datasets.square` to the bit.

Torch's antialiased resize of uint8, on x86 with AVX2 and on ARM with NEON, is a triangle filter
with integer weights, horizontally and then vertically, rounded to uint8 after each (ATen's
UpSampleKernel.cpp).
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLOCK = 32  # target pixels of a matrix product: few zeros in its weights, and few products
# Multiplications that OpenBLAS does in one thread (GEMM_MULTITHREAD_THRESHOLD * SMP_THRESHOLD_MIN).
# Further threads would spin for some 25 ms afterwards, and ONNX Runtime would lack the cores.
ALONE = 4 * 65536
EXACT_BITS = 16  # of weights: float32 holds their products with uint8 exactly, 16 + 8 bits
Bytes = NDArray[np.uint8]
Numbers = NDArray[np.floating]
# the 256 values that Normalize(0.5, 0.5) makes in float32, in the order of upstream's Sam3Processor
SCALED = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
LEVELS = (SCALED - np.float32(0.5)) / np.float32(0.5)


def to_pixels(square: Bytes) -> NDArray[np.float32]:
    """Normalize (3, R, R) uint8 to (1, 3, R, R) float32, -1..1, the image graph's input."""
    return LEVELS[square][None]


def to_square(image: Image.Image, side: int) -> Bytes:
    """Stretch an RGB image to (3, side, side) uint8."""
    planes: Numbers = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
    wide = planes if image.width == side else _resize(planes, side)
    if image.height != side:
        wide = _resize(wide.swapaxes(1, 2), side).swapaxes(1, 2)
    return np.ascontiguousarray(wide).astype(np.uint8)


def _resize(planes: Numbers, target: int) -> Numbers:
    """Resize the last axis: whole numbers 0..255 (C, n, source) → (C, n, target)."""
    channels, lines, source = planes.shape
    blocks, bits = _blocks(source, target)
    rows = planes.reshape(-1, source).astype(blocks[0][1].dtype, copy=False)
    resized = np.empty((len(rows), target), dtype=rows.dtype)
    for start, (begin, taps) in zip(range(0, target, BLOCK), blocks, strict=True):
        read, written = rows[:, begin : begin + len(taps)], resized[:, start : start + BLOCK]
        height = max(ALONE // taps.size, 1)
        for top in range(0, len(rows), height):
            np.matmul(read[top : top + height], taps, out=written[top : top + height])
    resized += 2.0 ** (bits - 1)
    resized *= 2.0**-bits
    np.floor(resized, out=resized).clip(max=255, out=resized)
    return resized.reshape(channels, lines, target)


@functools.lru_cache(maxsize=16)  # because all frames of a camera have one size
def _blocks(source: int, target: int) -> tuple[list[tuple[int, Numbers]], int]:
    """Return for each BLOCK of target pixels the first source pixel and weights (n, BLOCK).

    The weights of a target pixel sum to 2**bits.
    """
    first, weights, bits = _weights(source, target)
    kind = np.float32 if bits <= EXACT_BITS else np.float64
    blocks = []
    for start in range(0, target, BLOCK):
        places = first[start : start + BLOCK]
        begin, end = places[0], min(places.max() + weights.shape[1], source)
        taps = np.zeros((end - begin, len(places)), dtype=kind)
        for column, (place, row) in enumerate(zip(places, weights[start:], strict=False)):
            inside = row[: end - place]
            taps[place - begin : place - begin + len(inside), column] = inside
        blocks.append((int(begin), taps))
    return blocks, bits


def _weights(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return for each target pixel the first source pixel (T,) and the weights from there (T, n).

    The weights of a target pixel sum to 2**bits; the largest of all fits 16 bits with its sign.
    """
    scale = source / target
    support = max(scale, 1.0)
    middles = scale * (np.arange(target) + 0.5)
    first = (middles - support + 0.5).astype(np.int64).clip(min=0)
    last = np.minimum((middles + support + 0.5).astype(np.int64), source)
    taps = np.arange((last - first).max())
    distances = (taps + first[:, None] - middles[:, None] + 0.5) * (1 / support)
    shares = (1 - np.abs(distances)).clip(min=0)
    shares[taps >= (last - first)[:, None]] = 0
    shares /= shares.cumsum(axis=1)[:, -1:]  # summed one by one, as torch does
    bits = 0
    while bits < 22 and int(0.5 + shares.max() * 2 ** (bits + 1)) < 2**15:
        bits += 1
    return first, (0.5 + shares * 2**bits).astype(np.int64), bits
