"""Predict on a few images on disk and write their files, by any finder; needs no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from app.datasets.images import ImageError, open_image
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.finder import Finder
from app.inference.inputs import normalised_boxes
from app.inference.journal import Entry, file_state
from app.inference.outputs import coco_results, write_images
from app.inference.settings import Settings


@dataclass(frozen=True)
class Job:
    """Hold the path of an image to predict on, and the name of its files."""

    image: Path
    name: str


@dataclass(frozen=True)
class Outcome:
    """Hold the entries of the images of a batch that are done, and the problems of the others."""

    entries: tuple[Entry, ...]
    failed: tuple[str, ...]


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
    opened: list[tuple[Job, Image.Image]] = []
    failed: list[str] = []
    for job in batch:
        try:
            image = open_image(job.image, finder.levels)
            normalised_boxes([*settings.boxes, *settings.negative_boxes], image)
            opened.append((job, image))
        except ImageError as error:
            failed.append(str(error))
        except UserError as error:  # of a box
            failed.append(f"{job.image}: {error}")
    if not opened:
        return Outcome((), tuple(failed))
    results = finder.predict_batch(
        [image for _, image in opened],
        settings.prompts,
        boxes_xywh=settings.boxes,
        negative_boxes_xywh=settings.negative_boxes,
        **settings.limits(),
    )
    entries = []
    for (job, image), detections in zip(opened, results, strict=True):
        write_images(output, job.name, image, detections, settings.save)
        entries.append(_entry(job, detections))
    return Outcome(tuple(entries), tuple(failed))


def _entry(job: Job, detections: Detections) -> Entry:
    category_ids = range(1, len(detections.prompts) + 1)
    return {
        "image": str(job.image),
        "state": file_state(job.image),
        "width": detections.width,
        "height": detections.height,
        "found": coco_results(detections, 0, category_ids),
    }
