"""Formats are told by what files hold, not by their names: cheap looks at the first few files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from app.errors import UserError
from app.files import read_json

FEW = 20  # files of a folder that are looked into
HEAD = 4096  # bytes in which an XML's root element begins


def few(folder: Path, *patterns: str) -> Iterator[Path]:
    """Yield the first files of each pattern that are in the folder, links followed."""
    for pattern in patterns:
        inside = (path for path in files(folder, pattern) if not leads_out(path, folder))
        yield from islice(inside, FEW)


def files(folder: Path, *patterns: str) -> Iterator[Path]:
    """Yield the files of each pattern in order, without hidden ones; links may lead out."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            parts = path.relative_to(folder).parts
            hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
            if not hidden and path.is_file():
                yield path


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a file is a link, or beyond one, to what is not in the folder."""
    return not path.resolve().is_relative_to(folder.resolve())


def holding(folder: Path, pattern: str, *keys: str) -> Iterator[tuple[Path, Any]]:
    """Yield those of the first JSONs whose text has all these keys, with what they hold.

    A file that has the keys and cannot be parsed holds None.
    """
    for path in few(folder, pattern):
        if mentions(path, *keys):
            try:
                yield path, read_json(path)
            except UserError:
                yield path, None


def mentions(path: Path, *keys: str) -> bool:
    """Return whether a JSON's text has all these keys; no JSON is parsed for that."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return all(f'"{key}"'.encode() in content for key in keys)


def root_element(path: Path) -> str:
    """Return the name of an XML's root element; empty where it is none."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return ""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    text = re.sub(r"(?s)<[?!].*?>", "", head.decode(encoding, "replace"))
    match = re.search(r"<([A-Za-z_][\w.-]*)", text)
    return match[1] if match else ""


def entries(value: object) -> list[dict[str, Any]]:
    """Return the objects of a JSON list; empty where it is none."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
