"""Measure films: tracks of drawn ones, speed beside the predictor alone, memory; 1 below a goal.

.venv/bin/python -m benchmarks.video                 # all of it: some 10 minutes on 2 cores
.venv/bin/python -m benchmarks.video tracks speed    # parts, by name
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.synthetic.films import ANNOTATIONS, KINDS, draw_film, make_films
from app.evaluation.tracks import Film, Films, Seen, read_films, score_tracks
from app.evaluation.video import score_video
from app.inference.film_writer import FilmWriter
from app.inference.following import NMS, Following, follow_films, list_films, read_frames
from app.inference.predictor import Predictor
from app.inference.settings import Settings, with_defaults
from app.inference.track_files import TRACK_DEFAULTS
from benchmarks.first_hour import Goal
from benchmarks.nano import arguments

FILMS, FRAMES = 20, 100
LONG = 10_000  # frames
TAKES = 3  # of each speed; the median counts
FPS = 20.0
JOINED = 0.3  # IoU of two detections, a frame apart, that are one thing to the plain way


def tracks(weights: Path, folder: Path) -> Iterator[Goal]:
    """Twenty films of shapes that move, cross, leave and come back."""
    make_films(folder / "films", films=FILMS, frames=FRAMES, fps=FPS)
    settings = Settings(str(weights))
    figures = score_video(folder / "films", folder / "out", settings=settings)
    truth = read_films(folder / "films" / ANNOTATIONS)
    plain = Films(
        {id: _joined(folder / "out" / truth.names[id], weights) for id in truth.films},
        dict(enumerate(KINDS, start=1)),
    )
    beside = score_tracks(truth, plain)
    for name in ("HOTA", "IDF1", "MOTA", "switches"):
        print(f"{name}: {figures[name]:.3f}; detections joined by IoU alone {beside[name]:.3f}")
    print(f"box AP of the frames {figures['bbox/AP']:.3f}, mask AP {figures['segm/AP']:.3f}")
    yield Goal("HOTA", figures["HOTA"], 0.75)
    yield Goal("IDF1", figures["IDF1"], 0.80)
    yield Goal("HOTA above joined by IoU", figures["HOTA"] - beside["HOTA"], 0.0)
    yield Goal("IDF1 above joined by IoU", figures["IDF1"] - beside["IDF1"], 0.0)


def _joined(folder: Path, weights: Path) -> Film:
    """Return a film's detections, each with the id of the one before that it overlaps most."""
    threshold = with_defaults(Settings(str(weights), prompts=KINDS)).threshold
    film: Film = []
    before, count = list[Seen](), 0
    for entry in read_frames(folder):
        sure = [each for each in entry["found"] if each["score"] >= threshold]
        now, left = list[Seen](), list(before)
        for each in sure:
            label, shape = each["category_id"], each["segmentation"]
            same = [other for other in left if other.label == label]
            shared = coco_mask.iou([shape], [o.shape for o in same], [0] * len(same))
            best = int(shared[0].argmax()) if same else 0
            if same and shared[0][best] >= JOINED:
                left.remove(same[best])
                now.append(Seen(same[best].track, label, shape))
            else:
                count += 1
                now.append(Seen(count, label, shape))
        film.append(now)
        before = now
    return film


def speed(weights: Path, folder: Path) -> Iterator[Goal]:
    """An MP4 to its tracks, beside the predictor alone on the same frames in memory, in turns."""
    images = [Image.fromarray(draw_film((0, 1)).frame(n / FPS)[0]) for n in range(FRAMES)]
    path = folder / "film.mp4"
    _write(path, images)
    predictor = Predictor.load(weights)
    settings = with_defaults(Settings(str(weights), prompts=KINDS, save=TRACK_DEFAULTS))
    predictor.predict(images[0], KINDS)
    rates: dict[str, list[float]] = {"alone": [], "end to end": []}
    for take in range(TAKES):
        begun = time.perf_counter()
        for image in images:
            predictor.predict(image, KINDS, threshold=0.05, nms=NMS)
        rates["alone"].append(FRAMES / (time.perf_counter() - begun))
        output = folder / f"out{take}"
        films = list_films(str(path), output, settings.save, fps=FPS, overwrite=False)
        begun = time.perf_counter()
        follow_films(films, output, settings, Following(), predictor)
        rates["end to end"].append(FRAMES / (time.perf_counter() - begun))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"frames a second {name}: {value:.1f}")
    yield Goal(
        "end to end beside the predictor alone", medians["end to end"] / medians["alone"], 0.9
    )


def memory(weights: Path, folder: Path) -> Iterator[Goal]:
    """Ten thousand frames: what the last 8,000 take beside the first 2,000."""
    film = draw_film((0, 2), width=96, height=72)
    path = folder / "long.mp4"
    _write(path, (Image.fromarray(film.frame(n / FPS)[0]) for n in range(LONG)))
    settings = with_defaults(Settings(str(weights), prompts=KINDS[:1], save=TRACK_DEFAULTS))
    films = list_films(str(path), folder / "out", settings.save, fps=FPS, overwrite=False)
    measured: list[float] = []
    predictor = Predictor.load(weights)
    find = predictor.predict_batch
    seen = 0

    def watched(*args: object, **kwargs: object) -> object:
        nonlocal seen
        seen += 1
        if seen in (2000, LONG):
            measured.append(psutil.Process().memory_info().rss / 1e6)
        return find(*args, **kwargs)  # type: ignore[arg-type]

    predictor.predict_batch = watched  # type: ignore[method-assign, assignment]
    follow_films(films, folder / "out", settings, Following(), predictor)
    size = json.dumps([round(value) for value in measured])
    print(f"megabytes after 2,000 and {LONG:,} frames: {size}")
    yield Goal("growth of memory, MB", measured[1] - measured[0], 20, at_most=True)


def _write(path: Path, images: Iterator[Image.Image] | list[Image.Image]) -> None:
    writer = FilmWriter(path, FPS)
    for number, image in enumerate(images):
        writer.add(image, number / FPS)
    writer.close()


PARTS: dict[str, Callable[[Path, Path], Iterator[Goal]]] = {
    part.__name__: part for part in (tracks, speed, memory)
}


def main() -> int:
    options = arguments(__doc__, PARTS)
    logging.getLogger("app").setLevel(logging.ERROR)
    reached = True
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            for goal in PARTS[name](options.weights, Path(folder)):
                print(f"{name}: {goal}", flush=True)
                reached &= goal.reached
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
