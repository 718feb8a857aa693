"""Write text in any script that some font of this machine has."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

log = logging.getLogger("app")
SUFFIXES = {".ttf", ".otf", ".ttc", ".otc"}
FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/System/Library/Fonts", "/Library/Fonts")
HOME_FOLDERS = (".local/share/fonts", ".fonts", "Library/Fonts")
FANCY = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "serif", "mono")
NOTHING = "\U0010ffff"  # no font has it: drawn as the font draws what it lacks
UNKNOWN = "?"  # in place of a character that no font has
PROBE_SIZE = 16  # pixels


def text_image(text: str, size: int) -> Image.Image:
    """Draw a line of text as an "L" image as large as it, its baseline at the same height for all.

    Each character takes the first font that has it: Pillow's own, matplotlib's, the system's. One
    that no font has is drawn as "?", which is logged once.

    Args:
        size: of the font, in pixels.
    """
    runs = [(_font(name, size), part) for name, part in _runs(text)]
    widths = [max(round(font.getlength(part)), 1) for font, part in runs]
    picture = Image.new("L", (max(sum(widths), 1), round(1.3 * size)))
    draw, x = ImageDraw.Draw(picture), 0
    for (font, part), width in zip(runs, widths, strict=True):
        draw.text((x, size), part, fill=255, font=font, anchor="ls")
        x += width
    return picture


def _runs(text: str) -> Iterator[tuple[Path | None, str]]:
    """Split a text by the font of each character; spaces and marks stay with the one before."""
    fonts: list[tuple[Path | None, str]] = []
    for character in unicodedata.normalize("NFC", text):
        joins = character.isspace() or unicodedata.category(character) in ("Mn", "Me", "Cf")
        if joins and fonts:
            fonts.append((fonts[-1][0], character))
        else:
            fonts.append(_font_of(character))
    for font, group in groupby(fonts, key=lambda one: one[0]):
        yield font, "".join(character for _, character in group)


@functools.lru_cache(maxsize=4096)
def _font_of(character: str) -> tuple[Path | None, str]:
    """Return the font for a character, None for Pillow's own, and what to draw."""
    if not character.isprintable():
        return None, UNKNOWN
    for font in (None, *_font_files()):
        if _has(font, character):
            return font, character
    name = unicodedata.name(character, f"U+{ord(character):04X}")
    log.info(
        "note: no font here has '%s' (%s): drawn as '%s'. A system font that has it is taken, "
        "such as of Noto Sans",
        character,
        name.lower(),
        UNKNOWN,
    )
    return None, UNKNOWN


def _has(path: Path | None, character: str) -> bool:
    """Return whether a font has a glyph of its own for a character."""
    try:
        font = _font(path, PROBE_SIZE)
        return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(NOTHING))
    except (OSError, ValueError):  # no outline font, or a broken one
        return False


@functools.lru_cache(maxsize=64)
def _font(path: Path | None, size: int) -> ImageFont.FreeTypeFont:
    if path is not None:
        return ImageFont.truetype(path, size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # a size is given
    return font


@functools.lru_cache(maxsize=1)
def _font_files() -> list[Path]:
    """Return the fonts at hand: plain ones first, matplotlib's before the system's."""
    folders = [Path(folder) for folder in FOLDERS]
    if home := os.environ.get("HOME"):
        folders += [Path(home, folder) for folder in HOME_FOLDERS]
    files = [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    files.sort(key=lambda path: any(word in path.stem.lower() for word in FANCY))
    matplotlib = importlib.util.find_spec("matplotlib")  # found, not imported
    if matplotlib is not None and matplotlib.origin is not None:
        own = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        files[:0] = [own] if own.is_file() else []
    return files
