"""Text is drawn in every script that some font here has, and never as boxes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from app.datasets import fonts
from app.datasets.fonts import text_image


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test a home folder without fonts, and forget which fonts were found."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for cached in (fonts._font_files, fonts._font_of):
        cached.cache_clear()
    yield tmp_path
    for cached in (fonts._font_files, fonts._font_of):
        cached.cache_clear()


def _write_font(path: Path, characters: str) -> None:
    """Write a font that draws each of the characters as a filled square, and others as a frame."""
    names = [".notdef", *(f"uni{ord(c):04X}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:], strict=True)})
    glyphs = {}
    for name in names:
        pen = TTGlyphPen(None)
        inner = [((200, 200), (800, 200), (800, 800), (200, 800))] if name == ".notdef" else []
        for corners in [((100, 0), (100, 900), (900, 900), (900, 0)), *inner]:
            pen.moveTo(corners[0])
            for corner in corners[1:]:
                pen.lineTo(corner)
            pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True)
    builder.save(path)


def _ink(text: str) -> np.ndarray:
    return np.asarray(text_image(text, 40))


@pytest.mark.parametrize("text", ["Größe", "лунка", "λάκκος", "קטה", "حفرة", "ձյուն"])
def test_scripts_of_the_carried_font(text: str, caplog: pytest.LogCaptureFixture) -> None:
    """No character is drawn as another one, and nothing is said to be missing."""
    with caplog.at_level(logging.INFO, "app"):
        drawn = _ink(text)
    assert not caplog.records
    assert drawn.max() == 255
    letters = {_ink(letter).tobytes() for letter in set(text)}
    assert len(letters) == len(set(text))


def test_a_font_of_the_system_is_found(home: Path) -> None:
    """A letter of Bamum, which hardly any font has, but for this one."""
    _write_font(home / ".local/share/fonts/x/Test.ttf", "\U00016801")
    drawn = _ink("\U00016801")
    assert (drawn[8:36, 6:34] == 255).all()  # the square of that font


def test_what_no_font_has_is_a_question_mark_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "app"):
        drawn = _ink("a\U00016802"), _ink("\U00016802b")
    assert np.array_equal(drawn[0], _ink("a?"))
    assert np.array_equal(drawn[1], _ink("?b"))
    assert len(caplog.records) == 1
    assert "\U00016802" in caplog.records[0].getMessage()


def test_lines_and_controls_are_no_boxes() -> None:
    assert np.array_equal(_ink("a\x07b"), _ink("a?b"))
