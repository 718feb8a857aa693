"""Predict on a few images on disk and write their files, by any finder; needs no torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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


# Batches → the outcome of each, in their order.
Work = Callable[[Sequence[Sequence[Job]]], Iterator[Outcome]]
# Settings, output folder, number of processes → a context of the work and its precision.
OpenWork = Callable[[Settings, Path, int], contextlib.AbstractContextManager[tuple[Work, str]]]


def predict_images(
    finder: Finder, settings: Settings, output: Path, batch: Sequence[Job]
) -> Outcome:
    """Predict on a few images together and write the files of each.

    An image that cannot be read, or that a box misses, fails alone.
    """
    opened: list[tuple[Job, Image.Image, list[int]]] = []
    failed: list[str] = []
    pages: dict[str, int] = {}
    for job in batch:
        try:
            image, state = open_image(job.image, finder.levels), file_state(job.image)
            normalised_boxes([*settings.boxes, *settings.negative_boxes], image)
            opened.append((job, image, state))
            if (count := count_pages(job.image)) > 1:
                pages[job.file_name] = count
        except ImageError as error:
            failed.append(str(error))
        except (UserError, OSError) as error:  # of a box; of a file that went away meanwhile
            failed.append(f"{job.image}: {error}")
    if not opened:
        return Outcome((), tuple(failed))
    results = finder.predict_batch(
        [image for _, image, _ in opened],
        settings.prompts,
        boxes_xywh=settings.boxes,
        negative_boxes_xywh=settings.negative_boxes,
        **settings.limits(),
    )
    entries = []
    for (job, image, state), detections in zip(opened, results, strict=True):
        write_images(output, job.name, image, detections, settings.save)
        entries.append(_entry(job, state, detections))
    return Outcome(tuple(entries), tuple(failed), pages)


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
