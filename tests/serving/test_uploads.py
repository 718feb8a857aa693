"""Files that clients send: what they are, whatever they are called or say of their size."""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib

import pytest

from app.serving import uploads
from app.serving.refusals import Refused
from app.serving.settings import Limits
from tests.serving.servers import drawn

LIMITS = Limits(pixels=1_000_000)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says to have so many pixels, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_an_image_is_known_by_what_it_holds() -> None:
    for form in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        data = drawn(1, 40, 30, form)
        image = uploads.check(data, LIMITS, "it.txt")
        assert (image.name, image.data) == ("it.txt", data)
        assert image.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [(1001, 1000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_what_they_say(size: tuple[int, int]) -> None:
    with pytest.raises(Refused) as refused:
        uploads.check(bomb(*size), LIMITS)
    assert refused.value.status == 413
    assert "1,000,000 pixels" in refused.value.problems[0].remedy


def test_what_is_large_and_allowed_is_not_decoded() -> None:
    """Its pixels are not there: decoding would fail."""
    assert uploads.check(bomb(1000, 1000), LIMITS).digest


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!doctype html><p>", "HTML"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of"),
        (b"%PDF-1.7", "none of"),
        (b"\0\0\0\x18ftypisom" + bytes(50), "film"),
        (b"PK\x03\x04" + bytes(50), "none of"),
        (b"\x89PNG\r\n\x1a\n", "none of"),
        (b"/etc/passwd", "none of"),
        (b"http://169.254.169.254/", "none of"),
    ],
)
def test_what_is_no_image_is_told_so(data: bytes, words: str) -> None:
    with pytest.raises(Refused) as refused:
        uploads.check(data, LIMITS, "it.jpg")
    assert refused.value.status == 422
    (problem,) = refused.value.problems
    assert words in problem.message
    assert problem.message.startswith("it.jpg: ")
    assert problem.remedy


def test_base64_is_read_as_programs_write_it() -> None:
    data = drawn(1)
    text = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    for form in (text, lines, f"data:image/png;base64,{text}"):
        assert uploads.from_base64(form, LIMITS).data == data
    for wrong in (text[:-5] + "!", "…", text + "="):
        with pytest.raises(Refused):
            uploads.from_base64(wrong, LIMITS)
