"""Write what is known of a film's tracks: a film of them, tables, and files of each frame."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from PIL import Image

from app.datasets.rle import area
from app.files import atomic_path, csv_text, write_csv
from app.inference.detections import Detections
from app.inference.film_writer import FilmWriter, GifWriter
from app.inference.outputs import PER_IMAGE, write_images
from app.inference.tables import TABLES
from app.inference.tracks import Sighting

PENDING = 4  # frames that wait to be written
TOGETHER = 50  # tracks that are gathered at once
COLUMNS = (
    *("frame", "time", "track", "prompt", "category_id", "score", "x", "y", "width", "height"),
    *("area", "interpolated", "image_width", "image_height", "counts"),
)
Line = dict[str, Any]  # of a frame: frame, time, width, height, found


@dataclass(frozen=True)
class Told:
    """Hold a frame whose tracks are known by now.

    Attributes:
        number, time: as of a `films.Frame`.
        image: upright RGB.
    """

    number: int
    time: float
    image: Image.Image


@dataclass(frozen=True)
class Tracks:
    """Hold all tracks of a film, for the tables.

    Attributes:
        name: of the film.
        fps: frames a second, on average.
        prompts: whose index is a track's label.
        labels: of each track, by its id.
        lines: reads the frames, one by one, as often as it is called.
        length: frames, those that could not be read as well.
        width, height: pixels.
    """

    name: str
    fps: float
    prompts: Sequence[str]
    labels: Mapping[int, int]
    lines: Callable[[], Iterator[Line]]
    length: int
    width: int
    height: int


class TrackWriter:
    """Writes frames in a thread of its own as they come; `finish` writes the tables.

    As a context manager it leaves no half of a file where the block fails.

    Args:
        folder: of the outputs.
        save: kinds of output: of `TRACK_TABLES`, video, gif, or of `PER_IMAGE`.
        prompts: whose index is a sighting's label.
    """

    def __init__(self, folder: Path, save: Sequence[str], prompts: Sequence[str]) -> None:
        self.folder, self.save, self.prompts = folder, save, prompts
        self.length = self.width = self.height = self.frames = 0
        self._stack = contextlib.ExitStack()
        self._films: list[FilmWriter | GifWriter] = []
        self._pending: list[Future[None]] = []

    def __enter__(self) -> TrackWriter:
        self._lines: IO[bytes] = self._stack.enter_context(tempfile.TemporaryFile(dir=self.folder))
        self._thread = self._stack.enter_context(ThreadPoolExecutor(1))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def begin(self, fps: float) -> None:
        """Open the films to be written."""
        if "video" in self.save:
            path = self._stack.enter_context(atomic_path(self.folder / FILMS["video"]))
            self._films.append(FilmWriter(path, fps))
        if "gif" in self.save:
            path = self._stack.enter_context(atomic_path(self.folder / FILMS["gif"]))
            self._films.append(GifWriter(path))

    def add(self, told: Told, sightings: Sequence[Sighting]) -> None:
        """Write a frame; wait where too many wait already."""
        self._pending.append(self._thread.submit(self._write, told, sightings))
        while len(self._pending) > PENDING or (self._pending and self._pending[0].done()):
            self._pending.pop(0).result()

    def finish(self, name: str, fps: float, labels: Mapping[int, int]) -> None:
        """End the films, and write the tables.

        Args:
            name, fps: of the film.
            labels: of each track.
        """
        for waiting in self._pending:
            waiting.result()
        for film in self._films:
            film.close()
        size = self.length, self.width, self.height
        tracks = Tracks(name, fps, self.prompts, labels, self._read, *size)
        for kind in self.save:
            if kind in TRACK_TABLES:
                path, write = TRACK_TABLES[kind]
                write(self.folder / path, tracks)
            elif kind in ("semantic", "yolo"):
                path, write_legend = TABLES[kind]
                write_legend(self.folder / path, (), self.prompts)

    def _write(self, told: Told, sightings: Sequence[Sighting]) -> None:
        self.length = told.number + 1
        self.width, self.height = told.image.size
        self.frames += 1
        found = [_entry(sighting) for sighting in sightings]
        size = {"width": self.width, "height": self.height}
        line = {"frame": told.number, "time": told.time, **size, "found": found}
        self._lines.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        if self._films:
            drawn = draw_tracks(told.image, sightings, self.prompts)
            for film in self._films:
                film.add(drawn, told.time)
        if kinds := [kind for kind in self.save if kind in PER_IMAGE]:
            detections = detections_of(sightings, self.prompts, told.image)
            write_images(self.folder, frame_name(told.number), told.image, detections, kinds)

    def _read(self) -> Iterator[Line]:
        self._lines.seek(0)
        for line in self._lines:
            yield json.loads(line)


def frame_name(number: int) -> str:
    """Return the name of a frame's files, without an ending."""
    return f"{number:06d}"


def draw_tracks(
    image: Image.Image, sightings: Sequence[Sighting], prompts: Sequence[str]
) -> Image.Image:
    """Draw mask or box, prompt, id and score on a copy of the image; a track keeps its color."""
    from app.datasets.overlay import color_of, draw_objects

    labels = [
        f"#{each.track} {prompts[each.label]}" + ("" if each.filled else f" {each.score:.2f}")
        for each in sightings
    ]
    boxes = np.array([each.box_xyxy for each in sightings]).reshape(-1, 4)
    colors = [color_of(each.track - 1) for each in sightings]
    return draw_objects(image, boxes, [each.mask for each in sightings], labels, colors)


def detections_of(
    sightings: Sequence[Sighting], prompts: Sequence[str], image: Image.Image
) -> Detections:
    """Return a frame's sightings as detections, the highest score first."""
    ranked = sorted(sightings, key=lambda each: -each.score)
    masks = [each.mask for each in ranked if each.mask is not None]
    return Detections(
        np.array([each.box_xyxy for each in ranked], dtype=np.float32).reshape(-1, 4),
        np.array([each.score for each in ranked], dtype=np.float32),
        np.array([each.label for each in ranked], dtype=np.int64),
        tuple(prompts),
        masks if len(masks) == len(ranked) else None,
        *image.size,
    )


def _entry(sighting: Sighting) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "track": sighting.track,
        "score": sighting.score,
        "bbox": sighting.box_xywh,
    }
    if sighting.mask is not None:
        entry["segmentation"] = sighting.mask
    if sighting.filled:
        entry["interpolated"] = True
    return entry


def _area(entry: Mapping[str, Any]) -> float:
    if (mask := entry.get("segmentation")) is not None:
        return area(mask)
    return float(entry["bbox"][2] * entry["bbox"][3])


def _write_coco(path: Path, tracks: Tracks) -> None:
    """Write COCO-VID: COCO with `videos`, and with a `track_id` of each annotation."""
    video = {"id": 1, "name": tracks.name, "width": tracks.width, "height": tracks.height}
    video |= {"fps": tracks.fps, "length": tracks.length}
    categories = [{"id": n, "name": name} for n, name in enumerate(tracks.prompts, start=1)]

    def images() -> Iterator[Line]:
        for line in tracks.lines():
            yield {
                "id": line["frame"] + 1,
                "video_id": 1,
                "frame_id": line["frame"],
                "file_name": f"{frame_name(line['frame'])}.png",
                **{key: line[key] for key in ("time", "width", "height")},
            }

    def annotations() -> Iterator[Line]:
        number = 0
        for line in tracks.lines():
            for entry in line["found"]:
                number += 1
                yield {
                    "id": number,
                    "image_id": line["frame"] + 1,
                    "video_id": 1,
                    "track_id": entry["track"],
                    "category_id": tracks.labels[entry["track"]] + 1,
                    "area": _area(entry),
                    "iscrowd": 0,
                    **{key: value for key, value in entry.items() if key != "track"},
                }

    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{{"videos": {json.dumps([video])},\n"categories": {json.dumps(categories)}')
        for name, rows in (("images", images), ("annotations", annotations)):
            file.write(f',\n"{name}": ')
            _write_list(file, rows())
        file.write("}\n")


def _write_youtube_vis(path: Path, tracks: Tracks) -> None:
    """Write YouTube-VIS results: of each track its masks over the frames, null where it is not."""

    def results() -> Iterator[Line]:
        ids = sorted(tracks.labels)
        for first in range(0, len(ids), TOGETHER):  # so that memory does not grow with their number
            chosen: dict[int, list[tuple[int, Line]]] = {t: [] for t in ids[first:][:TOGETHER]}
            for line in tracks.lines():
                for entry in line["found"]:
                    if entry["track"] in chosen:
                        chosen[entry["track"]].append((line["frame"], entry))
            for track, seen in chosen.items():
                masks: list[Any] = [None] * tracks.length
                boxes: list[Any] = [None] * tracks.length
                for frame, entry in seen:
                    masks[frame], boxes[frame] = entry.get("segmentation"), entry["bbox"]
                yield {
                    "video_id": 1,
                    "category_id": tracks.labels[track] + 1,
                    "score": float(np.mean([entry["score"] for _, entry in seen])),
                    "segmentations": masks,
                    "bboxes": boxes,
                }

    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        _write_list(file, results())
        file.write("\n")


def _write_list(file: IO[str], rows: Iterator[Line]) -> None:
    separator = "[\n"
    for row in rows:
        file.write(separator + json.dumps(row, allow_nan=False))
        separator = ",\n"
    file.write("[]" if separator == "[\n" else "\n]")


def _write_mot(path: Path, tracks: Tracks) -> None:
    """Write MOTChallenge's text: frame and id from 1, box, score; it has no place for a class."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in tracks.lines():
            for entry in line["found"]:
                box = ",".join(f"{side:.2f}" for side in entry["bbox"])
                start = f"{line['frame'] + 1},{entry['track']},{box},{entry['score']:.4f}"
                file.write(f"{start},-1,-1,-1\n")


def _write_csv(path: Path, tracks: Tracks) -> None:
    """Write a row an object and frame; `counts` is its mask's RLE."""

    def rows() -> Iterator[dict[str, Any]]:
        for line in tracks.lines():
            for entry in line["found"]:
                label, mask = tracks.labels[entry["track"]], entry.get("segmentation")
                values = (
                    *(line["frame"], f"{line['time']:.6f}", entry["track"]),
                    *(csv_text(tracks.prompts[label]), label + 1, entry["score"], *entry["bbox"]),
                    *(_area(entry), int(entry.get("interpolated", False))),
                    *(line["width"], line["height"], mask["counts"] if mask else ""),
                )
                yield dict(zip(COLUMNS, values, strict=True))

    write_csv(path, COLUMNS, rows())


# Kind of output → path in the output folder, and the function that writes it.
TRACK_TABLES: dict[str, tuple[str, Callable[[Path, Tracks], None]]] = {
    "coco": ("tracks.json", _write_coco),
    "youtube-vis": ("youtube_vis.json", _write_youtube_vis),
    "mot": ("tracks.txt", _write_mot),
    "csv": ("tracks.csv", _write_csv),
}
FILMS = {"video": "tracks.mp4", "gif": "tracks.gif"}
TRACK_SAVES = (*FILMS, *TRACK_TABLES, *PER_IMAGE)  # what --save takes of films
TRACK_DEFAULTS = ("video", "coco", "mot", "csv")
