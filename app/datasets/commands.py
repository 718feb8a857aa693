"""`python -m app data …`: a dataset checked, or built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.cli import options
from app.config.compose import load_config
from app.config.schema import Config
from app.console import progress
from app.datasets import sources
from app.datasets.build import Splits, Survey, advise, decode, make_splits, many_classes, survey
from app.datasets.coco import Dataset
from app.datasets.dataset_report import REPORT, by_kind, render
from app.datasets.faults import KINDS, MAX_DROP, Action, Fault, counts_of, lines, notes
from app.datasets.writing import is_built, write_splits
from app.errors import UserError
from app.files import atomic_folder, exists_problem, write_text

log = logging.getLogger("app")
DropOption = Annotated[
    float,
    typer.Option(min=0, max=1, help="most images and annotations left out as faulty, 0 to 1"),
]
cli = typer.Typer(no_args_is_help=True, help="Check a dataset, or build a checked copy of it.")


@cli.command("check")
def check_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of labelled images")],
    format: Annotated[str, typer.Option(help="of DIR, decided by hand")] = "auto",
    output_dir: Annotated[Path, typer.Option(help=f"folder for {REPORT}")] = Path(
        "outputs/data-check"
    ),
    max_drop: DropOption = MAX_DROP,
) -> None:
    """Find every fault of a dataset; exit 2 where it could not be trained on as it is."""
    _check_apart(output_dir, folder)
    config = load_config()
    found = _survey(folder, format)
    faults = [*found.faults, *_advice(found, folder, config)]
    write_text(output_dir / REPORT, render(f"Dataset {folder}", found.splits, faults, found.notes))
    _show(faults)
    for line in lines(fault for _, group in by_kind(faults) for fault in group):
        log.info("%s", line)
    log.info("report: %s", output_dir / REPORT)
    refused = sum(fault.action is Action.REFUSED for fault in faults)
    over = found.tally.over(max_drop)
    if refused:
        raise UserError(f"{folder}: {refused} of the faults above must be mended by hand")
    if over:
        raise UserError(over)
    log.info("%s: %s", folder, "can be trained on as it is" if found.faults else "sound")


@cli.command("build")
def build_command(
    output_dir: Annotated[Path, typer.Option(help="folder that the dataset is written to")],
    overrides: options.Overrides = None,
    dataset_dir: options.DatasetDir = None,
    hf_dataset: options.HfDataset = None,
    hf_config: options.HfConfig = None,
    hf_split: options.HfSplit = None,
    columns: options.Columns = None,
    roboflow: options.Roboflow = None,
    format: options.Format = None,
    seed: Annotated[int | None, typer.Option(help="of splits that are made")] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0, max=1, help="most left out as faulty; 0.01 unless told")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a checked copy of a dataset: faults mended, splits made, images upright RGB."""
    flags = {
        **options.source(dataset_dir, hf_dataset, hf_config, hf_split, columns, roboflow, format),
        "dataset.max_drop": max_drop,
        "seed": seed,
    }
    unread = [text for text in overrides or [] if not text.startswith(("dataset.", "seed="))]
    if unread:
        raise UserError([f"'{text}': data build reads dataset.… and seed alone" for text in unread])
    config = load_config(options.asked(overrides, flags))
    _check_output(output_dir, overwrite)
    folder = sources.fetch(config.dataset, config.seed)
    _check_apart(output_dir, folder)
    build(folder, output_dir, config)


def build(folder: Path, output: Path, config: Config) -> Splits:
    """Write the dataset in `folder` to `output`, checked and mended, whole or not at all.

    Raises:
        UserError: with every problem, where mending would be guessing or would drop too much.
    """
    dataset = config.dataset
    found = _survey(folder, dataset.format)
    found.require_sound(dataset.max_drop)
    splits = make_splits(
        found,
        valid_fraction=dataset.valid_fraction,
        test_fraction=dataset.test_fraction,
        seed=config.seed,
    )
    advice = _advice_on(splits, folder, config)
    said = [*splits.notes, *notes(found.faults)]
    info = {"source": str(folder), "seed": config.seed, **counts_of(found.faults)}
    parts = _parts(splits)
    total = sum(len(part.images) for part in parts.values())
    try:
        with atomic_folder(output) as temporary, progress("writing: image", total) as advance:
            write_splits(splits, temporary, info, lambda done: advance(done, ""))
            page = render(f"Dataset {folder}", parts, [*found.faults, *advice], said)
            (temporary / REPORT).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output-dir {output}: cannot be written ({error})") from None
    for line in [*said, *(fault.remedy for fault in advice)]:
        log.info("note: %s", line)
    for name, part in parts.items():
        log.info("%s: %d images, %d objects", name, len(part.images), len(part.annotations))
    log.info("dataset: %s (see %s in it)", output, REPORT)
    log.info("train on it: ./train.sh --dataset-dir '%s'", output)
    return splits


def _survey(folder: Path, format: str) -> Survey:
    """Labels, headers, and then every image decoded whole."""
    found = survey(folder, format)
    total = sum(len(part.images) for part in found.splits.values())
    with progress("decoding: image", total) as advance:
        return decode(found, folder, lambda done: advance(done, ""))


def _parts(splits: Splits) -> dict[str, Dataset]:
    parts = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    return {name: part for name, part in parts.items() if part is not None}


def _advice(found: Survey, folder: Path, config: Config) -> list[Fault]:
    """Advice on the splits that are given, before any is made of them."""
    empty = Dataset((), (), ())
    train = found.splits.get("train", empty)
    given = Splits(train, found.splits.get("valid", empty), found.splits.get("test"), ())
    return _advice_on(given, folder, config) if train.images else []


def _advice_on(splits: Splits, folder: Path, config: Config) -> list[Fault]:
    return [*advise(splits, folder), *many_classes(splits.train, config.dataset.max_prompts)]


def _show(faults: Sequence[Fault]) -> None:
    """A table of the kinds that were found, on the terminal."""
    table = Table()
    for name, whole in (("kind", True), ("becomes", True), ("faults", True), ("first", False)):
        table.add_column(name, no_wrap=whole)
    table.add_column("how")
    for kind, group in by_kind(faults):
        outcome = KINDS[kind].outcome if kind in KINDS else group[0].remedy
        cells = (kind, group[0].action, str(len(group)), group[0].place, outcome)
        table.add_row(*(Text(cell) for cell in cells))
    if faults:
        Console().print(table)


def _check_apart(output: Path, source: Path) -> None:
    """Neither in the other: a report or a copy must not become part of the dataset."""
    one, other = output.resolve(), source.resolve()
    if one.is_relative_to(other):
        raise UserError(f"--output-dir {output}: lies in the dataset {source}; name another folder")
    if other.is_relative_to(one) and is_built(one):
        raise UserError(f"--output-dir {output}: holds the dataset {source}; name another folder")


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_built(output):
        raise UserError(
            f"--output-dir {output}: holds something other than a built dataset; name a new folder"
        )
    if not overwrite:
        raise UserError(exists_problem(output, "holds a dataset"))
