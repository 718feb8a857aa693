"""The classes' names: never a bare number, which no prompt can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.datasets.formats.legends import REST, fold_name, is_background
from app.datasets.huggingface.columns import Columns, Features, object_fields
from app.errors import UserError

NO_OBJECT = (0, 255)  # where no name says otherwise


@dataclass(frozen=True)
class Names:
    """Names by number, as the source numbers its classes; `single` where all are of one class."""

    by_id: Mapping[int, str]
    single: str | None = None

    def of(self, value: object) -> str:
        """Return the name of a class; raise ValueError, saying why, where it has none."""
        if self.single is not None:
            return self.single
        if isinstance(value, str) and value.strip() and not _is_number(value):
            return value.strip()
        if not isinstance(value, str | int) or not _is_number(str(value)):
            raise ValueError("names no class")
        name = self.by_id.get(int(value), "")
        if not name or _is_number(name):
            raise ValueError("is a number that nothing names; --columns names=ID:NAME;ID:NAME does")
        return name

    def is_background(self, number: int) -> bool:
        """Return whether pixels of that number in a map are no object."""
        if number in self.by_id:
            name = self.by_id[number]
            return is_background(name) or (number == 0 and fold_name(name) in REST)
        return number in NO_OBJECT

    def listed(self) -> list[str]:
        """Return all names that are known beforehand, in their order."""
        if self.single is not None:
            return [self.single]
        named = [name for id, name in sorted(self.by_id.items()) if not self.is_background(id)]
        return list(dict.fromkeys(named))


def class_names(
    features: Features, columns: Columns, choice: Mapping[str, str], id2label: Any, where: str
) -> Names:
    """Return the names given by hand, else by the column's type, else by id2label.json.

    Raises:
        UserError: the classes are numbers and nothing names them, or nothing tells a class at all.
    """
    if "name" in choice:
        return Names({}, choice["name"])
    if "names" in choice:
        return Names(_parse(choice["names"]))
    kind = None
    if columns.category:
        kind = object_fields(features, columns.objects)[columns.category]
    labels: list[str] = getattr(kind, "names", None) or []
    names = Names(dict(enumerate(labels)) or _from_json(id2label))
    if any(_is_number(name) for name in names.by_id.values()):
        raise UserError(
            f"{where}: its classes are called {', '.join(names.by_id.values())}: numbers are no "
            f"prompts. {_REMEDY}"
        )
    if columns.category and not names.by_id and "string" not in getattr(kind, "dtype", ""):
        raise UserError(f"{where}: '{columns.category}' holds numbers without names. {_REMEDY}")
    if (columns.bbox or columns.segmentation) and not columns.category:
        raise UserError(f"{where}: nothing names the class of its objects. {ONE_CLASS}")
    return names


_REMEDY = "Name them: --columns 'names=cat;dog', from 0 on, or 'names=1:cat;2:dog'"
ONE_CLASS = "Where they are all of one, name it: --columns name=crack"


def _parse(text: str) -> dict[int, str]:
    named = {}
    for position, entry in enumerate(text.split(";")):
        number, colon, name = entry.partition(":")
        if colon and _is_number(number):
            named[int(number)] = name.strip()
        else:
            named[position] = entry.strip()
    return named


def _from_json(content: Any) -> dict[int, str]:
    """Read id2label.json, as models on the same host have it: {"0": "name"}; or a list of names."""
    if isinstance(content, list):
        content = {str(number): name for number, name in enumerate(content)}
    if not isinstance(content, dict):
        return {}
    return {int(key): str(name).strip() for key, name in content.items() if _is_number(key)}


def _is_number(text: str) -> bool:
    return text.strip().isdecimal()
