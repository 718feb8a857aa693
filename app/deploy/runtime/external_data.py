"""The files in which an ONNX file stores its weights, read without the onnx package.

Runtimes open whatever path an ONNX file names, also outside of the exported folder, and the file
may come from elsewhere. So its paths are read first and compared with the manifest. ONNX is a
Protocol Buffers message; only the fields that lead to tensors are read, in place.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from app.errors import UserError

# message → number of a field → the message in it, of those that lead to tensors (onnx.proto3)
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
WIDTHS = {1: 8, 5: 4}  # wire type → bytes; 0 is a varint, 2 has a length of its own
Span = tuple[int, int]


def locations(file: Path) -> set[str]:
    """Return the `location` of each tensor that is stored in another file, as it is written.

    Raises:
        UserError: the file cannot be read, is no ONNX file, or is cut short.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data:
            return set(_walk(data, "model", (0, len(data)), 0))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # mmap raises it as well, for an empty file
        raise UserError(f"{file}: is no ONNX file, or is cut short ({error})") from None


def _walk(data: mmap.mmap, message: str, span: Span, depth: int) -> Iterator[str]:
    """Yield the locations in a message."""
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
    """Yield number and span of each field that has a length of its own."""
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
    """Return the value of a varint and where it ends."""
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
