"""Images on disk → their detections on disk; after a stop the same call does what is left."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.console import counted, duration, progress
from app.errors import UserError
from app.files import check_no_links, check_writable, exists_problem
from app.inference.batch import Job, OpenWork, Work
from app.inference.inputs import find_images, output_names, relative_names
from app.inference.journal import Contents, Entry, Journal, file_state, read_contents
from app.inference.outputs import PER_IMAGE, foreign_cutouts
from app.inference.postprocess import threshold_below
from app.inference.settings import Settings
from app.inference.tables import TABLES
from app.model.vocabulary import VISUAL_PROMPT

log = logging.getLogger("app")
SHOWN = 20  # files that are in the way
CUTOUTS = PER_IMAGE["cutouts"].path.format("")


def list_jobs(source: str, output: Path, save: Sequence[str], *, overwrite: bool) -> list[Job]:
    """Return the images that `source` stands for; refuse what would be lost or cannot be written.

    No weights are needed for it, so that a user need not wait for these to hear of a mistake.

    Args:
        save: kinds of output.

    Raises:
        UserError: no images, an output folder that is taken or cannot be written.
    """
    check_writable(output)
    found = find_images(source)
    names = relative_names(source, found)
    # Absolute, because the same relative path in another folder is another image.
    images = [image.absolute() for image in found]
    jobs = [Job(*each) for each in zip(images, names, output_names(names), strict=True)]
    files = _files(jobs, save)
    _check_inputs(images, output, files)
    if not overwrite:
        _check_clear(images, output, files, read_contents(output))
    return jobs


def predict_folder(
    jobs: Sequence[Job],
    output: Path,
    settings: Settings,
    open_work: OpenWork,
    *,
    batch_size: int = 1,
    processes: int = 1,
    overwrite: bool = False,
) -> list[str]:
    """Predict on images, as `list_jobs` returns them; see `python -m app infer --help`.

    Each image that is done is noted in a journal, so the same call after a stop does the rest.

    Args:
        open_work: opens what predicts: `worker.open_work` in torch, or that of an exported folder.

    Returns:
        The problems of single images: one bad image costs only itself.

    Raises:
        UserError: a problem of the whole, before anything is written; or no image could be done.
    """
    files = _files(jobs, settings.save)
    begun = time.monotonic()
    with (
        ended_by_sigterm(),
        open_work(settings, output, processes) as (work, precision),
        unwritable_is_user_error(output),
        Journal(output, settings.identity(), overwrite=overwrite) as journal,
    ):
        if not overwrite:  # another run may have been at work since the jobs were listed
            _check_clear([job.image for job in jobs], output, files, journal.earlier)
        journal.begin(files)
        failed, pages = _do_what_is_left(jobs, work, journal, batch_size)
        if not len(journal):
            raise UserError(failed)
        summary = _write_tables(output, journal, jobs, settings)
    for problem in failed:
        log.error("failed: %s", problem)
    log.info(
        "%d of %s, %s, in %s and %s: %s",
        *(len(jobs) - len(failed), counted(len(jobs), "image")),
        counted(summary.objects, "object"),
        *(duration(time.monotonic() - begun), precision, output),
    )
    for note in _notes(summary, settings, pages):
        log.info("%s", note)
    return failed


@dataclass(frozen=True)
class Summary:
    """Hold what the results of a run have in common.

    Attributes:
        objects: of all images.
        full: images with as many objects as `--max-detections` allows.
        best: the highest score of any query, and the image that has it; None where none is known.
    """

    objects: int
    full: int
    best: tuple[float, str] | None


def _notes(summary: Summary, settings: Settings, pages: Mapping[str, int]) -> Iterator[str]:
    """Yield what a user should know of results that are fewer than they could be."""
    if not summary.objects and summary.best is not None and summary.best[0] > 0:
        score, file_name = summary.best
        yield (
            f"nothing scores above the threshold of {settings.threshold:.3g}; the highest score is "
            f"{score:.3g}, in {file_name}: --threshold {threshold_below(score)} --overwrite would "
            "show it"
        )
    if summary.full and settings.tile is None and settings.nms is None:
        yield (
            f"{counted(summary.full, 'image')} with as many objects as --max-detections "
            f"{settings.max_detections} allows: what scores lower is left out"
        )
    if pages:
        name, count = next(iter(pages.items()))
        yield (
            f"{counted(len(pages), 'image')} with further pages, which are not read: {name} has "
            f"{count}{', …' if len(pages) > 1 else ''}; give each page as a file of its own"
        )


def _do_what_is_left(
    jobs: Sequence[Job], work: Work, journal: Journal, batch_size: int
) -> tuple[list[str], dict[str, int]]:
    """Predict on the images that are not done.

    Returns:
        The problems of single images, and image with further pages → number of its pages.
    """
    todo = [job for job in jobs if _read(journal, job) is None]
    before = len(jobs) - len(todo)
    if before:
        were = "was" if len(jobs) == 1 else "were"
        log.info("%d of %s %s done before", before, counted(len(jobs), "image"), were)
    batches = [todo[at : at + batch_size] for at in range(0, len(todo), batch_size)]
    failed: list[str] = []
    pages: dict[str, int] = {}
    with progress("images", len(jobs), before) as advance:
        for number, outcome in enumerate(work(batches), start=1):
            for entry in outcome.entries:
                journal.add(entry)
            failed += outcome.failed
            pages |= outcome.pages
            done = min(before + number * batch_size, len(jobs))
            advance(done, f"({len(failed)} failed)")
    return failed, pages


def _read(journal: Journal, job: Job) -> Entry | None:
    """Return the entry of an image; None where it is not done, or its files had other names."""
    try:
        entry = journal.read(str(job.image), file_state(job.image))
    except FileNotFoundError:  # removed since it was listed
        return None
    names = job.file_name, job.name
    return entry if entry and (entry.get("file_name"), entry.get("name")) == names else None


def _write_tables(
    output: Path, journal: Journal, jobs: Sequence[Job], settings: Settings
) -> Summary:
    """Write the files of the whole run."""

    def entries() -> Iterator[tuple[int, Entry]]:
        for image_id, job in enumerate(jobs, start=1):
            if (entry := _read(journal, job)) is not None:
                yield image_id, entry

    prompts = settings.prompts or (VISUAL_PROMPT,)
    for kind in settings.save:
        if kind in TABLES:
            path, write = TABLES[kind]
            write(output / path, entries(), prompts)
    objects = full = 0
    best: tuple[float, str] | None = None
    for _, entry in entries():
        objects += len(entry["found"])
        full += len(entry["found"]) >= settings.max_detections
        score = entry["best_score"]
        if score is not None and (best is None or score > best[0]):
            best = score, entry["file_name"]
    return Summary(objects, full, best)


def _files(jobs: Sequence[Job], save: Sequence[str]) -> list[str]:
    """Return the paths of all files of the run, relative to the output folder."""
    tables = [TABLES[kind][0] for kind in save if kind in TABLES]
    patterns = [PER_IMAGE[kind].path for kind in save if kind in PER_IMAGE]
    return tables + [pattern.format(job.name) for pattern in patterns for job in jobs]


def _check_inputs(images: Sequence[Path], output: Path, files: Sequence[str]) -> None:
    """Raise UserError where an input image, or a file that no run made, would be lost."""
    check_no_links(output, files)
    _refuse(
        [
            f"--output-dir {output}: {file} holds {other}, which is no cutout; move it, or name "
            "another folder"
            for file in files
            if file.startswith(CUTOUTS)
            for other in foreign_cutouts(output / file)
        ]
    )
    inputs = {image.resolve() for image in images}
    _refuse(
        [
            f"--output-dir {output}: two images would both leave {file}; rename one of them"
            for file, count in Counter(files).items()
            if count > 1
        ]
        + [
            f"--output-dir {output}: {Path(file).name} is an input image; name another folder"
            for file in files
            if (output / file).exists() and (output / file).resolve() in inputs
        ]
    )


def _check_clear(
    images: Sequence[Path], output: Path, files: Sequence[str], earlier: Contents
) -> None:
    """Raise UserError where other results would be lost.

    That is a file that no earlier run of the same command made, or results of other images.
    """
    now = {str(image) for image in images}
    if others := [image for image in earlier.lines if image not in now]:
        rest = f" and {len(others) - 1} more" if len(others) > 1 else ""
        state = f"holds results of {others[0]}{rest}, not of these images"
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
def unwritable_is_user_error(output: Path) -> Iterator[None]:
    """Raise UserError, which names the file, instead of an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output-dir {output}: {error.filename or 'a file'} cannot be written "
            f"({error.strerror}). What is done is kept: mend it and run the same command again."
        ) from None


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as `sys.exit(143)` does: files are closed, processes ended."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
