"""Folders of images and of masks: `images/` and `masks/`, and their usual other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from app.config.reading import ReadingConfig
from app.console import progress
from app.datasets.coco import Image, Reading
from app.datasets.duplicates import in_threads
from app.datasets.formats.draft import Draft
from app.datasets.formats.legends import find_legend
from app.datasets.formats.mask_files import MaskError, MaskPixels, read_mask
from app.datasets.formats.mask_files import read_numbers as read_numbers  # voc.py's
from app.datasets.formats.mask_layout import Pairs, Part, class_of, find_parts, pair_up
from app.datasets.formats.mask_meaning import Evidence, Meaning, decide

DEFECTS = (
    "MVTec AD's layout: images in train/ show no defect, so they and those of test/ are one set, "
    "to be split anew"
)
LOSSY = "a JPEG of two values: cut at half; PNG keeps masks as they were drawn"


@dataclass(frozen=True)
class MaskSplit:
    """A split of masks: its folders, its images with their masks, and how masks are read."""

    part: Part
    pairs: Pairs
    meaning: Meaning


def is_masks(folder: Path) -> bool:
    return bool(find_parts(folder))


def find_splits(folder: Path, reading: ReadingConfig) -> dict[str, MaskSplit]:
    """Return each split that is there: train, valid, test.

    Every mask is decoded once, because the set tells what a mask's numbers mean.

    Raises:
        UserError: what they mean cannot be told; says what to write or which flag decides.
    """
    root = folder.resolve()
    parts = find_parts(root)
    pairs = {split: pair_up(part) for split, part in parts.items()}
    _share(parts, pairs)
    paths = list(dict.fromkeys(mask for pair in pairs.values() for mask in _masks(pair)))
    inside = [path for path in paths if path.is_file() and path.resolve().is_relative_to(root)]
    evidence = Evidence()
    with progress("what masks hold: mask", len(inside)) as advance:
        for mask in in_threads(_read_or_none, inside, lambda done: advance(done, "")):
            if mask is not None:
                evidence.add(mask)
    tops = [path for part in parts.values() for path in (part.masks, part.masks.parent)]
    legend = find_legend(dict.fromkeys([root, *tops]))
    found = [
        [class_of(mask, parts[split], image) for mask in masks]
        for split, pair in pairs.items()
        for image, masks in pair.masks.items()
    ]
    named = [name for names in found for name in names]
    meaning = decide(
        evidence,
        legend,
        reading,
        root,
        several=any(len(set(names)) < len(names) for names in found),
        in_folders=bool(named) and None not in named,
    )
    return {split: MaskSplit(parts[split], pairs[split], meaning) for split in parts}


def _masks(pairs: Pairs) -> list[Path]:
    return [mask for masks in pairs.masks.values() for mask in masks]


def _read_or_none(path: Path) -> MaskPixels | None:
    try:
        return read_mask(path)
    except MaskError:
        return None


def _share(parts: Mapping[str, Part], pairs: Mapping[str, Pairs]) -> None:
    """Give masks and images of a folder that splits share to the split that has their partner."""
    for split, part in parts.items():
        others = [other for other in parts if other != split]
        used = {mask for other in others for mask in _masks(pairs[other])}
        pairs[split].orphans = [path for path in pairs[split].orphans if path not in used]
        if any(parts[other].images == part.images for other in others):
            found = {image: masks for image, masks in pairs[split].masks.items() if masks}
            pairs[split].masks = found
    first: set[Path] = set()
    for pair in pairs.values():
        pair.orphans = [path for path in pair.orphans if path not in first]
        first |= set(pair.orphans)


def read(split: MaskSplit, root: Path) -> Reading:
    """Read the images of a split and the objects of their masks.

    An image without a mask has no objects.

    Args:
        root: the dataset's folder.

    Returns:
        What is sound, and every fault of every mask.
    """
    draft = Draft(root)
    for path, owner in split.pairs.alike:
        remedy = f"has the name of {owner.name}, and so its masks; rename one"
        draft.findings.add("listed twice", draft.place(path), path.name, remedy)
    for path, masks in split.pairs.masks.items():
        image = draft.add_image(path, draft.place(path))
        sound = split.part.defects and path.parent.name == "good"
        if image is not None and not masks and not sound:
            remedy = "has no mask: it is taken to show no object"
            draft.findings.add("unlabelled", draft.place(path), path.name, remedy)
        for mask in masks if image is not None else []:
            name = class_of(mask, split.part, path) or split.meaning.class_name
            assert image is not None
            _read_mask(draft, image, mask, name, split.meaning)
    for path in split.pairs.orphans:
        remedy = f"has no image of its name in {draft.place(split.part.images)}; add it"
        draft.drop_file("orphan", draft.place(path), path.name, remedy)
    reading = draft.finish()
    if split.meaning.kind == "classes" and split.meaning.names is None:
        found = [category.name for category in reading.dataset.categories]
        names = ", ".join(f"'{name}'" for name in found if name.isdecimal())
        remedy = (
            f"{names}: numbers mean nothing to the model; write '1 cat' and so on, a line a "
            f"class, into {draft.root / 'classes.txt'}"
        )
        draft.findings.add("numbers", "masks", f"{len(found)} classes", remedy)
    notes = (*([DEFECTS] if split.part.defects else []), *split.meaning.notes)
    return replace(reading, faults=tuple(draft.findings.faults), notes=notes)


def _read_mask(draft: Draft, image: Image, path: Path, name: str, meaning: Meaning) -> None:
    place = draft.place(path)
    if not draft.contains(path, place):
        draft.drop_image(image, "label file", place, path.name, "its mask is outside the dataset")
        return
    try:
        mask = read_mask(path, (image.width, image.height))
        numbers, void = meaning.numbers(mask)
        objects = meaning.objects(numbers)
    except MaskError as fault:
        draft.drop_image(image, fault.kind, place, path.name, str(fault))
        return
    if mask.lossy:
        draft.findings.add("lossy mask", place, path.name, LOSSY)
    if void:
        remedy = f"{void} pixels of {meaning.shown(meaning.void or 0)} are no object: left out"
        draft.findings.add("void", place, path.name, remedy)
    for own, what, rle in objects:
        draft.add_mask(image, name if own is None else own, rle, f"{place} {what}")
