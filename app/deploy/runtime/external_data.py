"""Which files an ONNX file keeps its weights in, told without the onnx package.

ONNX is a Protocol Buffers message; only the way to its tensors is read, in place.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from app.errors import UserError

# message → the number of a field → what it holds, of those on the way (onnx.proto3)
FIELDS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
KEY, VALUE = 1, 2  # of an entry
DEEPEST = 64  # messages within messages
WIDTHS = {1: 8, 5: 4}  # bytes of a field of this wire type; 0 is a varint, 2 says its own length
Span = tuple[int, int]


def locations(file: Path) -> set[str]:
    """The `location` of each tensor that lies outside, as it is written.

    Raises:
        UserError: cannot be read, or is no ONNX file, or is cut short.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data:
            return set(_walk(data, "model", (0, len(data)), 0))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # also what mmap says of an empty file
        raise UserError(f"{file}: is no ONNX file, or is cut short ({error})") from None


def _walk(data: mmap.mmap, message: str, span: Span, depth: int) -> Iterator[str]:
    if depth > DEEPEST:
        raise ValueError("messages nested too deeply")
    for number, (start, end) in _fields(data, span):
        kind = FIELDS[message].get(number)
        if kind == "entry":
            entry = {key: data[slice(*value)] for key, value in _fields(data, (start, end))}
            if entry.get(KEY) == b"location":
                yield entry.get(VALUE, b"").decode("utf-8", "replace")
        elif kind is not None:
            yield from _walk(data, kind, (start, end), depth + 1)


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span]]:
    """Number and place of each field that has a length of its own."""
    at, stop = span
    while at < stop:
        tag, at = _varint(data, at, stop)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(data, at, stop)
        elif wire == 2:
            length, at = _varint(data, at, stop)
            if length > stop - at:
                raise ValueError("a field ends beyond its message")
            yield tag >> 3, (at, at + length)
            at += length
        elif wire in WIDTHS:
            at += WIDTHS[wire]
        else:
            raise ValueError(f"wire type {wire}")
    if at != stop:
        raise ValueError("a field ends beyond its message")


def _varint(data: mmap.mmap, at: int, stop: int) -> tuple[int, int]:
    """Its value, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")
