"""Images on disk → their detections on disk; after a stop the same call does what is left."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.console import duration, progress
from app.errors import UserError
from app.files import check_no_links, exists_problem
from app.inference.batch import Job, OpenWork, Work
from app.inference.inputs import find_images, output_names
from app.inference.journal import Contents, Entry, Journal, read_contents
from app.inference.outputs import PER_IMAGE, foreign_cutouts
from app.inference.settings import Settings
from app.inference.tables import TABLES
from app.model.vocabulary import VISUAL_PROMPT

log = logging.getLogger("app")
SHOWN = 20  # files that are in the way
CUTOUTS = PER_IMAGE["cutouts"].path.format("")


def predict_folder(
    source: str,
    output: Path,
    settings: Settings,
    open_work: OpenWork,
    *,
    batch_size: int = 1,
    processes: int = 1,
    overwrite: bool = False,
) -> list[str]:
    """Predict on every image that `source` stands for; see `python -m app infer --help`.

    Each image that is done is noted in a journal, so the same call after a stop does the rest.

    Args:
        open_work: opens what predicts: `worker.open_work` in torch, or that of an exported folder.

    Returns:
        The problems of single images: one bad image costs only itself.

    Raises:
        UserError: a problem of the whole, before anything is written; or no image could be done.
    """
    # Absolute, because the same relative path in another folder is another image.
    images = [image.absolute() for image in find_images(source)]
    jobs = [Job(*pair) for pair in zip(images, output_names(images), strict=True)]
    files = _files(jobs, settings.save)
    _check_inputs(images, output, files)
    earlier = read_contents(output)
    if not overwrite:
        _check_clear(source, images, output, files, earlier)
    begun = time.monotonic()
    with (
        ended_by_sigterm(),
        open_work(settings, output, processes) as (work, precision),
        unwritable_is_user_error(output),
        Journal(output, settings.identity(), overwrite=overwrite) as journal,
    ):
        if not overwrite and journal.earlier != earlier:  # another run has been at work meanwhile
            _check_clear(source, images, output, files, journal.earlier)
        journal.begin(files)
        failed = _do_what_is_left(jobs, work, journal, batch_size)
        if not len(journal):
            raise UserError(failed)
        objects = _write_tables(output, journal, images, settings)
    for problem in failed:
        log.error("failed: %s", problem)
    log.info(
        "%d of %d images, %d objects, in %s and %s: %s",
        *(len(images) - len(failed), len(images), objects),
        *(duration(time.monotonic() - begun), precision, output),
    )
    return failed


def _do_what_is_left(
    jobs: Sequence[Job], work: Work, journal: Journal, batch_size: int
) -> list[str]:
    """Predict on the images that are not done; return the problems of single ones."""
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


def _write_tables(
    output: Path, journal: Journal, images: Sequence[Path], settings: Settings
) -> int:
    """Write the files of the whole run; return the number of objects."""

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
            f"--output-dir {output}: {Path(file).name} is an input image; name another folder"
            for file in files
            if (output / file).exists() and (output / file).resolve() in inputs
        ]
    )


def _check_clear(
    source: str, images: Sequence[Path], output: Path, files: Sequence[str], earlier: Contents
) -> None:
    """Raise UserError where other results would be lost.

    That is a file that no earlier run of the same command made, or results of other images.
    """
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
