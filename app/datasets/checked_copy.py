"""A dataset checked whole, and a checked copy of it written."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.config.compose import load_config
from app.config.reading import AS_WRITTEN, ReadingConfig
from app.config.schema import Config
from app.console import command, counted, progress
from app.datasets.build import Splits, Survey, advise, decode, make_splits, settings_advice, survey
from app.datasets.coco import Dataset
from app.datasets.dataset_report import REPORT, by_kind, render
from app.datasets.faults import Fault, counts_of, lines, notes
from app.datasets.writing import is_built, write_splits
from app.errors import UserError
from app.files import atomic_folder, exists_problem, write_text

log = logging.getLogger("app")
SHOWN = 20  # classes in the line of a split


@dataclass(frozen=True)
class Check:
    """Hold what a dataset's check came to.

    Attributes:
        folder: of the dataset.
        survey: its splits and what is wrong with them.
        faults: those of the survey, and advice on the splits.
    """

    folder: Path
    survey: Survey
    faults: tuple[Fault, ...]

    def write(self, folder: Path) -> Path:
        """Write the report to a folder; return its file."""
        title = f"Dataset {self.folder}"
        page = render(title, self.survey.splits, self.faults, self.survey.notes)
        write_text(folder / REPORT, page)
        return folder / REPORT

    def lines(self) -> list[str]:
        """Return a line for each fault, kind by kind; of many of a kind, the first ones."""
        return list(lines(fault for _, group in by_kind(self.faults) for fault in group))

    def counts(self) -> list[str]:
        """Return a line for each split: its images, its objects, and those of each class."""
        told = []
        for name, dataset in self.survey.splits.items():
            objects = Counter(annotation.category_id for annotation in dataset.annotations)
            classes = [f"{c.name} {objects[c.id]}" for c in dataset.categories]
            more = [f"{len(classes) - SHOWN} more"] if len(classes) > SHOWN else []
            told.append(
                f"{name}: {counted(len(dataset.images), 'image')}, "
                f"{counted(objects.total(), 'object')}: {', '.join([*classes[:SHOWN], *more])}"
            )
        return told


def check(folder: Path, format: str, reading: ReadingConfig = AS_WRITTEN) -> Check:
    """Read a dataset, decode every image, and collect faults and advice.

    Args:
        format: of the labels, or auto.
        reading: what the user decided.

    Raises:
        UserError: the folder holds no dataset.
    """
    surveyed = _survey_whole(folder, format, reading)
    empty = Dataset((), (), ())
    train = surveyed.splits.get("train", empty)
    valid, test = surveyed.splits.get("valid", empty), surveyed.splits.get("test")
    # Advice on the splits that are given, before any is made of them.
    given = Splits(train, valid, test, ())
    advice = _advice(given, folder, load_config(), surveyed.faults) if train.images else []
    return Check(folder, surveyed, (*surveyed.faults, *advice))


def build(folder: Path, output: Path, config: Config) -> Splits:
    """Write the dataset in `folder` to `output`, checked and mended, whole or not at all.

    Raises:
        UserError: with every problem, where mending would be guessing or would drop too much.
    """
    dataset, replace = config.dataset, output.exists()  # of an earlier build: `require_free`
    surveyed = _survey_whole(folder, dataset.format, dataset.reading)
    surveyed.require_sound(dataset.max_drop)
    splits = make_splits(
        surveyed,
        valid_fraction=dataset.valid_fraction,
        test_fraction=dataset.test_fraction,
        pattern=dataset.group,
        seed=config.seed,
    )
    advice = _advice(splits, folder, config, surveyed.faults)
    all_notes = [*splits.notes, *notes(surveyed.faults)]
    info = {"source": str(folder), "seed": config.seed, **counts_of(surveyed.faults)}
    named = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    parts = {name: part for name, part in named.items() if part is not None}
    total = sum(len(part.images) for part in parts.values())
    try:
        with (
            atomic_folder(output, replace=replace) as temporary,
            progress("writing: image", total) as advance,
        ):
            write_splits(splits, temporary, info, lambda done: advance(done, ""))
            page = render(f"Dataset {folder}", parts, [*surveyed.faults, *advice], all_notes)
            (temporary / REPORT).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output-dir {output}: cannot be written ({error})") from None
    for line in [*all_notes, *(fault.remedy for fault in advice)]:
        log.info("note: %s", line)
    for name, part in parts.items():
        log.info("%s: %d images, %d objects", name, len(part.images), len(part.annotations))
    log.info("dataset: %s (see %s in it)", output, REPORT)
    log.info("train on it: %s", command("./train.sh", "--dataset-dir", output))
    return splits


def _survey_whole(folder: Path, format: str, reading: ReadingConfig) -> Survey:
    """Read labels and headers, and then decode every image whole."""
    surveyed = survey(folder, format, reading)
    total = sum(len(part.images) for part in surveyed.splits.values())
    with progress("decoding: image", total) as advance:
        return decode(surveyed, folder, lambda done: advance(done, ""))


def _advice(splits: Splits, folder: Path, config: Config, faults: Sequence[Fault]) -> list[Fault]:
    return [*advise(splits, folder, faults), *settings_advice(splits, config)]


def require_apart(output: Path, source: Path) -> None:
    """Raise a UserError where one folder lies in the other.

    A report or a copy must not become part of the dataset.
    """
    one, other = output.resolve(), source.resolve()
    if one.is_relative_to(other):
        raise UserError(f"--output-dir {output}: lies in the dataset {source}; name another folder")
    if other.is_relative_to(one) and is_built(one):
        raise UserError(f"--output-dir {output}: holds the dataset {source}; name another folder")


def require_free(output: Path, *, overwrite: bool) -> None:
    """Raise a UserError where a folder holds something else, or a dataset without `overwrite`."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_built(output):
        raise UserError(
            f"--output-dir {output}: holds something other than a built dataset; name a new folder"
        )
    if not overwrite:
        raise UserError(exists_problem(output, "holds a dataset"))
