"""The image files that a dataset's labels name: found, and their headers read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from app.datasets.faults import Findings
from app.datasets.geometry import MAX_SIDE
from app.datasets.images import Header, ImageError, read_header

MIN_SIDE = 10  # pixels; in less there is nothing to see


def find_files(
    entries: Iterable[tuple[str, dict[str, Any]]], roots: Sequence[Path], findings: Findings
) -> dict[int, Path]:
    """Return absolute paths by image id; report what cannot be used. Only headers are read.

    Args:
        entries: place in the JSON, and sound entry of `images`.
        roots: folders in which the files are looked for, and which they must not leave.
    """
    files, owners = dict[int, Path](), dict[Path, str]()
    for place, image in entries:
        place, name = f"{place}.file_name", image["file_name"]
        path = find_image(name, roots)
        if path is None:
            folders = ", ".join(f"{root} and {root / 'images'}" for root in roots)
            findings.add("image missing", place, name, f"no such file in {folders}")
        elif not any(path.is_relative_to(root.resolve()) for root in roots):
            remedy = f"is a link that leads out of the dataset, to {path}; copy the file there"
            findings.add("link", place, name, remedy)
        elif path in owners:
            remedy = f"is the same file as {owners[path]}; list each image once"
            findings.add("listed twice", place, name, remedy)
        elif header := usable_header(path, place, name, findings):
            if fault := _other_size(header, (image["width"], image["height"])):
                findings.add("other size", place, name, fault)
            else:
                files[image["id"]], owners[path] = path, f"{place}"
    return files


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
    if header.size == size:
        return None
    note = " once turned as its EXIF orientation says" if header.size != header.stored else ""
    return (
        f"the file has {header.size[0]} x {header.size[1]} pixels{note}, and the JSON says "
        f"{size[0]} x {size[1]}; export the dataset again"
    )


def find_image(name: str, roots: Sequence[Path]) -> Path | None:
    """Find the first file under the roots: as written, under images/, or there by its last name."""
    for root in roots:
        for candidate in (root / name, root / "images" / name, root / "images" / Path(name).name):
            try:
                if candidate.is_file():
                    return candidate.resolve()
            except OSError:  # a name too long, or a folder that may not be read: not to be had
                continue
    return None


def name_fault(name: object) -> str | None:
    """Return what is wrong with a file's name; None where it is a path inside the dataset."""
    if not isinstance(name, str) or not name.strip() or not is_unicode(name):
        return "must be the image's path, as text"
    if "\0" in name or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name):
        return "must be a path relative to the dataset's folder"
    if ".." in re.split(r"[\\/]", name):
        return "must not lead out of the dataset's folder by '..'"
    return None


def is_unicode(text: str) -> bool:
    """Return False for half a surrogate pair, which JSON can hold and no file or tokenizer can."""
    return not re.search("[\ud800-\udfff]", text)
