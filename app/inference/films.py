"""Films → their frames, upright RGB, with their own times: the one way in, by PyAV.

PyAV is imported where a film is opened: images need none.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.console import duration
from app.datasets.images import EXTENSIONS, FILMS, MAX_PIXELS, ImageError, count_pages, open_image
from app.datasets.levels import Levels
from app.errors import UserError
from app.files import check_regular
from app.inference.inputs import LIST, find_images, list_entries, list_lines, matches, output_names

CAMERA = "camera:"
STREAMS = ("rtsp://", "rtsps://")
GIF = ".gif"
STILL = {ending for ending in EXTENSIONS if ending != GIF}
# What FFmpeg may open: a list of other files, as HLS has it, could name any file or address.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpeg,mpegts,mpegvideo,asf"
CAMERAS = (  # formats of FFmpeg, and how they call the first camera
    *(("video4linux2,v4l2", "/dev/video{}"), ("avfoundation", "{}"), ("dshow", "video={}")),
)
WAIT = 10.0  # seconds for a camera or a stream to answer
TIME = re.compile(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+(?:\.\d+)?)")
MOMENT = 1e-6  # seconds: times are sums of fractions


@dataclass(frozen=True)
class Film:
    """Hold a film that is to be read.

    Attributes:
        source: as a user named it, without a password.
        name: of its outputs, relative to the output folder; "" where it is the only one.
        path: of a file; None of others.
        data: the file's content, where it is in memory.
        frames: images that are its frames, in order.
        address: of a camera or a stream, as PyAV takes it.
        device: FFmpeg's format of a camera; None of a stream.
        fps: frames a second, of images.
    """

    source: str
    name: str = ""
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    frames: tuple[Path, ...] = ()
    address: str = ""
    device: str | None = None
    fps: float = 25.0

    @property
    def live(self) -> bool:
        """Return whether it goes on by itself, and cannot be read again."""
        return bool(self.address)


@dataclass(frozen=True)
class Section:
    """Hold which frames of a film are wanted.

    Attributes:
        every: 1 takes all, 2 each second one, …
        begin, end: seconds from its first frame; the end is no more part of it, None is the film's.
    """

    every: int = 1
    begin: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Frame:
    """Hold a frame that is wanted.

    Attributes:
        number: of those that are wanted, from 0.
        time: seconds from the film's first frame.
        image: upright RGB.
    """

    number: int
    time: float
    image: Image.Image


def is_film(source: str) -> bool:
    """Return whether a source is read as a film without being told so."""
    if source.startswith((CAMERA, *STREAMS)):
        return True
    path = Path(source)
    if path.is_dir():
        return False
    if not path.is_file():
        return _is_of_films(source)
    if path.suffix.lower() == LIST:
        if all(Path(line).suffix.lower() in STILL for line in list_lines(path)):
            return False  # told by their names alone: a list may name millions of images
        return any(is_film(name) or Path(name).is_dir() for name in list_entries(path))
    return path.suffix.lower() in FILMS or _is_moving(path)


def _is_of_films(pattern: str) -> bool:
    """Return whether a glob stands for films alone; the first image among them says no."""
    there = False
    for name in matches(pattern):
        if Path(name).is_file():
            if Path(name).suffix.lower() not in FILMS:
                return False
            there = True
    return there


def _is_moving(path: Path) -> bool:
    with contextlib.suppress(ImageError):
        return path.suffix.lower() == GIF and count_pages(path) > 1
    return False


def find_films(source: str, fps: float = 25.0, flag: str = "--input") -> list[Film]:
    """Return the films that a source names.

    That is a film's file, `camera:0`, the address of a stream, a folder, glob or list of frames, or
    a glob or list of such films.

    Args:
        fps: frames a second of images.

    Raises:
        UserError: nothing of the kind; each line of a list that is none.
    """
    path = Path(source)
    if source.startswith((CAMERA, *STREAMS)) or not is_film(source):
        return [_find(source, fps, flag)]
    if not path.is_file():
        named = sorted(name for name in matches(source) if Path(name).is_file())
    elif path.suffix.lower() == LIST:
        named = list_entries(path)
    else:
        return [_find(source, fps, flag)]
    films, problems = [], []
    for name in named:
        if not (is_film(name) or Path(name).is_dir()):
            there = "is no film" if Path(name).exists() else "no such file"
            problems.append(f"{flag} {source}: {name}: {there}")
            continue
        try:
            films.append(_find(name, fps, flag))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    names = output_names([Path(film.source.rstrip("/")).name for film in films])
    return [replace(film, name=name) for film, name in zip(films, names, strict=True)]


def _find(source: str, fps: float, flag: str) -> Film:
    if source.startswith(STREAMS):
        return Film(re.sub(r"//[^/]*@", "//", source), address=source)
    if source.startswith(CAMERA):
        return _camera(source, flag)
    path = Path(source)
    if path.is_file() and is_film(source):
        return Film(source, path=path.absolute())
    return Film(
        source, frames=tuple(each.absolute() for each in find_images(source, flag)), fps=fps
    )


def _camera(source: str, flag: str) -> Film:
    number = source[len(CAMERA) :]
    if not number.isdecimal():
        raise UserError(f"{flag} {source}: a camera is camera:0, camera:1, …")
    known = _pyav(source).formats_available
    for device, address in CAMERAS:
        if device in known:
            return Film(source, address=address.format(number), device=device.split(",")[0])
    raise UserError(f"{flag} {source}: cameras cannot be read here")


def parse_time(text: str, flag: str) -> float:
    """Return the seconds of 12.5, 1:30 or 1:02:03; raise UserError where it is none."""
    match = TIME.fullmatch(text)
    if match is None:
        raise UserError(f"{flag} {text}: give seconds, or minutes and seconds as 1:30")
    hours, minutes, seconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds)


class Reader:
    """Reads the frames of a section of a film, once.

    Args:
        levels: of images of more than 8 bits, as `open_image` takes them.
        pixels: of a frame, at most.

    Attributes:
        fps: frames a second of those that are wanted, on average.
        count: of those that are wanted, about; None where it is not known.
        broken: frames that could not be decoded.
        problems: of single frames, as far as they have a name.
        ended: why it ended before its end; "" where it did not.
    """

    def __init__(
        self,
        film: Film,
        section: Section,
        levels: Levels | None = None,
        *,
        pixels: int = MAX_PIXELS,
    ) -> None:
        self.film, self.section, self.levels, self._pixels = film, section, levels, pixels
        self.fps, self.count = film.fps / section.every, None if film.live else 0
        self.broken, self.problems, self.ended = 0, list[str](), ""
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let a live film end with its next frame."""
        self._stopped.set()

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames; one that cannot be decoded is left out and counted.

        A file that is cut keeps what is there. Of a live film the newest frame is taken: what came
        while the last one was at work is passed over.

        Raises:
            UserError: it cannot be opened, or has no picture.
        """
        if self.film.frames:
            yield from self._images()
            return
        with _opened(self.film) as container:
            stream = container.streams.video[0]
            self._check_size(stream)
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            self.fps = rate / self.section.every
            end = self._end(container, stream)
            if end is not None:
                self.count = max(round((end - self.section.begin) * self.fps), 1)
            frames = self._decoded(container, stream)
            if self.film.live:
                frames = _newest(frames, self._stopped)
            begun = None if self.film.live else stream.start_time
            start = None if begun is None else float(begun * stream.time_base)
            yield from self._wanted(frames, rate, start, end)

    def _images(self) -> Iterator[Frame]:
        """Yield images as frames; one that cannot be read keeps its number."""
        fps, section = self.film.fps, self.section
        first = math.ceil(section.begin * fps - MOMENT)
        last = None if section.end is None else math.ceil(section.end * fps - MOMENT)
        indices = range(len(self.film.frames))[first : last : section.every]
        self.count = len(indices)
        for number, index in enumerate(indices):
            try:
                image = open_image(self.film.frames[index], self.levels)
            except ImageError as error:
                self.broken += 1
                self.problems.append(str(error))
                continue
            yield Frame(number, index / fps, image)

    def _end(self, container: Any, stream: Any) -> float | None:
        """Return the seconds at which the section ends, as far as the file tells."""
        if self.film.live:
            return None
        length = container.duration / 1_000_000 if container.duration else None
        if stream.duration is not None:
            length = float(stream.duration * stream.time_base)
        if length is None or self.section.end is None:
            return length
        return min(length, self.section.end)

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the decoded frames from a key frame before the section on."""
        av = _pyav(self.film.source)
        if self.section.begin and not self.film.live:
            start = (stream.start_time or 0) + int(self.section.begin / stream.time_base)
            with contextlib.suppress(av.FFmpegError):  # without an index: from its first frame
                container.seek(start, stream=stream)
        packets = container.demux(stream)
        while not self._stopped.is_set():
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError) as error:
                self.ended = getattr(error, "strerror", None) or str(error)
                return
            if packet is None:
                return
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                self.broken += 1
                continue
            for frame in decoded:
                if frame.is_corrupt:
                    self.broken += 1
                else:
                    yield frame

    def _wanted(
        self, frames: Iterator[Any], rate: float, begun: float | None, end: float | None
    ) -> Iterator[Frame]:
        """Yield the frames of the section, upright, with their times."""
        section, seen, time = self.section, 0, -1 / rate
        for frame in frames:
            if begun is None:
                begun = frame.time or 0.0
            time = time + 1 / rate if frame.time is None else max(frame.time - begun, 0.0)
            if section.end is not None and time >= section.end - MOMENT:
                return
            if time < section.begin - MOMENT:
                continue
            if seen % section.every == 0:
                yield Frame(seen // section.every, time, self._upright(frame))
            seen += 1
        # Some containers count their length from zero, whenever they begin.
        if end is not None and time + (begun or 0) < end - 1 and not self.ended:
            self.ended = f"{duration(max(time, 0))} of {duration(end)} are there"

    def _check_size(self, shown: Any) -> None:
        if shown.width * shown.height > self._pixels:
            raise UserError(
                f"{self.film.source}: has {shown.width} x {shown.height} pixels; make it smaller: "
                f"at most {self._pixels:,}"
            )

    def _upright(self, frame: Any) -> Image.Image:
        self._check_size(frame)
        pixels = frame.to_ndarray(format="rgb24")
        # The file says how far a player is to turn it; numpy turns as that is counted.
        return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))


def problems_of(film: Film) -> list[str]:
    """Return why a film's file cannot be opened; nothing where it can, or is no file."""
    if film.path is None:
        return []
    try:
        with _opened(film):
            return []
    except UserError as error:
        return error.problems


@contextlib.contextmanager
def _opened(film: Film) -> Iterator[Any]:
    """Open a film; raise UserError where that cannot be, or it has no picture."""
    av = _pyav(film.source)
    try:
        if film.live:
            options = {} if film.device else {"rtsp_transport": "tcp"}
            wait = (WAIT, WAIT)
            container = av.open(film.address, format=film.device, options=options, timeout=wait)
        else:
            limits = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
            file: Any = io.BytesIO(film.data or b"")
            if film.path is not None:
                check_regular(film.path)
                file = str(film.path)
            container = av.open(file, container_options=limits, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(_why_closed(film, error)) from None
    with container:
        if not container.streams.video:
            raise UserError(f"{film.source}: has no picture: there is no video stream in it")
        yield container


def _why_closed(film: Film, error: Exception) -> str:
    """Return why a film cannot be opened, and what to do."""
    reason = getattr(error, "strerror", None) or str(error)
    if film.live:
        return f"{film.source}: gives no picture ({reason}); is it on, and at this address?"
    with contextlib.suppress(OSError):
        if not (film.data if film.path is None else film.path.stat().st_size):
            reason = "it has 0 bytes"
    return (
        f"{film.source}: cannot be read as a film ({reason}). Replace it, or where a player shows "
        f"it: ffmpeg -i '{film.source}' film.mp4"
    )


def _pyav(source: str) -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise UserError(
            f"{source}: films are read by PyAV, which cannot be used here ({error}): "
            "pip install av, or give a folder of frames"
        ) from None


def _newest(frames: Iterator[Any], stopped: threading.Event) -> Iterator[Any]:
    """Yield the newest frame each time; those that come meanwhile are passed over."""
    changed, newest, ended = threading.Condition(), list[Any](), list[Exception | None]()

    def read() -> None:
        problem = None
        try:
            for frame in frames:
                with changed:
                    newest[:] = [frame]
                    changed.notify()
                if stopped.is_set():
                    break
        except Exception as error:
            problem = error
        with changed:
            ended.append(problem)
            changed.notify()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: newest or ended)
                if not newest:
                    break
                frame = newest.pop()
            yield frame
    finally:
        stopped.set()
        thread.join()
    if ended[0] is not None:
        raise ended[0]
