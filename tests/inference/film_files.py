"""Films for tests: files that PyAV writes, whose frames tell their number by their color."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from app.inference.film_writer import FilmWriter
from tests.inference.colors import COLORS

SHADE = 5  # of red, a frame: what a codec loses is less than half


def pixels(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A frame: red rises with its number, the left half is green, the upper half blue."""
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[:, :, 0] = number * SHADE % 250
    canvas[:, : width // 2, 1] = 200
    canvas[: height // 2, :, 2] = 200
    return canvas


def number_of(image: Any) -> int:
    return round(float(np.asarray(image)[:, :, 0].mean()) / SHADE)


def write(
    path: Path,
    frames: int = 20,
    *,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    fps: int = 10,
    times: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    """Write a film; `times` in seconds of each frame, else evenly."""
    with av.open(str(path), "w", format=format, container_options=container or {}) as file:
        stream = file.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        file.start_encoding()
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels(number, *size), format="rgb24")
            time = number / fps if times is None else times[number]
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """Write a file with sound alone."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = 44100, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def turn_clockwise(path: Path, width: int, height: int) -> None:
    """Set the matrix of an MP4's track, by which players turn it, as a phone held upright does."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    matrix = (0, 1 << 16, 0, -(1 << 16), 0, 0, height << 16, 0, 1 << 30)
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)


Square = tuple[str, int, int]  # color, left, top


def squares(path: Path, frames: Sequence[Sequence[Square]], fps: float = 10.0) -> Path:
    """Write a film of squares of 20 pixels on black; a dark one is hidden in part."""
    writer = FilmWriter(path, fps)
    for number, shown in enumerate(frames):
        image = Image.new("RGB", (160, 120))
        for name, left, top in shown:
            color = COLORS[name.removeprefix("dark ")]
            fill = tuple(side // 2 for side in color) if "dark" in name else color
            ImageDraw.Draw(image).rectangle((left, top, left + 19, top + 19), fill=fill)
        writer.add(image, number / fps)
    writer.close()
    return path
