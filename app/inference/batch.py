"""Predict on a few images on disk and write their files, by any finder; needs no torch."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from app.datasets.images import ImageError, count_pages, open_image
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.finder import Finder
from app.inference.inputs import normalised_boxes
from app.inference.journal import Entry, file_state
from app.inference.outputs import coco_results, write_images
from app.inference.settings import Settings


@dataclass(frozen=True)
class Job:
    """Hold an image to predict on, and how results call it.

    Attributes:
        image: absolute path.
        file_name: path relative to what --input names, with slashes.
        name: path of its files in the output folder, without an ending.
    """

    image: Path
    file_name: str
    name: str


@dataclass(frozen=True)
class Outcome:
    """Hold the entries of the images of a batch that are done, and the problems of the others.

    Attributes:
        pages: image that holds further pictures, which are not read → number of all.
    """

    entries: tuple[Entry, ...]
    failed: tuple[str, ...]
    pages: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """Hold the images of a batch that could be opened, and the problems of the others.

    Attributes:
        jobs, images, states: of each that could; the last is that of its file.
        failed, pages: as of an `Outcome`.
    """

    jobs: list[Job]
    images: list[Image.Image]
    states: list[list[int]]
    failed: list[str]
    pages: dict[str, int]


# Batches → the outcome of each, in their order.
Work = Callable[[Sequence[Sequence[Job]]], Iterator[Outcome]]
# Settings, output folder, number of processes → a context of the work and its precision.
OpenWork = Callable[[Settings, Path, int], contextlib.AbstractContextManager[tuple[Work, str]]]


def predict_batches(
    finder: Finder, settings: Settings, output: Path, batches: Sequence[Sequence[Job]]
) -> Iterator[Outcome]:
    """Predict on the images of each batch together, write the files of each; yield its outcome.

    The next batch is opened, and the files of the last are written, beside the prediction: three
    batches are in memory at most. An image that cannot be read, or that a box misses, fails alone.
    """
    writing: Future[Outcome] | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        try:
            for opened in _one_ahead(reader, partial(_open_images, finder, settings), batches):
                results = _find(finder, settings, opened.images)
                if writing is not None:
                    outcome, writing = writing.result(), None
                    yield outcome
                writing = writer.submit(_write, settings, output, opened, results)
        finally:  # what is being written is told, whatever ends this
            if writing is not None:
                yield writing.result()


def _one_ahead(
    reader: Executor, work: Callable[[Sequence[Job]], Opened], batches: Sequence[Sequence[Job]]
) -> Iterator[Opened]:
    """Yield what `work` makes of each batch, while it is at work on the next."""
    waiting: deque[Future[Opened]] = deque()
    for batch in batches:
        waiting.append(reader.submit(work, batch))
        if len(waiting) > 1:
            yield waiting.popleft().result()
    if waiting:
        yield waiting.popleft().result()


def _open_images(finder: Finder, settings: Settings, batch: Sequence[Job]) -> Opened:
    opened = Opened([], [], [], [], {})
    for job in batch:
        try:
            image, state = open_image(job.image, finder.levels), file_state(job.image)
            normalised_boxes([*settings.boxes, *settings.negative_boxes], image)
            if (count := count_pages(job.image)) > 1:
                opened.pages[job.file_name] = count
        except ImageError as error:
            opened.failed.append(str(error))
        except (UserError, OSError) as error:  # of a box; of a file that went away meanwhile
            opened.failed.append(f"{job.image}: {error}")
        else:
            opened.jobs.append(job)
            opened.images.append(image)
            opened.states.append(state)
    return opened


def _find(
    finder: Finder, settings: Settings, images: Sequence[Image.Image]
) -> Sequence[Detections]:
    if not images:
        return ()
    return finder.predict_batch(
        images,
        settings.prompts,
        boxes_xywh=settings.boxes,
        negative_boxes_xywh=settings.negative_boxes,
        **settings.limits(),
    )


def _write(
    settings: Settings, output: Path, opened: Opened, results: Sequence[Detections]
) -> Outcome:
    entries = []
    for job, image, state, detections in zip(
        opened.jobs, opened.images, opened.states, results, strict=True
    ):
        write_images(output, job.name, image, detections, settings.save)
        entries.append(_entry(job, state, detections))
    return Outcome(tuple(entries), tuple(opened.failed), opened.pages)


def _entry(job: Job, state: list[int], detections: Detections) -> Entry:
    category_ids = range(1, len(detections.prompts) + 1)
    best = detections.best_score
    return {
        "image": str(job.image),
        "state": state,
        "file_name": job.file_name,
        "name": job.name,
        "width": detections.width,
        "height": detections.height,
        "found": coco_results(detections, 0, category_ids),
        "best_score": best if best is not None and math.isfinite(best) else None,
    }
