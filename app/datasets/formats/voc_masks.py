"""Pascal VOC's masks without XML: SegmentationObject/ and SegmentationClass/ beside JPEGImages/.

Indexed as VOC has them, or painted with its colours, as CVAT's "Segmentation mask 1.1" has them
with a labelmap.txt and ImageSets/Segmentation/*.txt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.folders import WORDS
from app.datasets.formats.draft import Draft
from app.datasets.formats.legends import Legend, find_legend, is_background
from app.datasets.formats.mask_files import ENDINGS, MaskError, pack, read_mask, rgb
from app.datasets.formats.mask_layout import IMAGE_FOLDERS
from app.datasets.formats.mask_meaning import show_color, values_of
from app.datasets.formats.pieces import components, encode_numbers
from app.datasets.names import Named, Names, fold, walk_images
from app.errors import UserError

OBJECTS, CLASSES = "segmentationobject", "segmentationclass"
VOID = 255  # the border around objects, which belongs to none
NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep"),
    *("sofa", "train", "tv monitor"),
)
MAX_LIST = 64 * 2**20  # bytes of a list of images


@dataclass(frozen=True)
class VocMasks:
    """The folders of a set, and what its class masks mean.

    Attributes:
        objects: stem → object mask; empty where there are none: touching pixels are objects then.
        classes: stem → class mask.
        stems: of the images to read, by split.
    """

    root: Path
    objects: dict[str, Path]
    classes: dict[str, Path]
    stems: dict[str, list[str]]
    legend: Legend | None
    notes: tuple[str, ...] = field(default=())


def is_voc_masks(folder: Path) -> bool:
    """Return whether there are masks of classes, and no XML that goes with them."""
    classes = _folder(folder, CLASSES)
    if classes is None or next(walk_images(classes, ENDINGS), None) is None:
        return False
    xml = _folder(folder, "annotations")
    return xml is None or next(xml.glob("*.xml"), None) is None


def find_splits(folder: Path, reading: ReadingConfig, *, whole: bool = False) -> VocMasks:
    """Find the masks, their list of classes, and the splits of ImageSets/Segmentation/.

    Args:
        whole: whether the folder is one split, `train`, whatever lists it has.

    Raises:
        UserError: nothing names the classes, or a list cannot be read.
    """
    root = folder.resolve()
    classes, objects = _masks(root, CLASSES), _masks(root, OBJECTS)
    legend = find_legend([root, root / "ImageSets"])
    if legend is not None and not legend.colors and not legend.numbers:
        legend = replace(legend, numbers=legend.by_number([len(legend.names)]))
    notes = () if legend is not None else ("classes by VOC's own numbers and colours: 20 classes",)
    stems = {"train": sorted(classes)} if whole else _stems(root, classes)
    if reading.void not in (None, VOID):
        raise UserError(f"{folder}: --void {reading.void}: void is {VOID} in VOC's masks")
    return VocMasks(root, objects, classes, stems, legend, notes)


def _folder(root: Path, name: str) -> Path | None:
    try:
        return next(
            (p for p in sorted(root.iterdir()) if fold(p.name) == name and p.is_dir()), None
        )
    except OSError:
        return None


def _masks(root: Path, name: str) -> dict[str, Path]:
    """Return the masks of a folder by their path in it without ending, folded."""
    folder = _folder(root, name)
    if folder is None:
        return {}
    return {
        fold(path.relative_to(folder).with_suffix("").as_posix()): path
        for path in walk_images(folder, ENDINGS)
    }


def _stems(root: Path, classes: dict[str, Path]) -> dict[str, list[str]]:
    """Return the stems of each split by ImageSets/Segmentation/*.txt; all to train on without."""
    lists = root / "ImageSets" / "Segmentation"
    found: dict[str, list[str]] = {}
    paths = sorted(lists.glob("*.txt"))
    names = {fold(path.stem) for path in paths}
    for path in paths:
        name = fold(path.stem)
        split = "train" if name == "default" else WORDS.get(name)
        if split is None or (name == "trainval" and "train" in names):  # which it repeats, with val
            continue
        if not path.resolve().is_relative_to(root) or path.stat().st_size > MAX_LIST:
            raise UserError(f"{path}: leads out of the dataset, or is no list of images")
        try:
            lines = path.read_bytes().decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: must be a UTF-8 list of images ({error})") from None
        found.setdefault(split, []).extend(line.strip() for line in lines if line.strip())
    return found or {"train": sorted(classes)}


def read(masks: VocMasks, split: str) -> Reading:
    """Read the images of a split: an object for each number or colour of its object mask.

    The class of an object is the one that most of its pixels have in the class mask. Without an
    object mask, each group of touching pixels of one class is an object.
    """
    folders = (_folder(masks.root, name) for name in IMAGE_FOLDERS)
    pictures = next((path for path in folders if path), masks.root / "JPEGImages")
    draft = Draft(masks.root, names=Names([pictures], masks.root))
    of_images = {fold(stem) for stem in masks.stems[split]}
    for stem in masks.stems[split]:
        image = _add_image(draft, stem)
        if image is not None:
            _read_image(draft, masks, image, fold(stem))
    if len(masks.stems) == 1:
        for stem in sorted(masks.objects.keys() - of_images):
            path = masks.objects[stem]
            remedy = "has no mask of its name in SegmentationClass/"
            draft.drop_file("orphan", draft.place(path), path.name, remedy)
    return replace(draft.finish(), notes=masks.notes)


def _add_image(draft: Draft, stem: str) -> Image | None:
    found = draft.names.find(stem)
    if isinstance(found, Named):
        return draft.add_image(found.path, draft.place(found.path))
    kind = "ambiguous name" if found.startswith("may be") else "orphan"
    draft.drop_file(kind, f"SegmentationClass/{stem}", stem, found)
    return None


def _read_image(draft: Draft, masks: VocMasks, image: Image, stem: str) -> None:
    path, place = masks.classes.get(stem), draft.place(image.path)
    if path is None:
        remedy = "has no mask in SegmentationClass/: it is taken to show no object"
        draft.findings.add("unlabelled", place, image.path.name, remedy)
        return
    try:
        classes, void = _class_map(draft, masks, image, path)
        numbers = None
        if (at := masks.objects.get(stem)) is not None:
            numbers = _numbers(draft, image, at)
    except MaskError as fault:
        draft.drop_image(image, fault.kind, draft.place(path), path.name, str(fault))
        return
    if void:
        remedy = f"{void} pixels of {VOID} are no object: left out"
        draft.findings.add("void", draft.place(path), path.name, remedy)
    for name, what, rle in _objects(classes, numbers):
        draft.add_mask(image, name, rle, f"{place} {what}")


@dataclass(frozen=True)
class _ClassMap:
    """(height, width) indices of `names`; 0 is background."""

    indices: NDArray[np.int64]
    names: list[str]


def _objects(
    classes: _ClassMap, numbers: NDArray[Any] | None
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if numbers is None:
        for index, name in enumerate(classes.names):
            if index and (classes.indices == index).any():
                for piece, rle in enumerate(components(classes.indices == index), start=1):
                    yield name, f"{name} {piece}", rle
        return
    values, owners = np.unique(numbers, return_inverse=True)
    count = len(classes.names)
    pairs = owners.ravel() * count + classes.indices.ravel()
    votes = np.bincount(pairs, minlength=len(values) * count).reshape(len(values), count)
    votes[:, 0] = 0  # a class that most of an object lacks is still its class
    for (number, rle), own in zip(encode_numbers(numbers).items(), votes[values != 0], strict=True):
        if own.any():
            yield classes.names[int(own.argmax())], f"object {number}", rle


def _pixels(
    draft: Draft, image: Image, path: Path, legend: Legend | None = None
) -> tuple[NDArray[Any], bool]:
    """Return the numbers of a mask, or its packed colours, and whether they are colours.

    Those of a palette are colours where the file of names has them all.
    """
    if not draft.contains(path, draft.place(path)):
        raise MaskError("its mask is outside the dataset")
    mask = read_mask(path, (image.width, image.height))
    if mask.palette and legend is not None and legend.colors:
        known = {0, VOID_COLOR, *legend.colors}
        if known.issuperset(mask.palette.values()):
            return mask.painted(), True
    return mask.numbers, mask.colored


def _numbers(draft: Draft, image: Image, path: Path) -> NDArray[Any]:
    """Return object numbers, or packed colours in their place, without void."""
    numbers, colored = _pixels(draft, image, path)
    return np.where(numbers == (VOID_COLOR if colored else VOID), 0, numbers)


def _class_map(draft: Draft, masks: VocMasks, image: Image, path: Path) -> tuple[_ClassMap, int]:
    """Return the classes of an image's pixels, and how many of them are void."""
    pixels, colored = _pixels(draft, image, path, masks.legend)
    by_index, by_color = _by_index(masks.legend), _by_color(masks.legend)
    if not colored and any(v not in by_index and v not in (0, VOID) for v in values_of(pixels)):
        grays = pixels.astype(np.int32) * 0x010101  # a painted mask that shows a gray class alone
        if all(v in by_color or v == 0 for v in values_of(grays)):
            pixels, colored = grays, True
    table = by_color if colored else by_index
    void_value = VOID_COLOR if colored else VOID
    names = ["", *dict.fromkeys(name for name in table.values() if not is_background(name))]
    values = values_of(pixels).tolist()
    lacking = [v for v in values if v not in table and v not in (0, void_value)]
    if lacking:
        what = ", ".join(show_color(v) if colored else str(v) for v in lacking[:10])
        kind = "colours" if colored else "numbers"
        raise MaskError(f"has {kind} that nothing names: {what}; add them to labelmap.txt")
    indices = np.zeros(pixels.shape, np.int64)
    for value in values:
        name = table.get(value, "")
        if not is_background(name):
            indices[pixels == value] = names.index(name)
    void = 0 if void_value in table else int((pixels == void_value).sum())
    return _ClassMap(indices, names), void


def _by_index(legend: Legend | None) -> dict[int, str]:
    if legend is None:
        return dict(enumerate(NAMES))
    return legend.numbers or dict(enumerate(legend.names or legend.colors.values()))


def _by_color(legend: Legend | None) -> dict[int, str]:
    """Return the classes by packed colour: the file's, else those of VOC's own colours."""
    if legend is not None and legend.colors:
        return legend.colors
    return {color_of(index): name for index, name in _by_index(legend).items() if index < 256}


def color_of(index: int) -> int:
    """Return the packed colour that VOC has for a number (VOCdevkit, VOClabelcolormap.m)."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (index >> 3 * bit + channel & 1) << 7 - bit
    return int(pack(np.array(channels, dtype=np.uint8)))


VOID_COLOR = color_of(VOID)
assert rgb(VOID_COLOR) == (224, 224, 192)
