"""Every image decoded whole, once: damage that headers hide, and images that are there twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from app.datasets.coco import Dataset, Image
from app.datasets.duplicates import in_threads
from app.datasets.faults import Findings
from app.datasets.images import ImageError, open_image


def find_unusable(
    splits: Mapping[str, Dataset], folder: Path, on_image: Callable[[int], None]
) -> tuple[dict[str, set[int]], Findings]:
    """Find each split's images that are to be left out; return their ids, and the faults.

    An image that is in another split as well is left out of the training images, else of the test
    images: the figures would be too good. A test split that has images of the validation split
    alone has nothing to say: it is none of those that are returned. Memory does not grow with the
    images' size or number.

    Args:
        folder: the dataset's; images are named relative to it.
        on_image: is told how many are done.
    """
    findings = Findings(str(folder))
    unusable: dict[str, set[int]] = {split: set() for split in splits}
    owners: dict[bytes, tuple[str, str]] = {}  # of these pixels: split and place
    # what an image is left out of comes later, so that those that keep it are known
    order = sorted(splits, key=("valid", "test", "train").index)
    copies: dict[str, list[tuple[str, str, str]]] = {split: [] for split in splits}
    listed = [(split, image) for split in order for image in splits[split].images]
    results = in_threads(_digest, [image for _, image in listed], on_image)
    for (split, image), digest in zip(listed, results, strict=True):
        place = _place(image.path, folder)
        if isinstance(digest, ImageError):
            remedy = "cannot be decoded whole; replace the file, or leave it out of the labels"
            findings.add(digest.kind, place, digest.reason, remedy)
            unusable[split].add(image.id)
            continue
        owner, first = owners.setdefault(digest, (split, place))
        if owner != split:
            copies[split].append((place, image.path.name, first))
            unusable[split].add(image.id)
        elif first != place:
            remedy = f"has the pixels of {first}; list each image once"
            findings.add("image twice", place, image.path.name, remedy)
    tested = splits["test"].images if "test" in splits else ()
    if tested and len(copies["test"]) == len(tested):
        remedy = "its images are all in valid as well: the set is read without a test split"
        findings.add("same splits", "test", f"{len(copies.pop('test'))} images", remedy)
        del unusable["test"]
    for place, name, first in (copy for found in copies.values() for copy in found):
        remedy = f"has the pixels of {first}; keep it in one split"
        findings.add("in two splits", place, name, remedy)
    return unusable, findings


def decoding_problems(paths: Sequence[Path]) -> dict[Path, str]:
    """Return what keeps images from being decoded whole, by path; sound ones are not in it."""
    problems = in_threads(_damage, paths, lambda _: None)
    return {path: text for path, text in zip(paths, problems, strict=True) if text}


def _damage(path: Path) -> str | None:
    try:
        open_image(path)
    except ImageError as error:
        return str(error)
    return None


def _digest(record: Image) -> bytes | ImageError:
    """Hash the upright RGB pixels and their shape: the same in another format or folder."""
    try:
        image = open_image(record.path, record.levels)
    except ImageError as error:
        return error
    digest = hashlib.sha256(repr(image.size).encode())
    digest.update(image.tobytes())
    return digest.digest()


def _place(path: Path, folder: Path) -> str:
    root = folder.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
