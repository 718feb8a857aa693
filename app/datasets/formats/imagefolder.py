"""HuggingFace's imagefolder: `metadata.jsonl` beside the images, with the boxes of each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from app.config.reading import ReadingConfig
from app.config.yaml_data import parse_yaml
from app.datasets.coco import Image, Reading
from app.datasets.conventions import TO_XYWH, convention
from app.datasets.folders import WORDS, split_on_way
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.telling import few, leads_out
from app.datasets.geometry import is_int, is_number
from app.datasets.names import Names
from app.errors import UserError

PATTERNS = ("metadata.jsonl", "*/metadata.jsonl", "*/*/metadata.jsonl")
CLASS_KEYS = ("category", "categories", "label", "labels", "class", "classes", "category_id")
FEW_LINES = 20
LARGEST_CARD = 2**18  # bytes of a README.md that is looked into
Line = tuple[Path, int, str]  # file, number, text


def is_imagefolder(folder: Path) -> bool:
    """Return whether one of the first lines of a metadata.jsonl has objects with boxes."""
    for path in few(folder, *PATTERNS):
        with contextlib.suppress(OSError, UnicodeDecodeError), path.open(encoding="utf-8") as file:
            heads = [file.readline(2**20) for _ in range(FEW_LINES)]
            if any('"objects"' in head and '"bbox"' in head for head in heads):
                return True
    return False


def splits(folder: Path, reading: ReadingConfig) -> dict[str, Read]:
    """Return the splits by the folders of the files, else by those that the lines name."""
    folder = folder.resolve()
    by_split: dict[str, list[Line]] = {}
    for path in few(folder, *PATTERNS):
        own = split_on_way(path, folder)
        text = path.read_bytes().decode("utf-8-sig", "replace")
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                split = own or _split_named(line) or "train"
                by_split.setdefault(split, []).append((path, number, line))
    return {split: partial(_read, folder, lines, reading) for split, lines in by_split.items()}


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _split_named(line: str) -> str | None:
    """Return the split of the first folder in a line's file_name."""
    entry = _parse(line)
    name = entry.get("file_name") if isinstance(entry, dict) else None
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    return WORDS.get(parts[0].lower()) if len(parts) > 1 else None


def _read(folder: Path, lines: Sequence[Line], reading: ReadingConfig) -> Reading:
    """Read these lines: an image each, with the boxes (x, y, width, height) of its objects.

    Returns:
        What is sound, and every fault of every line.
    """
    beside = dict.fromkeys(path.parent for path, *_ in lines)
    draft, class_names = Draft(folder, names=Names([*beside, folder], folder)), _class_names(folder)
    found: list[tuple[Image, object, object, str]] = []
    for path, number, line in lines:
        place, entry = f"{draft.place(path)} line {number}", _parse(line)
        if not isinstance(entry, dict):
            draft.drop_file("entry", place, line, "must be a JSON object")
            continue
        image = draft.add_named(entry.get("file_name"), place, path.parent)
        if image is None:
            continue
        draft.put_in_group(image, entry, reading.group_column)
        if entry.get("objects") is None:
            remedy = "has no objects in metadata.jsonl: it is taken to show none"
            draft.findings.add("unlabelled", place, entry.get("file_name"), remedy)
        for index, (box, label) in enumerate(_objects(entry.get("objects"))):
            name = class_names.get(label, str(label)) if is_int(label) else label
            found.append((image, name, box, f"{place}: objects[{index}]"))
    _add_boxes(draft, found, reading)
    return draft.finish()


def _objects(objects: object) -> list[tuple[object, object]]:
    """Return the box and the class of each object, from lists of both or a list of objects."""
    if isinstance(objects, list):
        one = [entry if isinstance(entry, dict) else {} for entry in objects]
        return [(entry.get("bbox"), _first(entry)) for entry in one]
    if not isinstance(objects, dict):
        return []
    boxes, labels = objects.get("bbox"), _first(objects)
    boxes = boxes if isinstance(boxes, list) else []
    labels = labels if isinstance(labels, list) else []
    longest = max(len(boxes), len(labels))
    padded = [[*values, *[None] * (longest - len(values))] for values in (boxes, labels)]
    return list(zip(*padded, strict=True))


def _first(entry: dict[str, Any]) -> object:
    return next((entry[key] for key in CLASS_KEYS if key in entry), None)


def _add_boxes(
    draft: Draft, found: Sequence[tuple[Image, object, object, str]], reading: ReadingConfig
) -> None:
    convert = TO_XYWH.get(reading.boxes, TO_XYWH["xywh"])
    sound = {
        place: (convert(box, (image.width, image.height)), (image.width, image.height))
        for image, _, box, place in found
        if isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    }
    fault = convention(list(sound.values()))
    for image, name, box, place in found:
        if place not in sound:
            remedy = "must be four finite numbers [x, y, width, height] in pixels"
            draft.drop_object("bbox", place, box, remedy)
        elif fault:
            draft.drop_object("box convention", place, box, fault)
        else:
            draft.add_box(image, name, sound[place][0], place)


def _class_names(folder: Path) -> dict[int, str]:
    """Return the classes' names by their number, as the dataset card's features have them."""
    path = folder / "README.md"
    if not path.is_file() or leads_out(path, folder):
        return {}
    text = path.read_bytes()[:LARGEST_CARD].decode("utf-8", "replace")
    try:
        card = parse_yaml(text.split("---")[1], str(path)) if text.startswith("---") else None
    except (UserError, IndexError):  # a card that says nothing of the labels
        return {}
    waiting = [card]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            label = node.get("class_label")
            if isinstance(label, dict) and (names := _numbered(label.get("names"))):
                return names
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    return {}


def _numbered(names: object) -> dict[int, str]:
    if isinstance(names, list):
        names = dict(enumerate(names))
    pairs = names.items() if isinstance(names, dict) else ()
    return {int(key): str(name) for key, name in pairs if str(key).isdecimal()}
