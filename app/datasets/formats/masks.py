"""A folder of mask PNGs beside the images: `images/` and `masks/`."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.formats.draft import Draft
from app.datasets.formats.outlines import encode
from app.datasets.names import walk_images

DEFAULT_CLASS = "object"
ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's modes of whole numbers


def is_masks(folder: Path) -> bool:
    return (folder / "images").is_dir() and any((folder / "masks").rglob("*.png"))


def read(folder: Path, root: Path, _: ReadingConfig, class_name: str = DEFAULT_CLASS) -> Reading:
    """Read each image of `images/` with the mask of its name: an object for each number but 0.

    An image without a mask has no objects.

    Args:
        class_name: of the masks that lie in `masks/`; those in a folder `masks/<class>/` are of
            the class that the folder names.

    Returns:
        What is sound, and every fault of every mask.
    """
    draft, top = Draft(root), folder.resolve() / "masks"
    masks: dict[str, list[Path]] = {}
    for path in sorted(top.rglob("*.png")):
        masks.setdefault(path.stem, []).append(path)
    stems: dict[str, Path] = {}
    for path in walk_images(folder.resolve() / "images"):
        if path.stem in stems:
            remedy = f"has the name of {stems[path.stem].name}, and so its masks; rename one"
            draft.findings.add("listed twice", draft.place(path), path.name, remedy)
        stems[path.stem] = path
        image = draft.add_image(path, draft.place(path))
        for mask in masks.get(path.stem, []) if image else []:
            name = class_name if mask.parent == top else mask.parent.name
            _read_mask(draft, image, mask, name)
    for stem in sorted(masks.keys() - stems.keys()):
        for mask in masks[stem]:
            remedy = f"has no image {stem}.* in images/; add it or remove the mask"
            draft.drop_file("orphan", draft.place(mask), mask.name, remedy)
    return draft.finish()


def _read_mask(draft: Draft, image: Image | None, path: Path, name: str) -> None:
    place = draft.place(path)
    if image is None or not draft.contains(path, place):
        return
    try:
        numbers = read_numbers(path, image.width, image.height)
    except ValueError as fault:
        draft.drop_image(image, "label file", place, path.name, str(fault))
        return
    for number in np.unique(numbers[numbers != 0]):
        draft.add_mask(image, name, encode(numbers == number), f"{place} object {number}")


def read_numbers(path: Path, width: int, height: int) -> NDArray[np.integer]:
    """Read the (height, width) object numbers of a one-channel PNG: palette indices, not colors.

    Raises:
        ValueError: not a readable PNG, of another size, or of colours; says what to do.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(path) as picture:
                mode, numbers = picture.mode, np.asarray(picture)
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise ValueError(f"cannot be read as an image ({error}); replace it") from None
    if mode not in ONE_CHANNEL:
        raise ValueError(f"holds colours ({mode}): must be a one-channel PNG of object numbers")
    if numbers.shape != (height, width):
        raise ValueError(
            f"has {numbers.shape[1]} x {numbers.shape[0]} pixels: must be its image's "
            f"{width} x {height}"
        )
    return numbers.astype(np.int64)
