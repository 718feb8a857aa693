"""`python -m app data`: check, fix, build; films."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import options
from app.cli.options import DATA, OUTPUT
from app.errors import UserError

if TYPE_CHECKING:
    from app.datasets.faults import Fault

log = logging.getLogger("app")
cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Check a dataset, build a checked copy of it, or draw films.",
)


MaxDrop = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="most left out as faulty; 0.01 unless given"),
]


@cli.command()
@options.with_flags
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of labelled images")],
    *,
    format: Annotated[str, typer.Option(help="of DIR, decided by hand")] = "auto",
    output_dir: Annotated[Path, typer.Option(help="folder for dataset_report.html")] = Path(
        "outputs/data-check"
    ),
    max_drop: MaxDrop = None,
    labels: options.LabelFlags,
) -> None:
    """Find every fault of a dataset; exit 2 where it could not be trained on as it is."""
    from app.config.compose import load_config
    from app.datasets import checked_copy
    from app.datasets.faults import Action

    dataset = load_config(_overrides(labels, max_drop)).dataset
    checked_copy.require_apart(output_dir, folder)
    report = checked_copy.check(folder, format, dataset.reading)
    page = report.write(output_dir)
    show(report.faults)
    for line in report.lines():
        log.info("%s", line)
    for line in [*(f"note: {note}" for note in report.survey.notes), *report.counts()]:
        log.info("%s", line)
    log.info("report: %s", page)
    if refused := sum(fault.action is Action.REFUSED for fault in report.faults):
        raise UserError(f"{folder}: {refused} of the faults above must be mended by hand")
    if over := report.survey.tally.over(dataset.max_drop):
        raise UserError(over)
    log.info("%s: %s", folder, "can be trained on as it is" if report.survey.faults else "sound")


@cli.command()
@options.with_flags
def fix(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of labelled images")],
    *,
    output_dir: Annotated[Path, typer.Option(help="folder that the mended copy is written to")],
    overwrite: options.Overwrite = False,
    max_drop: MaxDrop = None,
    labels: options.LabelFlags,
) -> None:
    """Write a mended copy of a dataset; what needs a decision is decided by these flags."""
    from app.config.compose import load_config
    from app.datasets import checked_copy

    checked_copy.require_free(output_dir, overwrite=overwrite)
    checked_copy.require_apart(output_dir, folder)
    checked_copy.build(folder, output_dir, load_config(_overrides(labels, max_drop)))


def _overrides(labels: options.LabelFlags, max_drop: float | None) -> list[str]:
    flags = {"dataset.max_drop": max_drop, **labels.decisions()}
    return options.to_overrides(None, flags)


@cli.command()
@options.with_flags
def build(
    *,
    output_dir: Annotated[
        Path, typer.Option(help="folder that the dataset is written to", rich_help_panel=OUTPUT)
    ],
    overwrite: options.Overwrite = False,
    overrides: options.Overrides = None,
    source: options.SourceFlags,
    seed: Annotated[
        int | None, typer.Option(help="of splits that are made", rich_help_panel=DATA)
    ] = None,
    max_drop: MaxDrop = None,
) -> None:
    """Write a checked copy of a dataset: faults mended, splits made, images upright RGB."""
    from app.config.compose import load_config
    from app.datasets import checked_copy, sources

    unread = [text for text in overrides or [] if not text.startswith(("dataset.", "seed="))]
    if unread:
        raise UserError([f"'{text}': data build reads dataset.… and seed alone" for text in unread])
    flags = {**source.by_key(), "dataset.max_drop": max_drop, "seed": seed}
    config = load_config(options.to_overrides(overrides, flags))
    checked_copy.require_free(output_dir, overwrite=overwrite)
    folder = sources.fetch(config.dataset, config.seed)
    checked_copy.require_apart(output_dir, folder)
    checked_copy.build(folder, output_dir, config)


@cli.command()
def films(
    output_dir: Annotated[Path, typer.Option(help="folder that the films are written to")],
    count: Annotated[int, typer.Option("--films", help="how many")] = 20,
    frames: Annotated[int, typer.Option(help="of each film")] = 100,
    fps: Annotated[float, typer.Option(min=0.01, max=1000, help="frames a second")] = 20,
    width: Annotated[int, typer.Option(help="pixels")] = 320,
    height: Annotated[int, typer.Option(help="pixels")] = 240,
    seed: Annotated[int, typer.Option(help="the same films for the same seed")] = 0,
) -> None:
    """Draw films of shapes that move and cross, with exact masks and ids, as COCO-VID."""
    from app.datasets.synthetic.films import make_films

    make_films(
        output_dir, films=count, frames=frames, fps=fps, width=width, height=height, seed=seed
    )
    log.info("%s: %d films of %d frames", output_dir, count, frames)


def show(faults: Sequence[Fault]) -> None:
    """Print a table of the kinds of faults."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from app.console import plain
    from app.datasets.dataset_report import by_kind
    from app.datasets.faults import KINDS

    if not faults:
        return
    table = Table()
    for name, whole in (("kind", True), ("becomes", True), ("faults", True), ("first", False)):
        table.add_column(name, no_wrap=whole)
    table.add_column("how")
    for kind, group in by_kind(faults):
        outcome = KINDS[kind].outcome if kind in KINDS else group[0].remedy
        cells = (kind, group[0].action, str(len(group)), group[0].place, outcome)
        table.add_row(*(Text(plain(cell)) for cell in cells))
    Console().print(table)
