"""Image files of all kinds, read as upright RGB, or refused by what they are."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.datasets.images import ImageError, count_pages, open_image, read_header

# 64 x 48 pixels, the left half red and the right half green, as iPhones write photographs.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAA"
    "AAAAACJpbG9jAAAAAERAAAEAAQAAAAABoQABAAAAAAAAAFIAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAA"
    "AA5waXRtAAAAAAABAAAA/WlwcnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNw"
    "AAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFz"
    "wIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAA"
    "Av////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAFptZGF0AAAATigBrxOA9SeBP//g"
    "pUf/utZ4fg8JxKt7G4iMA3/6xoc2pbzOm5NNVGYy697IdYgsgppJR1QY7sZazVhCxGBUytqE7V9+d7WYz0vbX715wA=="
)


def test_heic(tmp_path: Path) -> None:
    pytest.importorskip("pi_heif")
    photo = tmp_path / "photo.HEIC"
    photo.write_bytes(HEIC)
    image = open_image(photo)
    assert (image.mode, image.size) == ("RGB", (64, 48)) == ("RGB", read_header(photo).size)
    assert np.allclose(image.getpixel((10, 20)), (200, 30, 30), atol=12)
    assert np.allclose(image.getpixel((50, 20)), (20, 160, 60), atol=12)
    photo.write_bytes(HEIC[:450])
    with pytest.raises(ImageError, match="cannot be read as an image"):
        open_image(photo)


def test_heic_without_its_library_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)  # as if not installed
    (tmp_path / "photo.jpg").write_bytes(HEIC)
    with pytest.raises(ImageError, match="it is HEIC; export it as JPEG, or pip install pi-heif"):
        open_image(tmp_path / "photo.jpg")


def test_avif(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "a.avif")
    assert np.allclose(open_image(tmp_path / "a.avif").getpixel((9, 9)), (200, 30, 30), atol=6)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jpg", b"no picture at all", "it is none of JPEG, PNG"),
        ("a.jpg", b"\x00\x00\x00\x18ftypmp42" + bytes(90), "it is a film"),
        ("a.png", b"\x1aE\xdf\xa3" + bytes(90), "it is a film"),
        ("film.mov", bytes(90), "it is a film"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "cannot be read"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(tmp_path: Path, name, content, said) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=said) as error:
        open_image(tmp_path / name)
    assert "'it'" not in str(error.value)


def test_pages_are_counted_and_smaller_copies_are_not(tmp_path: Path) -> None:
    pages = [Image.new("L", (20, 10), shade) for shade in (10, 20, 30)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    assert count_pages(tmp_path / "scan.tif") == 3
    pages[0].save(tmp_path / "one.tif")
    assert count_pages(tmp_path / "one.tif") == 1
    small = pages[1].resize((10, 5))
    small.encoderinfo = {"tiffinfo": {254: 1}}  # NewSubfileType: a reduced image
    pages[0].save(tmp_path / "overview.tif", save_all=True, append_images=[small])
    assert count_pages(tmp_path / "overview.tif") == 1
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:])
    assert count_pages(tmp_path / "a.gif") == 3
    pages[0].save(tmp_path / "a.jpg")
    assert count_pages(tmp_path / "a.jpg") == 1
