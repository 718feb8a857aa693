"""Files of masks → their numbers or colours; none is decoded before its size is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from app.datasets.images import FORMATS, MAX_PIXELS

ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".jpg", ".jpeg")
ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # Pillow's modes
# Pillow spreads the grays of PNGs of 2 and 4 bits over 0..255 (PngImagePlugin.py, _MODES)
SPREAD = {"L;2": 85, "L;4": 17}
MAX_NUMBERS = 20_000  # in a mask; more is a photograph or a depth map
NEAR = 32  # of 255, that a lossy file may be off black or white
BLURRED = 0.05  # of a lossy mask's pixels, that may lie between


class MaskError(ValueError):
    """A file that is no mask to be read; `kind` is its fault's name in `faults.KINDS`."""

    def __init__(self, reason: str, kind: str = "label file") -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class MaskPixels:
    """The pixels of a mask.

    Attributes:
        numbers: (height, width), 0 and above; of a colour mask its colours, as `pack` makes them.
        colored: whether they are colours.
        palette: packed colour of each index that occurs, where they are indices.
        lossy: whether the file is a JPEG, cut at half.
    """

    numbers: NDArray[Any]
    colored: bool = False
    palette: dict[int, int] | None = None
    lossy: bool = False

    def painted(self) -> NDArray[np.int32]:
        """Return the packed colours of a mask of palette indices or grays."""
        if self.palette is None:
            return self.numbers.astype(np.int32) * 0x010101
        table = np.zeros(256, np.int32)
        table[list(self.palette)] = list(self.palette.values())
        return table[self.numbers]


def read_mask(path: Path, size: tuple[int, int] | None = None) -> MaskPixels:
    """Read a mask: palette indices and grays as numbers, else colours.

    Args:
        size: width and height in pixels that it must have.

    Raises:
        MaskError: no such mask; says what to do.
    """
    try:
        with PILImage.open(path, formats=FORMATS) as picture:
            _check_header(picture, size)
            spread = SPREAD.get(_raw_mode(picture), 1)
            pixels = np.asarray(picture)
            mode, lossy = picture.mode, picture.format == "JPEG"
            palette = _palette(picture, pixels) if mode == "P" else None
            if mode not in ONE_CHANNEL:
                pixels = np.asarray(picture.convert("RGB"))
    except MaskError:
        raise
    except PILImage.DecompressionBombError as error:
        raise MaskError(f"has more pixels than an image has ({error})") from None
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise MaskError(f"cannot be read as an image ({error}); replace it") from None
    if mode not in ONE_CHANNEL:
        gray = pixels[:, :, 0]
        if not (pixels == gray[:, :, None]).all():
            if lossy:
                raise MaskError(_lossy("holds colours"))
            return MaskPixels(pack(pixels), colored=True)
        pixels = gray
    if lossy:
        return MaskPixels(_cut(pixels), lossy=True)
    return MaskPixels(_whole(pixels) // spread, palette=palette)


def read_numbers(path: Path, width: int, height: int) -> NDArray[np.integer]:
    """Read the (height, width) object numbers of a one-channel mask: palette indices, not colors.

    Raises:
        MaskError: not a readable mask, of another size, or of colours; says what to do.
    """
    mask = read_mask(path, (width, height))
    if mask.colored:
        raise MaskError("holds colours (RGB): must be a one-channel PNG of object numbers")
    return mask.numbers.astype(np.int64)


def pack(pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return (height, width, 3) RGB as numbers: R * 65536 + G * 256 + B."""
    wide = pixels.astype(np.int32)
    return np.asarray(wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2], dtype=np.int32)


def rgb(color: int) -> tuple[int, int, int]:
    """Return the red, green and blue of a packed colour."""
    return color >> 16, color >> 8 & 255, color & 255


def _check_header(picture: PILImage.Image, size: tuple[int, int] | None) -> None:
    if size is not None and picture.size != size:
        width, height = picture.size
        remedy = f"has {width} x {height} pixels: must be its image's {size[0]} x {size[1]}"
        raise MaskError(remedy, "other size")
    if picture.width * picture.height > MAX_PIXELS:
        raise MaskError(f"has more pixels than an image has: {picture.width} x {picture.height}")
    if (pages := getattr(picture, "n_frames", 1)) > 1:
        raise MaskError(f"has {pages} pages: must have one; write each into a file of its own")


def _raw_mode(picture: PILImage.Image) -> str:
    """Return how a PNG stores its pixels; empty for others."""
    tile = getattr(picture, "tile", [])
    return str(tile[0][3]) if picture.format == "PNG" and tile else ""


def _palette(picture: PILImage.Image, indices: NDArray[Any]) -> dict[int, int]:
    flat = picture.getpalette("RGB") or []
    colors = pack(np.array(flat, dtype=np.uint8).reshape(-1, 3))
    used = np.unique(indices).tolist()
    return {index: int(colors[index]) for index in used if index < len(colors)}


def _cut(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a lossy mask of two values as 0 and 255; raise MaskError where it has others."""
    top = int(pixels.max(initial=0))
    between = ((pixels > NEAR) & (pixels < 255 - NEAR)).mean()
    if (8 < top < 255 - NEAR) or between > BLURRED:
        raise MaskError(_lossy("has more than two values"))
    return np.where(pixels > 127, 255, 0).astype(np.uint8)


def _lossy(reason: str) -> str:
    return (
        f"is a JPEG that {reason}: JPEG changes numbers and colours; "
        "export the masks as PNG, from where they were drawn"
    )


def _whole(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return pixels as whole numbers, 0 and above; shares of 1 become 0 to 255."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise MaskError("has pixels that are no numbers (NaN); write whole numbers")
        if (pixels != np.round(pixels)).any():
            if pixels.min() < 0 or pixels.max() > 1:
                raise MaskError("has fractions: must have whole numbers; write them as PNG")
            pixels = pixels * 255
        if np.abs(pixels).max(initial=0) >= 2**31:
            raise MaskError("has numbers of more than 31 bits: renumber its objects")
        pixels = np.round(pixels).astype(np.int32)
    if pixels.min(initial=0) < 0:
        raise MaskError("has numbers below 0: write 0 for what is no object")
    return pixels
