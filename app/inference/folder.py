"""Images on disk → what was found in each, on disk; after a stop it goes on from there."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from app.console import duration, progress
from app.datasets.images import ImageError, open_image
from app.errors import UserError
from app.files import exists_problem
from app.inference.detections import Detections
from app.inference.inputs import find_images, normalised_boxes, output_names
from app.inference.journal import Entry, Journal, file_state, read_contents
from app.inference.outputs import PER_IMAGE, coco_results, write_images
from app.inference.settings import Settings
from app.inference.tables import TABLES
from app.model.vocabulary import VISUAL_PROMPT

log = logging.getLogger("app")
SHOWN = 20  # files that are in the way


class Finder(Protocol):
    """What finds: `Predictor`, or the `Runtime` of an exported folder."""

    @property
    def predict_batch(self) -> Callable[..., list[Detections]]: ...


@dataclass(frozen=True)
class Job:
    """An image to predict on, and what its files are called."""

    image: Path
    name: str


@dataclass(frozen=True)
class Outcome:
    """What became of a batch: an entry for each image that is done, and what failed."""

    entries: tuple[Entry, ...]
    failed: tuple[str, ...]


Work = Callable[[Sequence[Sequence[Job]]], Iterator[Outcome]]  # batches → what became of each
# settings, output, processes → what does the work while it is open, and in which precision
OpenWork = Callable[[Settings, Path, int], contextlib.AbstractContextManager[tuple[Work, str]]]


def predict_folder(
    source: str,
    output: Path,
    settings: Settings,
    *,
    batch_size: int = 1,
    processes: int = 1,
    overwrite: bool = False,
    open_work: OpenWork | None = None,
) -> list[str]:
    """Predict on every image that `source` stands for; see `python -m app infer --help`.

    What is done is noted image by image, so the same call after a stop does the rest.

    Args:
        open_work: None: `worker.open_work`, which loads the checkpoint into torch.

    Returns:
        What went wrong with single images: one bad image costs only itself.

    Raises:
        UserError: anything that concerns the whole, before anything is written.
    """
    # absolute: what another folder has under the same relative path is another image
    images = [image.absolute() for image in find_images(source)]
    jobs = [Job(*pair) for pair in zip(images, output_names(images), strict=True)]
    files = _files(jobs, settings.save)
    _check_inputs(images, output, files)
    if not overwrite:
        _check_clear(source, images, output, files)
    begun = time.monotonic()
    with (
        ended_by_sigterm(),
        (open_work or _torch_work())(settings, output, processes) as (work, precision),
        unwritable_said(output),
        Journal(output, settings.identity(), overwrite=overwrite) as journal,
    ):
        journal.begin(files)
        failed = _do_what_is_left(jobs, work, journal, batch_size)
        if not len(journal):
            raise UserError(failed)
        found = _write_tables(output, journal, images, settings)
    for problem in failed:
        log.error("failed: %s", problem)
    log.info(
        "%d of %d images, %d objects, in %s and %s: %s",
        *(len(images) - len(failed), len(images), found),
        *(duration(time.monotonic() - begun), precision, output),
    )
    return failed


def _torch_work() -> OpenWork:
    from app.inference.worker import open_work  # here: what has another needs no torch

    return open_work


def _do_what_is_left(
    jobs: Sequence[Job], work: Work, journal: Journal, batch_size: int
) -> list[str]:
    """Predict on the images that are not done; returns what went wrong with single ones."""
    todo = [job for job in jobs if journal.read(job.image) is None]
    before = len(jobs) - len(todo)
    if before:
        log.info("%d of %d images were done before", before, len(jobs))
    batches = [todo[at : at + batch_size] for at in range(0, len(todo), batch_size)]
    failed: list[str] = []
    with progress("images", len(jobs), before) as advance:
        for number, outcome in enumerate(work(batches), start=1):
            for entry in outcome.entries:
                journal.add(entry)
            failed += outcome.failed
            done = min(before + number * batch_size, len(jobs))
            advance(done, f"({len(failed)} failed)")
    return failed


def predict_images(
    finder: Finder, settings: Settings, output: Path, batch: Sequence[Job]
) -> Outcome:
    """Predict on a few images together and write the files of each."""
    opened: list[tuple[Job, Image.Image]] = []
    failed: list[str] = []
    for job in batch:
        try:
            image = open_image(job.image)
            normalised_boxes([*settings.boxes, *settings.negative_boxes], image)
            opened.append((job, image))
        except ImageError as error:
            failed.append(str(error))
        except UserError as error:  # of a box
            failed.append(f"{job.image}: {error}")
    if not opened:
        return Outcome((), tuple(failed))
    entries = []
    boxes = {"boxes_xywh": settings.boxes, "negative_boxes_xywh": settings.negative_boxes}
    found = finder.predict_batch(
        [image for _, image in opened],
        settings.prompts,
        **{key: value for key, value in boxes.items() if value},  # a runtime takes none
        **settings.limits(),
    )
    for (job, image), detections in zip(opened, found, strict=True):
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


def _write_tables(
    output: Path, journal: Journal, images: Sequence[Path], settings: Settings
) -> int:
    """Write what the whole run leaves; returns the number of objects."""

    def entries() -> Iterator[tuple[int, Entry]]:
        for image_id, image in enumerate(images, start=1):
            if (entry := journal.read(image)) is not None:
                yield image_id, entry

    prompts = settings.prompts or (VISUAL_PROMPT,)
    for kind in settings.save:
        if kind in TABLES:
            path, write = TABLES[kind]
            write(output / path, entries(), prompts)
    return sum(len(entry["found"]) for _, entry in entries())


def _files(jobs: Sequence[Job], save: Sequence[str]) -> list[str]:
    """What the run writes, relative to the output folder."""
    tables = [TABLES[kind][0] for kind in save if kind in TABLES]
    patterns = [PER_IMAGE[kind].path for kind in save if kind in PER_IMAGE]
    return tables + [pattern.format(job.name) for pattern in patterns for job in jobs]


def _check_inputs(images: Sequence[Path], output: Path, files: Sequence[str]) -> None:
    """Raises UserError where an input image would be written over."""
    inputs = {image.resolve() for image in images}
    _refuse(
        [
            f"--output-dir {output}: {Path(file).name} is an input image; name another folder"
            for file in files
            if (output / file).exists() and (output / file).resolve() in inputs
        ]
    )


def _check_clear(source: str, images: Sequence[Path], output: Path, files: Sequence[str]) -> None:
    """Raises UserError where a file is in the way that no earlier run of the same made, or where
    there are results of other images, which would be lost among these."""
    earlier = read_contents(output)
    now = {str(image) for image in images}
    if others := [image for image in earlier.lines if image not in now]:
        rest = f" and {len(others) - 1} more" if len(others) > 1 else ""
        state = f"holds results of {others[0]}{rest}, not of --input {source}"
        raise UserError(exists_problem(output, state))
    _refuse(
        [
            exists_problem(output, f"holds {file} already")
            for file in files
            if file not in earlier.files and (output / file).exists()
        ]
    )


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        rest = len(problems) - SHOWN
        raise UserError([*problems[:SHOWN], *([f"and {rest} more files"] if rest > 0 else [])])


@contextlib.contextmanager
def unwritable_said(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output-dir {output}: {error.filename or 'a file'} cannot be written "
            f"({error.strerror}). What is done is kept: mend it and run the same command again."
        ) from None


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exit with 143 would: files are closed, processes ended."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
