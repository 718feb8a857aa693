"""The file that says what the numbers or colours of masks mean.

`classes.txt` (a name a line, or a number and a name), `labelmap.txt` of CVAT, `class_dict.csv`
(name,r,g,b), `label_colors.txt` of CamVid, `obj.names`, `classes.json`, `dataset_meta.json` of
Datumaro, `legend.json` of `infer --save semantic`, and others alike.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.datasets.geometry import is_int
from app.datasets.image_files import is_unicode
from app.errors import UserError
from app.files import read_json

FILES = (
    *("labelmap.txt", "class_dict.csv", "class_dict_seg.csv", "label_colors.txt", "classes.csv"),
    *("palette.csv", "classes.txt", "class_names.txt", "labels.txt", "obj.names", "codes.txt"),
    *("classes.names", "classes.json", "labels.json", "palette.json", "label_map.json"),
    *("obj_class_to_machine_color.json", "dataset_meta.json", "class_id_to_name.json"),
    "legend.json",
)
MAX_BYTES = 2**20
MAX_CLASSES = 10_000
MAX_NAME = 200  # characters; a prompt is a noun phrase
# what a list of classes calls the pixels of no object
BACKGROUND = {
    *("", "background", "bg", "unlabeled", "unlabelled", "void", "ignore", "ignored"),
    *("unclassified", "no class"),
}
REST = {"none", "other", "unknown"}  # no object as number 0, else a class: Supervisely's "Other"
COLOR = re.compile(r"\s*(\d{1,3})\s*,?\s+(\d{1,3})\s*,?\s+(\d{1,3})\s+(\S.*?)\s*")
NUMBERED = re.compile(r"\s*(\d{1,9})\s*[:=,;\t ]\s*(\S.*?)\s*")
NAME_KEYS = ("name", "class", "class_name", "label", "title")
NUMBER_KEYS = ("id", "index", "value", "number", "pixel", "pixel_value")


@dataclass
class Legend:
    """Classes by what masks have for them.

    Attributes:
        path: the file that says it.
        names: in their order, where the file has no numbers.
        numbers: name by number, where it has.
        colors: name by packed colour, where it has.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    numbers: dict[int, str] = field(default_factory=dict)
    colors: dict[int, str] = field(default_factory=dict)

    def classes(self) -> list[str]:
        """Return the names of what is an object, in order, each once."""
        every = self.numbers.values() or self.colors.values() or self.names
        return list(dict.fromkeys(name for name in every if not is_background(name)))

    def by_number(self, values: Sequence[int]) -> dict[int, str]:
        """Return the name of each number.

        Args:
            values: those but 0 that masks have.

        Raises:
            UserError: they cannot be told from the file.
        """
        if self.numbers:
            return self.numbers
        if self.colors and all(color in (0, _gray(color)) for color in self.colors):
            return {color & 255: name for color, name in self.colors.items()}
        names = self.names or list(self.colors.values())
        if names and fold_name(names[0]) == "ignore":  # labelme's number of it is -1
            names = names[1:]
        highest = max(values, default=0)
        if names and is_background(names[0]):
            return dict(enumerate(names))
        if highest == len(names):
            return dict(enumerate(names, start=1))
        raise UserError(
            f"{self.path}: has {len(names)} names, and masks have numbers up to {highest}: write "
            f"each number before its name, as '1 {names[0] if names else 'cat'}', or a first line "
            "'background'; or take --masks objects where numbers count objects"
        )


def is_background(name: str) -> bool:
    return fold_name(name) in BACKGROUND


def fold_name(name: str) -> str:
    return name.strip("_ ").casefold()


def find_legend(folders: Iterable[Path]) -> Legend | None:
    """Read the first file of names that lies in the folders; None where none does.

    Raises:
        UserError: it is there, and names nothing that can be used.
    """
    for folder in folders:
        for name in FILES:
            path = folder / name
            if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
                return read_legend(path)
    return None


def read_legend(path: Path) -> Legend:
    """Read a file of names.

    Raises:
        UserError: it cannot be read, or a name is doubled, too long or missing.
    """
    legend = Legend(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("is larger than a list of classes")
        if path.suffix == ".json":
            _from_json(read_json(path), legend)
        else:
            text = path.read_bytes().decode("utf-8-sig")
            lines = [line for line in text.splitlines() if line.strip()]
            _from_csv(lines, legend) if path.suffix == ".csv" else _from_lines(lines, legend)
        _check(legend)
        _name_rest(legend)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as fault:
        raise UserError(f"{path}: {fault}; mend it, or remove it") from None
    return legend


def _check(legend: Legend) -> None:
    held = [*legend.names, *legend.numbers.values(), *legend.colors.values()]
    if not held:
        raise ValueError("names no class")
    if len(held) > MAX_CLASSES:
        raise ValueError(f"names {len(held)} classes: at most {MAX_CLASSES}")
    for name in held:
        if len(name) > MAX_NAME or not is_unicode(name):
            raise ValueError(f"has a name that is none: {name[:20]!r}")
    doubled = {name for name in legend.names if legend.names.count(name) > 1}
    if doubled and not legend.colors:
        raise ValueError(f"names '{min(doubled)}' twice")


def _name_rest(legend: Legend) -> None:
    """Call what number 0 names, or the first name, background where it is the rest."""
    if legend.numbers or legend.colors:
        if fold_name(legend.numbers.get(0, "")) in REST:
            legend.numbers[0] = "background"
        if fold_name(legend.colors.get(0, "")) in REST:
            legend.colors[0] = "background"
    elif fold_name(legend.names[0]) in REST:
        legend.names[0] = "background"


def _from_lines(lines: list[str], legend: Legend) -> None:
    """Read CVAT's `name:r,g,b:parts:actions`, `r g b name`, `number name`, or a name a line."""
    lines = [line for line in lines if not line.lstrip().startswith("#")]
    parts = [line.split(":") for line in lines]
    if all(len(part) == 4 for part in parts):
        for name, color, *_ in parts:
            legend.names.append(name.strip())
            if color.strip():
                legend.colors[_color(color.split(","))] = name.strip()
        return
    colored = [COLOR.fullmatch(line) for line in lines]
    if all(colored):
        for match in colored:
            assert match is not None
            red, green, blue, name = match.groups()
            legend.names.append(name)
            legend.colors[_color((red, green, blue))] = name
        return
    numbered = [NUMBERED.fullmatch(line) for line in lines]
    if all(numbered):
        for match in numbered:
            assert match is not None
            _number(legend, int(match[1]), match[2])
        return
    legend.names += [line.strip() for line in lines]


def _from_csv(lines: list[str], legend: Legend) -> None:
    """Read columns by their heading: a name, and red, green and blue or a number."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines[: MAX_CLASSES + 1])]
    heading = [cell.lower().replace(" ", "_") for cell in rows[0]] if rows else []
    name = next((heading.index(key) for key in NAME_KEYS if key in heading), None)
    number = next((heading.index(key) for key in NUMBER_KEYS if key in heading), None)
    color = _columns(heading, ("r", "g", "b")) or _columns(heading, ("red", "green", "blue"))
    if name is None:
        name, number = 0, None
        color = (1, 2, 3) if rows and len(rows[0]) >= 4 else None
    else:
        rows = rows[1:]
    for row in rows:
        if len(row) != len(heading):
            raise ValueError(f"has the line {','.join(row)[:60]!r}: must have {len(heading)} cells")
        legend.names.append(row[name])
        if number is not None:
            _number(legend, _integer(row[number]), row[name])
        if color is not None:
            legend.colors[_color([row[column] for column in color])] = row[name]


def _columns(heading: list[str], keys: tuple[str, str, str]) -> tuple[int, ...] | None:
    return tuple(map(heading.index, keys)) if set(keys) <= set(heading) else None


def _from_json(document: Any, legend: Legend) -> None:
    """Read a list of names, or of objects; or names by number or colour, or the other way round."""
    if isinstance(document, dict) and isinstance(document.get("label_map"), dict):
        colors = document.get("segmentation_colors")  # of Datumaro: in the order of the numbers
        document = document["label_map"]
        if isinstance(colors, list) and len(colors) == len(document):
            legend.colors.update(zip(map(_color, colors), map(str, document.values()), strict=True))
    elif isinstance(document, dict):
        for key in ("classes", "names", "labels", "categories"):
            if isinstance(document.get(key), list | dict):
                document = document[key]
                break
    if isinstance(document, dict):
        for key, value in document.items():
            if isinstance(value, str) and not value.startswith("#"):
                _number(legend, _integer(key), value)
            elif is_int(value):
                _number(legend, value, str(key))
            else:
                legend.colors[_color(value)] = str(key)
        return
    if not isinstance(document, list):
        raise ValueError("must be a list of classes, or names by number")
    for entry in document:
        if isinstance(entry, str):
            legend.names.append(entry.strip())
            continue
        if not isinstance(entry, dict):
            raise ValueError(f"has an entry that is no class: {json.dumps(entry)[:60]}")
        name = next((entry[key] for key in NAME_KEYS if isinstance(entry.get(key), str)), None)
        if name is None:
            raise ValueError(f"has an entry without a name: {json.dumps(entry)[:60]}")
        legend.names.append(name.strip())
        number = next((entry[key] for key in NUMBER_KEYS if is_int(entry.get(key))), None)
        if number is not None:
            _number(legend, number, name)
        if entry.get("color") is not None:
            legend.colors[_color(entry["color"])] = name.strip()


def _number(legend: Legend, number: int, name: str) -> None:
    if legend.numbers.setdefault(number, name.strip()) != name.strip():
        raise ValueError(f"names number {number} twice")


def _integer(text: str) -> int:
    if not re.fullmatch(r"\s*\d{1,9}\s*", text):
        raise ValueError(f"has {text[:20]!r} for a number")
    return int(text)


def _color(value: Any) -> int:
    """Return red, green, blue of 0 to 255, or '#rrggbb', packed."""
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value.strip()):
        return int(value.strip()[1:], 16)
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and len(parts) == 3:
        numbers = [_integer(str(part)) for part in parts]
        if max(numbers) <= 255:
            return numbers[0] << 16 | numbers[1] << 8 | numbers[2]
    raise ValueError(f"has {str(value)[:30]!r} for a colour: must be red, green and blue")


def _gray(color: int) -> int:
    return (color & 255) * 0x010101
