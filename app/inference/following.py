"""Films → their tracks on disk; after a stop the same call does what is left."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.console import counted, duration, progress
from app.datasets.rle import decode_crop
from app.errors import UserError
from app.files import check_no_links, check_writable, exists_problem
from app.inference.detections import Detections
from app.inference.films import Film, Frame, Reader, Section, find_films, parse_time, problems_of
from app.inference.finder import Finder
from app.inference.folder import ended_by_sigterm, unwritable_is_user_error
from app.inference.journal import Entry, Journal, file_state, read_contents, read_entries
from app.inference.outputs import PER_IMAGE, coco_results
from app.inference.postprocess import THRESHOLD, threshold_below
from app.inference.settings import Settings
from app.inference.tables import TABLES
from app.inference.track_files import FILMS, TRACK_TABLES, Told, TrackWriter, frame_name
from app.inference.tracks import Sighting, Tracker, TrackSettings
from app.model.vocabulary import VISUAL_PROMPT

log = logging.getLogger("app")
NMS = 0.3  # IoU of masks above which two detections are one thing, whatever their prompts
LIKELY, UNSURE = 1 / 2, 1 / 12  # shares of the threshold
TRIAL, PATIENCE, MEMORY = 0.75, 1.0, 10.0  # seconds
ENGINES = ("own", "hf", "sam3")
DONE = "film"  # of a journal: the entry that says that all is written
EVERY = 10.0  # seconds between two lines on a live film
T = TypeVar("T")


@dataclass(frozen=True)
class Following:
    """Hold how films are followed.

    Attributes:
        section: the frames that are wanted.
        fill: whether gaps of tracks are filled.
        batch_size: frames that are seen together.
        overwrite: drop earlier results.
        engine: what follows, one of ENGINES.
    """

    section: Section = field(default_factory=Section)
    fill: bool = False
    batch_size: int = 1
    overwrite: bool = False
    engine: str = ENGINES[0]


def read_following(
    follows: bool,
    every: int,
    begin: str | None,
    end: str | None,
    *,
    fill: bool,
    overwrite: bool,
    batch_size: int = 1,
    engine: str = ENGINES[0],
) -> Following:
    """Return how films are followed, from flags that are text.

    Args:
        follows: whether there are films; images take none of these flags.
        begin, end: as `parse_time` reads them.

    Raises:
        UserError: every problem at once.
    """
    given = {"--every": every > 1, "--from": begin, "--to": end, "--fill-gaps": fill}
    if not follows and (flags := [flag for flag, value in given.items() if value]):
        raise UserError(
            [f"{flag}: is for films; with --track images are frames of one" for flag in flags]
        )
    problems: list[str] = []
    times: list[float | None] = []
    for flag, text in (("--from", begin), ("--to", end)):
        try:
            times.append(None if text is None else parse_time(text, flag))
        except UserError as error:
            problems += error.problems
    if not problems and times[1] is not None and times[1] <= (times[0] or 0):
        problems.append(f"--to {end}: must be after --from {begin or 0}")
    if problems:
        raise UserError(problems)
    section = Section(every, times[0] or 0.0, times[1])
    return Following(section, fill, batch_size, overwrite, engine)


def list_films(
    source: str, output: Path, save: Sequence[str], *, fps: float, overwrite: bool
) -> list[Film]:
    """Return the films that `source` names; refuse what would be lost or cannot be written.

    No weights are needed for it, so that a user need not wait for these to hear of a mistake.

    Raises:
        UserError: no films that can be opened, an output folder that is taken or cannot be written.
    """
    check_writable(output)
    films = find_films(source, fps)
    for film in films:
        folder = output / film.name
        check_no_links(folder, _files(save))
        earlier = read_contents(folder)
        if not overwrite:
            _check_clear(film, folder, save, earlier.files, held=bool(earlier.lines))
    problems = [problems_of(film) for film in films]
    if all(problems):  # else the others are followed
        raise UserError([problem for each in problems for problem in each])
    return films


class Propagates(Protocol):
    """Carries objects from frame to frame by itself, as `propagation.Propagator` does."""

    labels: dict[int, int]

    def update(self, item: Told, image: Image.Image) -> list[tuple[Told, list[Sighting]]]: ...
    def finish(self) -> list[tuple[Told, list[Sighting]]]: ...


def follow_films(
    films: Sequence[Film],
    output: Path,
    settings: Settings,
    following: Following,
    finder: Finder | Callable[[], Propagates],
) -> list[str]:
    """Find and follow objects in films, as `list_films` returns them; see `infer --help`.

    Each frame that is done is noted in a journal, so the same call after a stop does the rest.

    Args:
        finder: whose detections are joined to tracks; or makes what carries objects by itself for
            one film, whose memory no journal holds: a stopped film then begins anew.

    Returns:
        Problems: of films that could not be read, and of frames.

    Raises:
        UserError: a problem of the whole; or no film could be done.
    """
    problems: list[str] = []
    failed = 0
    for film in films:
        try:
            problems += _Run(film, output / film.name, settings, following, finder).follow()
        except UserError as error:
            if len(films) == 1:
                raise
            problems += error.problems
            failed += 1
    if failed == len(films):
        raise UserError(problems)
    for problem in problems:
        log.error("failed: %s", problem)
    return problems


class _Run:
    """Follows one film."""

    def __init__(
        self,
        film: Film,
        folder: Path,
        settings: Settings,
        following: Following,
        finder: Finder | Callable[[], Propagates],
    ) -> None:
        self.film, self.folder, self.settings = film, folder, settings
        self.following, self.finder = following, finder
        self.prompts = settings.prompts or (VISUAL_PROMPT,)
        levels = finder.levels if isinstance(finder, Finder) else None
        self.reader = Reader(film, following.section, levels)
        self.state = _state(film)
        self.threshold = THRESHOLD if settings.threshold is None else settings.threshold
        self.best = 0.0

    def follow(self) -> list[str]:
        """Find, follow and write; return the problems of frames."""
        save, begun = self.settings.save, time.monotonic()
        with (
            unwritable_is_user_error(self.folder),
            Journal(self.folder, self._identity(), overwrite=self.following.overwrite) as journal,
            _ended(self.reader) if self.film.live else ended_by_sigterm(),
        ):
            if not self.following.overwrite:
                held = bool(journal.earlier.lines)
                _check_clear(self.film, self.folder, save, journal.earlier.files, held=held)
            journal.begin(_files(save))
            if self._is_done(journal):
                log.info("%s: was done before: %s", self.film.source, self.folder)
                return []
            with TrackWriter(self.folder, save, self.prompts) as writer:
                follow = self._track if isinstance(self.finder, Finder) else self._propagate
                tracker = follow(journal, writer)
                writer.finish(Path(self.film.source).name, self.reader.fps, tracker.labels)
            journal.add({"image": DONE, "state": self.state, "found": []})
        seconds = time.monotonic() - begun
        self._tell(writer, len(tracker.labels), seconds)
        return self._problems()

    def _track(self, journal: Journal, writer: TrackWriter) -> Tracker[Told]:
        """Take the frames through finder, tracker and writer."""
        tracker: Tracker[Told] | None = None
        with _progress(self.reader) as advance:
            for frame, entry in self._found(journal):
                if tracker is None:
                    fill = self.following.fill
                    tracker = Tracker(track_settings(self.threshold, self.reader.fps, fill=fill))
                    writer.begin(self.reader.fps)
                self._note_files(journal, frame)
                detections, colors = read_entry(entry, self.prompts)
                told = Told(frame.number, frame.time, frame.image)
                for each, sightings in tracker.update(told, detections, colors):
                    writer.add(each, sightings)
                advance(frame.number + 1)
        if tracker is None:
            raise UserError([*self.reader.problems, self._nothing()])
        for each, sightings in tracker.finish():
            writer.add(each, sightings)
        return tracker

    def _propagate(self, journal: Journal, writer: TrackWriter) -> Propagates:
        """Let what carries objects by itself take the frames."""
        assert not isinstance(self.finder, Finder)
        propagator, begun = self.finder(), False
        with _progress(self.reader) as advance:
            for frames in _ahead(_batches(self.reader, 1)):
                for frame in frames:
                    if not begun:
                        writer.begin(self.reader.fps)
                        begun = True
                    self._note_files(journal, frame)
                    told = Told(frame.number, frame.time, frame.image)
                    for each, sightings in propagator.update(told, frame.image):
                        writer.add(each, sightings)
                    advance(frame.number + 1)
        if not begun:
            raise UserError([*self.reader.problems, self._nothing()])
        for each, sightings in propagator.finish():
            writer.add(each, sightings)
        return propagator

    def _note_files(self, journal: Journal, frame: Frame) -> None:
        kinds = [kind for kind in self.settings.save if kind in PER_IMAGE]
        if kinds:
            name = frame_name(frame.number)
            journal.note([PER_IMAGE[kind].path.format(name) for kind in kinds])

    def _found(self, journal: Journal) -> Iterator[tuple[Frame, Entry]]:
        """Yield each frame with what is found in it, now or before; frames are read beside."""
        before = 0
        for frames in _ahead(_batches(self.reader, self.following.batch_size)):
            entries = [journal.read(str(frame.number), self.state) for frame in frames]
            before += sum(entry is not None for entry in entries)
            missing = [n for n, entry in enumerate(entries) if entry is None]
            if missing and before:
                log.info("%s were done before", counted(before, "frame"))
                before = 0
            for n, found in zip(missing, self._find([frames[n] for n in missing]), strict=True):
                entries[n] = made = self._entry(frames[n], found)
                journal.add(made)
            for frame, entry in zip(frames, entries, strict=True):
                assert entry is not None
                self.best = max(self.best, entry["best_score"] or 0.0)
                yield frame, entry

    def _find(self, frames: Sequence[Frame]) -> Sequence[Detections]:
        if not frames:
            return ()
        settings = self.settings
        assert isinstance(self.finder, Finder)
        limits = settings.limits()
        limits["threshold"] = self.threshold * UNSURE
        limits["nms"] = NMS if settings.nms is None else settings.nms
        return self.finder.predict_batch(
            [frame.image for frame in frames],
            settings.prompts,
            boxes_xywh=settings.boxes,
            negative_boxes_xywh=settings.negative_boxes,
            **limits,
        )

    def _entry(self, frame: Frame, found: Detections) -> Entry:
        results = coco_results(found, 0, range(1, len(found.prompts) + 1))
        for result, color in zip(results, mean_colors(frame.image, found), strict=True):
            result["color"] = np.rint(color * 255).astype(int).tolist()
        best = found.best_score
        return {
            "image": str(frame.number),
            "state": self.state,
            "width": found.width,
            "height": found.height,
            "found": results,
            "best_score": best if best is not None and math.isfinite(best) else None,
        }

    def _identity(self) -> dict[str, Any]:
        film, section = self.film, self.following.section
        place = film.source if film.live else str(film.path or [str(p) for p in film.frames])
        return {
            **self.settings.identity(),
            "input": place,
            "every": section.every,
            "from": section.begin,
            "to": section.end,
            "fps": film.fps if film.frames else None,
            "fill_gaps": self.following.fill,
            "engine": self.following.engine,
        }

    def _is_done(self, journal: Journal) -> bool:
        return journal.read(DONE, self.state) is not None and all(
            (self.folder / file).exists() for file in _files(self.settings.save)
        )

    def _nothing(self) -> str:
        section, source = self.following.section, self.film.source
        if self.reader.ended:
            return f"{source}: no frame could be read ({self.reader.ended})"
        if section.begin:
            return f"--from {section.begin:g}: {source} ends before it"
        return f"{source}: no frame in it could be read; it is empty or damaged"

    def _problems(self) -> list[str]:
        reader, source = self.reader, self.film.source
        problems = list(reader.problems)
        if unnamed := reader.broken - len(problems):
            problems.append(f"{source}: {counted(unnamed, 'frame')} could not be decoded")
        if reader.ended:
            problems.append(f"{source}: ends before its end ({reader.ended}): is it cut short?")
        return problems

    def _tell(self, writer: TrackWriter, tracks: int, seconds: float) -> None:
        log.info(
            "%s: %s, %s, in %s (%.1f frames a second): %s",
            *(self.film.source, counted(writer.frames, "frame"), counted(tracks, "track")),
            *(duration(seconds), writer.frames / max(seconds, 1e-3), self.folder),
        )
        if not tracks and 0 < self.best < self.threshold:
            log.info(
                "nothing scores above the threshold of %.3g; the highest score is %.3g: "
                "--threshold %s --overwrite would show it",
                *(self.threshold, self.best, threshold_below(self.best)),
            )


def track_settings(threshold: float, fps: float, *, fill: bool = False) -> TrackSettings:
    """Return when detections belong together.

    Args:
        threshold: 0..1, which a track must reach.
        fps: frames a second.
        fill: whether gaps are filled.
    """
    return TrackSettings(
        sure=threshold,
        likely=threshold * LIKELY,
        unsure=threshold * UNSURE,
        trial=max(round(TRIAL * fps), TrackSettings.least + 1),
        patience=max(round(PATIENCE * fps), 2),
        memory=max(round(MEMORY * fps), 2),
        fill=fill,
    )


def read_entry(
    entry: Entry, prompts: Sequence[str]
) -> tuple[Detections, NDArray[np.float64] | None]:
    """Return the detections of a frame's entry, and the mean color (N, 3), 0..1, of each."""
    found = entry["found"]
    corners = [(x, y, x + w, y + h) for x, y, w, h in (each["bbox"] for each in found)]
    masks = [each["segmentation"] for each in found if "segmentation" in each]
    detections = Detections(
        np.array(corners, dtype=np.float32).reshape(-1, 4),
        np.array([each["score"] for each in found], dtype=np.float32),
        np.array([each["category_id"] - 1 for each in found], dtype=np.int64),
        tuple(prompts),
        masks if len(masks) == len(found) else None,
        entry["width"],
        entry["height"],
        entry["best_score"],
    )
    return detections, np.array([each["color"] for each in found]).reshape(-1, 3) / 255


def mean_colors(image: Image.Image, found: Detections) -> NDArray[np.float64]:
    """Return the mean RGB (N, 3), 0..1, within each mask, or box where there is no mask."""
    pixels = np.asarray(image)
    colors = []
    for index, box in enumerate(found.boxes_xyxy):
        if found.masks is not None:
            inside, left, top = decode_crop(found.masks[index])
            window = pixels[top : top + inside.shape[0], left : left + inside.shape[1]][inside]
        else:
            left, top, right, bottom = (math.floor(side) for side in box.tolist())
            window = pixels[top : bottom + 1, left : right + 1].reshape(-1, 3)
        mean = window.mean(axis=0) if len(window) else np.zeros(3)
        colors.append(np.rint(mean) / 255)  # as a journal holds it
    return np.array(colors).reshape(-1, 3)


def read_frames(folder: Path) -> Iterator[Entry]:
    """Yield what was found in each frame of a film, as its journal in an output folder has it."""
    return (entry for entry in read_entries(folder) if entry["image"] != DONE)


def _files(save: Sequence[str]) -> list[str]:
    """Return the paths of a film's files but those of single frames."""
    tables = [TRACK_TABLES[kind][0] for kind in save if kind in TRACK_TABLES]
    legends = [TABLES[kind][0] for kind in save if kind in ("semantic", "yolo")]
    return [FILMS[kind] for kind in save if kind in FILMS] + tables + legends


def _check_clear(
    film: Film, folder: Path, save: Sequence[str], ours: set[str], *, held: bool
) -> None:
    """Raise UserError where other results would be lost."""
    if film.live and held:
        raise UserError(exists_problem(folder, "holds results of what cannot be seen again"))
    in_the_way = [file for file in _files(save) if file not in ours and (folder / file).exists()]
    if in_the_way:
        raise UserError([exists_problem(folder, f"holds {file} already") for file in in_the_way])


def _state(film: Film) -> list[int]:
    """Return numbers that tell whether a film has changed; those of a live one say nothing."""
    paths = [film.path] if film.path else film.frames
    try:
        states = [file_state(path) for path in paths]
    except OSError as error:
        raise UserError(f"{film.source}: {error.strerror}: {error.filename}") from None
    return [len(states), sum(size for size, _ in states), max((t for _, t in states), default=0)]


def _batches(reader: Reader, size: int) -> Generator[list[Frame], None, None]:
    batch: list[Frame] = []
    for frame in reader:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _ahead(items: Generator[T, None, None]) -> Iterator[T]:
    """Yield the items, the next of which is made in a thread meanwhile."""
    with contextlib.closing(items), ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


@contextlib.contextmanager
def _progress(reader: Reader) -> Iterator[Callable[[int], None]]:
    """Show how far a film is; of a live one, a line now and then."""
    if not reader.film.live:
        with contextlib.ExitStack() as stack:
            shown: list[Callable[[int, str], None]] = []

            def advance(done: int) -> None:
                if not shown:  # how long it is, is known once it is read
                    total = reader.count or done
                    shown.append(stack.enter_context(progress("frames", total, done - 1)))
                shown[0](done, "")

            yield advance
        return
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            log.info("%s: %s", reader.film.source, counted(done, "frame"))

    log.info("%s: until Ctrl-C", reader.film.source)
    yield tell


@contextlib.contextmanager
def _ended(reader: Reader) -> Iterator[None]:
    """Let SIGINT and SIGTERM end a live film with the frame at work: that is how it ends."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, lambda *_: reader.stop()) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)
