"""Image files → upright RGB: the one way in, for training and for prediction."""

from __future__ import annotations

import importlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from app.datasets.levels import Levels, find_levels, scale
from app.errors import UserError
from app.files import check_regular, open_file

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".heic", ".heif"),
)
FILMS = (
    ".avi",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".mts",
    ".ts",
    ".webm",
    ".wmv",
)
# What Pillow may decode: some of its other decoders start programs, as that of EPS does.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 2**27  # more is no photograph but a decompression bomb
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
FILM_BRANDS = (  # at byte 8 of MP4, MOV and AVI
    *(b"isom", b"iso2", b"iso4", b"iso5", b"iso6", b"mp41", b"mp42", b"avc1", b"M4V ", b"qt  "),
    *(b"3gp4", b"3gp5", b"AVI "),
)
FILM_STARTS = (b"\x1aE\xdf\xa3", b"\x00\x00\x01\xba")  # Matroska and WebM, MPEG
PAGED = ("TIFF", "GIF", "WEBP")  # a JPEG's further pictures are a phone's depth, and thumbnails
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
OTHER_TIFF = (
    "it is a TIFF of a kind that is not read, such as several channels of floats or of other "
    "bits; convert it to RGB of 8 bits, or to one channel of 16 bits"
)

# `_open` refuses bombs itself: turning the warning into an error is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(UserError):
    """A file that is no image to be used; `kind` is its fault's name in `faults.KINDS`."""

    def __init__(self, kind: str, path: Path, reason: str) -> None:
        super().__init__(f"{path}: cannot be read as an image ({reason}). Replace or remove it.")
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """An image file's sides in pixels, and what decoding must mend, as `faults.KINDS` names it.

    Attributes:
        size: width and height once turned upright by the EXIF orientation.
        stored: as the file has them.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    mends: tuple[str, ...]


def read_header(path: Path) -> Header:
    """Read the header alone, not the pixels.

    Raises:
        ImageError: no image, or too large to be one.
    """
    try:
        with _open(path) as image:
            turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            size = image.size[::-1] if turn in (5, 6, 7, 8) else image.size
            turned = ("EXIF",) if turn in range(2, 9) else ()
            return Header(size, image.size, turned + _conversions(image))
    except Exception as error:  # Pillow raises nearly anything on a damaged header
        raise _explain(path, error) from None


def stored_size(data: bytes, name: str = "image") -> tuple[int, int]:
    """Return width and height of an image in memory, as its file has them; nothing is decoded.

    `read_header` decodes a PNG, whose EXIF may come behind its pixels.

    Raises:
        ImageError: as of `read_header`, with this name.
    """
    path = Path(name)
    try:
        with _open(path, data) as image:
            return image.size
    except Exception as error:
        raise _explain(path, error, data) from None


def open_image(path: Path, levels: Levels | None = None, data: bytes | None = None) -> Image.Image:
    """Decode an image whole, turn it upright by its EXIF orientation, convert it to RGB.

    Args:
        levels: the values that become 0 and 255 where pixels have more than 8 bits; None: those
            of `find_levels`.
        data: the file's content, where it is in memory; the path then is a name for messages.

    Raises:
        ImageError: missing, not an image, cut short, or too large to be one.
    """
    try:
        with _open(path, data) as image:
            return to_rgb(ImageOps.exif_transpose(image), levels)
    except Exception as error:  # its decoders raise OSError, ValueError, SyntaxError, struct.error
        raise _explain(path, error, data) from None


def open_small(path: Path, side: int, levels: Levels | None = None) -> Image.Image:
    """Decode like `open_image`, but JPEG possibly at a fraction of its size, not below `side`."""
    try:
        with _open(path) as image:
            image.draft("RGB", (side, side))
            return to_rgb(ImageOps.exif_transpose(image), levels)
    except Exception as error:
        raise _explain(path, error) from None


def read_values(path: Path) -> NDArray[Any]:
    """Decode an image of more than 8 bits; return its values (height, width) as they are stored.

    Raises:
        ImageError: as of `open_image`.
    """
    try:
        with _open(path) as image:
            return np.asarray(image)
    except Exception as error:
        raise _explain(path, error) from None


def count_pages(path: Path) -> int:
    """Return how many pictures an image file holds, of which the first is read.

    Smaller copies of the same picture, as a GeoTIFF has them, do not count.

    Raises:
        ImageError: as of `read_header`.
    """
    try:
        with _open(path) as image:
            count = getattr(image, "n_frames", 1) if image.format in PAGED else 1
            if image.format != "TIFF":
                return count
            return 1 + sum(not _is_copy(image, page) for page in range(1, count))
    except Exception as error:
        raise _explain(path, error) from None


def _is_copy(image: Image.Image, page: int) -> bool:
    """Return whether a TIFF's page is a smaller copy or a mask of another (NewSubfileType)."""
    image.seek(page)
    return bool(image.tag_v2.get(254, 0) & 0b101)  # type: ignore[attr-defined]


def film_problem(path: Path) -> str:
    """Return that a film is no image, what reads it, and how to make images of it."""
    return (
        f"{path}: is a film, which ./infer.sh --input '{path}' follows; here make images of it: "
        f"mkdir frames && ffmpeg -i '{path}' frames/%06d.png"
    )


def _open(path: Path, data: bytes | None = None) -> Image.Image:
    if data is None:
        check_regular(path)  # a pipe would be waited for without an end
    image: Image.Image
    try:
        image = Image.open(path if data is None else io.BytesIO(data), formats=FORMATS)
    except Exception:
        if not _is_heic(path, data):
            raise
        image = _open_heic(path if data is None else io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return image


def _is_heic(path: Path, data: bytes | None) -> bool:
    try:
        head = _head(path, data)
    except OSError:
        return False
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def _head(path: Path, data: bytes | None) -> bytes:
    if data is not None:
        return data[:512]
    with open_file(path) as file:
        return file.read(512)


def _open_heic(source: Path | io.BytesIO) -> Image.Image:
    """Open HEIC by pi-heif, which is imported for such files alone: a Jetson's image lacks it.

    pi-heif is pillow-heif without its encoders, whose libx265 is under the GPL.
    """
    pi_heif: Any = importlib.import_module("pi_heif")
    pi_heif.register_heif_opener()
    return Image.open(source, formats=("HEIF",))


def _conversions(image: Image.Image) -> tuple[str, ...]:
    kinds = []
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        kinds.append("CMYK")
    if image.mode in ("P", "PA"):
        kinds.append("palette")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        kinds.append("alpha")
    if image.mode.startswith(("I", "F")) or _has_deep_colors(image):
        kinds.append("bits")
    return tuple(kinds)


def _has_deep_colors(image: Image.Image) -> bool:
    """Return whether colours are stored with 16 bits each, of which Pillow drops the lower 8."""
    tile = getattr(image, "tile", [])
    mode = tile[0][3] if tile else ""
    mode = mode[0] if isinstance(mode, tuple) and mode else mode
    return image.mode.startswith(("RGB", "LA")) and ";16" in str(mode)


def to_rgb(image: Image.Image, levels: Levels | None = None) -> Image.Image:
    """Convert to RGB; scale 16 bits, because Pillow clips them at 255 (its issue 3011)."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        image = Image.fromarray(scale(values, levels or find_levels(values)))
    return image.convert("RGB")


def _explain(path: Path, error: Exception, data: bytes | None = None) -> ImageError:
    """Return what the file is instead of an image, or the decoder's message where it is broken."""
    if isinstance(error, FileNotFoundError):
        return ImageError("image missing", path, "no such image")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("image enormous", path, str(error))
    try:
        head = _head(path, data)
    except OSError as failure:
        return ImageError("image damaged", path, failure.strerror or str(failure))
    except ValueError as failure:  # a path with NUL, or with halves of characters
        return ImageError("image missing", path, str(failure))
    if not head:
        return ImageError("image empty", path, "it has 0 bytes")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text:
        return ImageError("no image", path, "it is SVG; export it as PNG")
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return ImageError("no image", path, "it is a web page (HTML); download the image itself")
    if isinstance(error, ImportError):
        return ImageError("no image", path, "it is HEIC; export it as JPEG, or pip install pi-heif")
    is_film = head[8:12] in FILM_BRANDS or head.startswith(FILM_STARTS)
    if path.suffix.lower() in FILMS or is_film:
        return ImageError("no image", path, "it is a film; make images of it by ffmpeg")
    if head.startswith(TIFF) and isinstance(error, Image.UnidentifiedImageError):
        return ImageError("no image", path, OTHER_TIFF)
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError("no image", path, f"it is none of {', '.join(FORMATS)} and HEIC")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ImageError("image damaged", path, " ".join(reason.replace(str(path), "file").split()))
