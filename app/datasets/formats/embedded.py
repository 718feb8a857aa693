"""Masks that label files hold as text or numbers → pixels; nothing larger than its image."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from app.datasets.geometry import is_int

Pixels = NDArray[np.bool_]  # (height, width)
HEADER = 4096  # bytes that a PNG of any size may take beside its pixels


def png_mask(text: object, width: int, height: int, *, zipped: bool = False) -> Pixels:
    """Return the set pixels of a PNG in base64: its alpha where it has one, else what is not 0.

    Args:
        width, height: that the PNG may have at most.
        zipped: whether zlib's compression is around the PNG, as Supervisely has it.

    Raises:
        ValueError: it is no such PNG, or larger.
    """
    limit = 8 * width * height + HEADER  # 16 bits of four channels, which did not compress
    if not isinstance(text, str) or len(text) > 2 * limit:
        raise ValueError("must be a mask as base64 text, of no more pixels than its image has")
    try:
        data = base64.b64decode(text, validate=True)
        if zipped:
            data = zlib.decompressobj().decompress(data, limit)
        with PILImage.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.width > width or picture.height > height:
                raise ValueError(
                    f"is a mask of {picture.width} x {picture.height} pixels, larger than its image"
                )
            alpha = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
            plain = picture.convert("RGBA").getchannel("A") if alpha else picture
            pixels = np.asarray(plain) != 0
    except ValueError as fault:
        known = str(fault).startswith("is a mask")
        raise ValueError(str(fault) if known else "is no mask in base64: export it again") from None
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise ValueError(f"is no PNG mask ({error}): export it again") from None
    return pixels if pixels.ndim == 2 else pixels.any(axis=2)


def runs_mask(counts: Sequence[int], width: int, height: int) -> Pixels:
    """Return the pixels of run lengths that go along the rows, the first of unset pixels.

    CVAT's masks are such runs; the last, of unset pixels, may be missing.

    Raises:
        ValueError: the runs are more than the pixels, or below 0.
    """
    if any(count < 0 for count in counts) or sum(counts) > width * height:
        raise ValueError(f"must have runs that fill {width} x {height} pixels")
    flat = np.zeros(width * height, dtype=bool)
    flat[: sum(counts)] = np.repeat(np.arange(len(counts)) % 2 == 1, np.array(counts, dtype=int))
    return flat.reshape(height, width)


def brush_mask(numbers: object, width: int, height: int) -> Pixels:
    """Return the pixels of a brush stroke of Label Studio, whose alpha is above one half.

    The RGBA bytes of the image are packed as rle-pack of thi.ng/umbrella does: 32 bits for how many
    words, 5 for the bits of a word less 1, four times 4 for the bits of a length less 1. Then come
    chunks: 1 bit, set for one word repeated; 2 bits for which of the four lengths; the length less
    1; the word, or as many words as the length says.

    Raises:
        ValueError: they are no such bytes, or of another number of pixels.
    """
    total, needed = 4 * width * height, "must be a brush stroke of its image: export it again"
    if not isinstance(numbers, list) or len(numbers) > 2 * total + HEADER:
        raise ValueError(needed)
    if not all(is_int(n) and 0 <= n < 256 for n in numbers):
        raise ValueError(needed)
    bits = np.unpackbits(np.array(numbers, dtype=np.uint8))
    digits, at = (bits + ord("0")).tobytes().decode("ascii"), 0

    def take(size: int) -> int:
        nonlocal at
        at += size
        if at > len(bits):
            raise ValueError(needed)
        return int(digits[at - size : at], 2)

    if take(32) != total:
        raise ValueError(f"must be a brush stroke of {width} x {height} pixels: export it again")
    word = take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if word != 8:
        raise ValueError(needed)
    values, done = np.zeros(total, dtype=np.uint8), 0
    while done < total:
        repeated = take(1)
        end = done + take(lengths[take(2)]) + 1
        if end > total:
            raise ValueError(needed)
        if repeated:
            values[done:end] = take(word)
        else:
            at, start = at + word * (end - done), at
            if at > len(bits):
                raise ValueError(needed)
            values[done:end] = np.packbits(bits[start:at])
        done = end
    return values.reshape(height, width, 4)[:, :, 3] > 127
