"""What the numbers of a set's masks mean: pieces of two values, objects, or classes; and void."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from app.config.reading import ReadingConfig
from app.datasets.formats.legends import Legend, is_background
from app.datasets.formats.mask_files import MAX_NUMBERS, MaskError, MaskPixels, rgb
from app.datasets.formats.outlines import Rle
from app.datasets.formats.pieces import components, encode_numbers, foreground
from app.errors import UserError

DEFAULT_CLASS = "object"
HIGHEST = (255, 65535, 2**31 - 1)  # of the types that masks are stored in
MAX_COLORS = 256  # of a set; more is no code
SHOWN = 20  # values or colours, in a message


@dataclass
class Evidence:
    """What the masks of a set hold.

    Attributes:
        files: of each number but 0, how many masks have it; of colours as well.
        alone: of each number, how many masks have it and no other.
        flat: numbers that fill a square of 3 x 3 pixels somewhere.
        colors: packed colours of masks of colours, black left out.
        palettes: packed colours of the indices of palette PNGs, where every mask is one; else None.
        gray, colored: how many masks have numbers, and colours; those of 0 alone left out.
    """

    files: Counter[int] = field(default_factory=Counter)
    alone: Counter[int] = field(default_factory=Counter)
    flat: set[int] = field(default_factory=set)
    colors: Counter[int] = field(default_factory=Counter)
    palettes: set[int] | None = field(default_factory=set)
    gray: int = 0
    colored: int = 0

    def add(self, mask: MaskPixels) -> None:
        """Note what a mask holds; pass over one of too many numbers, which is reported later."""
        values = values_of(mask.numbers)
        if len(values) > MAX_NUMBERS or (mask.colored and len(values) > MAX_COLORS):
            return
        numbers = values[values != 0].tolist()
        if not numbers:
            return
        if mask.colored:
            self.colors.update(numbers)
            self.colored += 1
            return
        self.gray += 1
        self.files.update(numbers)
        if len(numbers) == 1:
            self.alone.update(numbers)
        self.flat |= set(numbers) if len(numbers) < 2 else _flat(mask.numbers)
        if mask.palette is None:
            self.palettes = None
        elif self.palettes is not None:
            self.palettes |= set(mask.palette.values())

    def values(self, void: int | None) -> list[int]:
        """Return the numbers but 0 and void, in order."""
        return sorted(self.files.keys() - {void})


@dataclass(frozen=True)
class Meaning:
    """How the masks of a set are read.

    Attributes:
        kind: of two values (pieces), or numbers that count objects or name classes.
        void: number of what is no object.
        highest: of the numbers of masks with smooth edges; None: each mask's own.
        whole: whether what a mask of two values holds is one object, however many pieces it has.
        names: class by number; numbers that are not in it are an error. None: they need no name.
        colored: whether numbers are packed colours.
        class_name: of objects that neither a number nor a folder names.
        notes: what to tell the user.
    """

    kind: Literal["pieces", "objects", "classes"]
    void: int | None = None
    highest: int | None = None
    whole: bool = False
    names: Mapping[int, str] | None = None
    colored: bool = False
    class_name: str = DEFAULT_CLASS
    notes: tuple[str, ...] = ()

    def numbers(self, mask: MaskPixels) -> tuple[NDArray[Any], int]:
        """Return a mask's numbers, and how many pixels of void were set to 0 in them.

        Raises:
            MaskError: it has colours where the set has numbers, or too many numbers.
        """
        numbers = mask.numbers
        if self.colored and not mask.colored:
            numbers = mask.painted()
        elif mask.colored and not self.colored:
            count = len(values_of(numbers))
            raise MaskError(f"holds colours ({count} of them): must have numbers, one a pixel")
        if self.void is not None and (void := numbers == self.void).any():
            return np.where(void, 0, numbers), int(void.sum())
        return numbers, 0

    def objects(self, numbers: NDArray[Any]) -> list[tuple[str | None, str, Rle]]:
        """Return the objects of a mask without void: class by number, place, and mask.

        Raises:
            MaskError: a number that nothing names, or too many of them.
        """
        values = values_of(numbers)
        if len(values) > MAX_NUMBERS:
            raise MaskError(f"has {len(values)} different numbers: this is no mask")
        if self.kind == "pieces":
            shape = foreground(numbers, self.highest)
            found = components(shape) if not self.whole else encode_numbers(shape).values()
            return [(None, f"object {index}", rle) for index, rle in enumerate(found, start=1)]
        if self.kind == "objects":
            masks = encode_numbers(numbers)
            return [(None, f"object {number}", rle) for number, rle in masks.items()]
        return self._classes(numbers, values.tolist())

    def _classes(
        self, numbers: NDArray[Any], values: Sequence[int]
    ) -> list[tuple[str | None, str, Rle]]:
        objects: list[tuple[str | None, str, Rle]] = []
        numbered = {value: str(value) for value in values if value}
        names = {0: "", **(numbered if self.names is None else self.names)}
        if unknown := [value for value in values if value not in names]:
            what = "colours" if self.colored else "numbers"
            shown = ", ".join(self.shown(value) for value in unknown[:SHOWN])
            raise MaskError(f"has {what} that nothing names: {shown}; add them to the list")
        for value in values:
            if not is_background(names[value]):
                for index, rle in enumerate(components(numbers == value), start=1):
                    place = f"{self.shown(value)} piece {index}"
                    objects.append((names[value], place, rle))
        return objects

    def shown(self, value: int) -> str:
        return show_color(value) if self.colored else str(value)


def show_color(color: int) -> str:
    return "({}, {}, {})".format(*rgb(color))


def values_of(numbers: NDArray[Any]) -> NDArray[Any]:
    """Return the numbers that a map has, in order; fast for those of 8 and 16 bits."""
    if numbers.dtype in (np.uint8, np.uint16):
        return np.flatnonzero(np.bincount(numbers.ravel()))
    return np.unique(numbers)


def _flat(numbers: NDArray[Any]) -> set[int]:
    """Return the numbers that fill a square of 3 x 3 pixels."""
    pixels = numbers if numbers.dtype in (np.uint8, np.uint16) else numbers.astype(np.float64)
    square = np.ones((3, 3), np.uint8)
    inside = cv2.erode(pixels, square) == cv2.dilate(pixels, square)
    return set(values_of(numbers[inside]).tolist()) - {0}


def decide(
    evidence: Evidence,
    legend: Legend | None,
    reading: ReadingConfig,
    folder: Path,
    *,
    several: bool = False,
    in_folders: bool = False,
) -> Meaning:
    """Return how masks are read, by what the whole set holds and what the user decided.

    Args:
        legend: file that names numbers or colours; None where there is none.
        several: whether an image has several masks of one class, each then of one object.
        in_folders: whether every mask lies in a folder that names its class.

    Raises:
        UserError: it cannot be told; says what to write or which flag decides.
    """
    in_colors = evidence.colored > evidence.gray or (legend is not None and legend.colors)
    if (evidence.colors and in_colors) or _palettes_named(evidence, legend):
        return _decide_colors(evidence, legend, reading, folder)
    values = evidence.values(None)
    void = _void(evidence, reading, folder)
    values = evidence.values(void)
    classes = legend.classes() if legend is not None and not in_folders else []
    note: tuple[str, ...] = ()
    if void is not None:
        note = (f"masks: {void} is void: left out (--void N decides)",)
    if _has_two_values(evidence, values):
        name, whole = DEFAULT_CLASS, several or reading.masks == "objects"
        if classes and legend is not None:
            name = _only_class(legend, classes, values)
        if several:
            note += ("images have several masks of a class: each mask is one object",)
        if not whole:
            note += (
                "masks of two values: each group of touching pixels is an object "
                "(--masks objects: each mask is one)",
            )
        highest = max(values) if _soft(evidence, values) else None
        return Meaning("pieces", void, highest, whole, class_name=name, notes=note)
    if reading.masks == "objects" or (reading.masks == "auto" and len(classes) < 2):
        name = classes[0] if len(classes) == 1 else DEFAULT_CLASS
        if reading.masks == "auto":
            note += (
                "numbers in masks are taken to count objects; --masks classes takes them to name "
                "classes, as classes.txt or classes.json says",
            )
        return Meaning("objects", void, class_name=name, notes=note)
    names = legend.by_number(values) if legend is not None and not in_folders else None
    source = f"by {legend.path.name}" if names is not None and legend is not None else "by number"
    note += (
        f"numbers in masks name classes, {source}; each group of touching pixels is an object "
        "(--masks objects takes them to count objects)",
    )
    return Meaning("classes", void, names=names, notes=note)


def _palettes_named(evidence: Evidence, legend: Legend | None) -> bool:
    """Return whether masks are palette PNGs whose colours are those of the file of names."""
    if legend is None or evidence.palettes is None:
        return False
    used = evidence.palettes - {0}
    return bool(used) and used <= legend.colors.keys()


def _decide_colors(
    evidence: Evidence, legend: Legend | None, reading: ReadingConfig, folder: Path
) -> Meaning:
    if reading.void is not None:
        raise UserError(
            f"{folder}: --void {reading.void} is a number, and masks have colours: give the colour "
            "the name 'void' in the file of names"
        )
    found = sorted(evidence.colors, key=lambda color: -evidence.colors[color])
    if reading.masks == "objects":
        note = ("colours in masks count objects: --masks objects",)
        return Meaning("objects", colored=True, notes=note)
    if legend is not None and legend.colors:
        names = legend.colors if 0 in legend.colors else {0: "background", **legend.colors}
        note = (
            f"colours in masks name classes, by {legend.path.name}; each group of touching pixels "
            "is an object",
        )
        return Meaning("classes", names=names, colored=True, notes=note)
    shown = ", ".join(show_color(color) for color in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise UserError(
        f"{folder}: masks have colours, and no file says what they mean: {shown}{more}. Write "
        f"{folder / 'class_dict.csv'}: a line 'name,r,g,b', then a line a class, such as "
        f"'cat,{','.join(map(str, rgb(found[0])))}'; or --masks objects takes each colour of an "
        "image for one object"
    )


def _void(evidence: Evidence, reading: ReadingConfig, folder: Path) -> int | None:
    """Return the number of void: the user's, else the type's highest beside small numbers."""
    values = evidence.values(None)
    if reading.void is not None:
        if reading.void in (0, *values):
            return reading.void or None
        there = ", ".join(map(str, [0, *values][:SHOWN])) + (" …" if len(values) >= SHOWN else "")
        raise UserError(f"{folder}: --void {reading.void}: no mask has it; there are {there}")
    top = max(values, default=0)
    others = values[:-1]
    if top not in HIGHEST or not others or _soft(evidence, values):
        return None
    if 2 * evidence.alone[top] > evidence.files[top]:  # objects of masks of two values
        return None
    small = max(32, 2 * len(others) + 8)  # numbers that are counted up from 1
    return top if others[-1] <= small and others[-1] < 0.95 * top else None


def _has_two_values(evidence: Evidence, values: Sequence[int]) -> bool:
    """Return whether the set has one number beside 0: its edges may be smooth, its scale mixed."""
    if len(values) < 2 or _soft(evidence, values):
        return True
    return set(values) <= {1, 255} and all(evidence.alone[v] == evidence.files[v] for v in values)


def _soft(evidence: Evidence, values: Sequence[int]) -> bool:
    """Return whether all numbers between are those of smooth edges or of a lossy file.

    They fill no square, as an object does; but for noise near to both ends.
    """
    top = max(values, default=0)
    if top < 64 or top not in evidence.flat:
        return False
    between = [value for value in values if value != top]
    middle = [value for value in between if top / 16 < value < top * 15 / 16]
    noise = [value for value in between if value in evidence.flat and value not in middle]
    both_ends = any(value > top / 2 for value in noise) or not noise
    return bool(middle) and both_ends and not evidence.flat.intersection(middle)


def _only_class(legend: Legend, classes: Sequence[str], values: Iterable[int]) -> str:
    """Return the class of masks of two values, as the file of names has it."""
    if len(classes) == 1:
        return classes[0]
    top = max(values, default=0)
    if name := legend.numbers.get(top):
        return name
    if len(legend.names) > top and is_background(legend.names[0]):
        return legend.names[top]
    raise UserError(
        f"{legend.path}: names {len(classes)} classes, and masks have the one number {top}: write "
        f"each number before its name, as '{top} {classes[0]}'"
    )
