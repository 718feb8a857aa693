"""Frames → a film that browsers play: H.264 or VP9 in MP4, or a small GIF, by PyAV."""

from __future__ import annotations

import importlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TICKS = 90_000  # a second: times of any film fit
CODECS = (  # the first that the wheel has, with its settings
    ("libx264", {"crf": "23", "preset": "veryfast"}),
    ("libvpx-vp9", {"crf": "33", "b": "0", "deadline": "realtime", "cpu-used": "6"}),
)
LONGEST_SIDE = 1920  # pixels of a film; a larger frame is made smaller
GIF_SIDE, GIF_STEP = 480, 0.095  # pixels, and least seconds between two frames
GIF_TICKS = 100  # a second, as the format counts


class FilmWriter:
    """Encodes frames as they come; `close` ends the file.

    Args:
        path: of the file, whose parts are written at once.
        fps: frames a second on average, which the encoder plans by.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._av: Any = importlib.import_module("av")
        self._file = self._av.open(
            str(path), "w", format="mp4", container_options={"movflags": "+faststart"}
        )
        self._rate = Fraction(min(max(fps, 0.01), 1000)).limit_denominator(1001)
        self._stream: Any = None
        self._last = -1

    def add(self, image: Image.Image, time: float) -> None:
        """Encode a frame of the same size as the first; times in seconds rise."""
        pixels = _even(_fit(image, LONGEST_SIDE))
        if self._stream is None:
            self._begin(pixels)
        if pixels.shape[:2] != (self._stream.height, self._stream.width):
            size = self._stream.width, self._stream.height
            pixels = np.asarray(Image.fromarray(pixels).resize(size))
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._last = max(round(time * TICKS), self._last + 1)
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        """End the film."""
        if self._stream is not None:
            self._file.mux(self._stream.encode())
        self._file.close()

    def _begin(self, pixels: np.ndarray) -> None:
        name, options = next(each for each in CODECS if each[0] in self._av.codecs_available)
        self._stream = self._file.add_stream(name, rate=self._rate, options=options)
        self._stream.height, self._stream.width = pixels.shape[:2]
        self._stream.pix_fmt = "yuv420p"  # what every browser plays
        self._stream.codec_context.time_base = Fraction(1, TICKS)


class GifWriter:
    """Encodes frames as a GIF of few pixels and ten frames a second, each in its own colors."""

    def __init__(self, path: Path) -> None:
        self._av: Any = importlib.import_module("av")
        self._file = self._av.open(str(path), "w", format="gif")
        self._stream: Any = None
        self._graph: Any = None
        self._next = 0.0

    def add(self, image: Image.Image, time: float) -> None:
        """Encode a frame of the same size as the first, if its time has come."""
        if time < self._next:
            return
        self._next = time + GIF_STEP
        pixels = np.asarray(_fit(image, GIF_SIDE))
        if self._stream is None:
            self._begin(pixels)
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = round(time * GIF_TICKS), Fraction(1, GIF_TICKS)
        self._graph.push(frame)
        self._encode()

    def close(self) -> None:
        """End the film."""
        if self._stream is not None:
            self._graph.push(None)
            self._encode()
            self._file.mux(self._stream.encode())
        self._file.close()

    def _begin(self, pixels: np.ndarray) -> None:
        height, width = pixels.shape[:2]
        # The encoder compares a frame's indices with the last one's, whatever their colors are.
        options = {"gifflags": "-offsetting-transdiff"}
        self._stream = self._file.add_stream("gif", rate=GIF_TICKS, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "pal8"
        graph = self._graph = self._av.filter.Graph()
        base = Fraction(1, GIF_TICKS)
        source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=base)
        split = graph.add("split")
        colors = graph.add("palettegen", "stats_mode=single:max_colors=96")
        use = graph.add("paletteuse", "new=1:dither=none")
        sink = graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(colors, 1, 0)
        colors.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()

    def _encode(self) -> None:
        while True:
            try:
                frame = self._graph.pull()
            except (BlockingIOError, EOFError):
                return
            self._file.mux(self._stream.encode(frame))


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Return the image, made smaller where its longer side is above `side` pixels."""
    longest = max(image.size)
    if longest <= side:
        return image
    size = (round(image.width * side / longest) or 1, round(image.height * side / longest) or 1)
    return image.resize(size, Image.Resampling.BOX)


def _even(image: Image.Image) -> np.ndarray:
    """Return the pixels (H, W, 3), with a last row and column twice where they are odd."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] % 2, pixels.shape[1] % 2
    return np.pad(pixels, ((0, rows), (0, columns), (0, 0)), mode="edge")
