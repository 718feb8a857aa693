"""KITTI: a text file an image in label_2/, an object a line, as NVIDIA TAO has it too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.folders import by_way, image_folders
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.telling import few, files
from app.datasets.geometry import is_number, to_number
from app.datasets.names import Names

FOLDERS = ("label_2", "labels", "label")
WAYS = ("{}/*.txt", "*/{}/*.txt", "*/*/{}/*.txt", "{}/*/*.txt")
PATTERNS = tuple(way.format(name) for way in WAYS for name in FOLDERS)
# class, truncated, occluded, alpha, left, top, right, bottom, h, w, l, x, y, z, ry, and a score
NUMBERS = 14  # after the class, and a score where the labels are detections
NO_CLASS = "DontCare"  # parts of an image in which nothing is labelled


def is_kitti(folder: Path) -> bool:
    """Return whether one of the first label files has a line of 15 columns."""
    return any(_parse(_first_line(path)) for path in few(folder, *PATTERNS))


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(1000)
    except OSError:
        return ""


def _parse(line: str) -> tuple[str, list[float]] | None:
    """Return a line's class, which may have blanks as other tools write it, and its 14 numbers."""
    words = line.split()
    scored = len(words) > NUMBERS + 1 and is_number(to_number(words[-NUMBERS - 1]))
    count = NUMBERS + scored
    name, numbers = words[:-count], [to_number(word) for word in words[-count:]]
    if (
        not name
        or name[0][0] in ".+-"
        or name[0][0].isdecimal()
        or not all(map(is_number, numbers))
    ):
        return None
    return " ".join(name), numbers[:NUMBERS]


def splits(folder: Path, _: ReadingConfig) -> dict[str, Read]:
    """Return the splits by the folders on the way to the label files."""
    folder = folder.resolve()
    return {
        split: partial(_read, folder, image_folders(folder, told), found)
        for split, (told, found) in by_way(files(folder, *PATTERNS), folder).items()
    }


def _read(folder: Path, own: Sequence[Path], paths: Sequence[Path]) -> Reading:
    """Read these files, each with the image of its name in image_2/ or images/.

    Args:
        own: the folders of the split's images.

    Returns:
        What is sound, and every fault of every line.
    """
    bases = dict.fromkeys(path.parent.parent for path in paths)
    roots = [base / name for base in bases for name in ("image_2", "images", "image")]
    names = Names([*roots, *own, folder], folder, own[0] if own else folder)
    draft, ignored = Draft(folder, names=names), 0
    for path in paths:
        place, found = draft.place(path), draft.find(path.stem)
        if found is None:
            remedy = "belongs to no image; add the image, or mend the label's name"
            draft.drop_file("orphan", place, path.name, remedy)
            continue
        image = draft.add_image(found, place)
        if image is not None:
            ignored += _read_lines(draft, image, path)
    if ignored:
        remedy = f"names no class: {ignored} boxes of it are left out"
        draft.findings.add("placeholder", "labels", NO_CLASS, remedy)
    return draft.finish()


def _read_lines(draft: Draft, image: Image, path: Path) -> int:
    """Add a file's objects; return how many of its lines are of no class."""
    ignored = 0
    for number, line in enumerate((draft.read_text(path, image) or "").splitlines(), start=1):
        place = f"{draft.place(path)} line {number}"
        if line.split()[:1] == [NO_CLASS]:
            ignored += 1
        elif parsed := _parse(line):
            name, numbers = parsed
            left, top, right, bottom = numbers[3:7]
            draft.add_box(image, name, [left, top, right - left, bottom - top], place)
        elif line.strip():
            draft.drop_object("label", place, line, "must have a class and 14 numbers, as KITTI")
    return ignored
