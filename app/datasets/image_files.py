"""The image files that a dataset's labels name: found, and their headers read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from app.datasets.faults import Findings
from app.datasets.geometry import MAX_SIDE
from app.datasets.images import Header, ImageError, read_header
from app.datasets.names import Names

MIN_SIDE = 10  # pixels; in less there is nothing to see


def find_files(
    entries: Iterable[tuple[str, dict[str, Any]]], names: Names, findings: Findings
) -> tuple[dict[int, Path], set[Path]]:
    """Return usable files by image id, and all that are named; report what cannot be used.

    Only headers are read.

    Args:
        entries: place in the JSON, and sound entry of `images`.
        names: finds the files.
    """
    files, owners, named = dict[int, Path](), dict[Path, str](), set[Path]()
    for place, image in entries:
        place, name = f"{place}.file_name", image["file_name"]
        path = names.locate(name, place, findings)
        if path is None:
            continue
        named.add(path)
        if path in owners:
            remedy = f"is the same file as {owners[path]}; list each image once"
            findings.add("listed twice", place, name, remedy)
        elif header := usable_header(path, place, name, findings):
            if fault := _other_size(header, (image["width"], image["height"])):
                findings.add("other size", place, name, fault)
            else:
                files[image["id"]], owners[path] = path, f"{place}"
    return files, named


def usable_header(path: Path, place: str, name: str, findings: Findings) -> Header | None:
    """Return the header of an image to train on; None, and report it, where it is none."""
    try:
        header = read_header(path)
    except ImageError as error:
        remedy = f"cannot be opened as an image ({error.reason}); replace {path}"
        findings.add(error.kind, place, name, remedy)
        return None
    if min(header.size) < MIN_SIDE:
        remedy = f"has {header.size[0]} x {header.size[1]} pixels: must have {MIN_SIDE} a side"
        findings.add("image tiny", place, name, remedy)
        return None
    if max(header.size) > MAX_SIDE:
        findings.add("image enormous", place, name, f"must have at most {MAX_SIDE} pixels a side")
        return None
    for kind in header.mends:
        findings.add(kind, place, name, "is read as upright RGB of 8 bits")
    return header


def _other_size(header: Header, size: tuple[int, int]) -> str | None:
    """Return how the file's pixels differ from what its labels say; None where they do not."""
    if header.size == size:
        return None
    note = " once turned as its EXIF orientation says" if header.size != header.stored else ""
    return (
        f"the file has {header.size[0]} x {header.size[1]} pixels{note}, and its labels say "
        f"{size[0]} x {size[1]}; export the dataset again"
    )


def name_fault(name: object) -> str | None:
    """Return why a value names no file; None where it may."""
    if not isinstance(name, str) or not name.strip() or "\0" in name or not is_unicode(name):
        return "must be the image's path, as text"
    return None


def is_unicode(text: str) -> bool:
    """Return False for half a surrogate pair, which JSON can hold and no file or tokenizer can."""
    return not re.search("[\ud800-\udfff]", text)
