"""Image files → upright RGB: the one way in, for training and for prediction."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from app.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def open_image(path: Path) -> Image.Image:
    """Decode an image whole, turn it upright by its EXIF orientation, convert it to RGB.

    Raises:
        UserError: missing, not an image, cut short, or too large to be one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error
        raise UserError(
            f"{path}: cannot be read as an image ({error}). Replace or remove it."
        ) from None


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, turned by the EXIF orientation; reads the header alone.

    Raises:
        UserError: not an image, or too large to be one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else (image.width, image.height)
    except Exception as error:  # Pillow raises nearly anything on a damaged header
        raise UserError(
            f"{path}: cannot be opened as an image ({error}). Replace or remove it."
        ) from None


def decoding_problems(paths: Iterable[Path]) -> dict[Path, str]:
    """What keeps images from being decoded whole, by path; as many at once as there are cores."""
    with ThreadPoolExecutor() as pool:
        problems = pool.map(_decoding_problem, paths := list(paths))
        return {path: text for path, text in zip(paths, problems, strict=True) if text}


def _decoding_problem(path: Path) -> str | None:
    try:
        open_image(path)
    except UserError as error:
        return str(error)
    return None
