"""`python -m app curve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app import signals
from app.cli import options
from app.cli.options import DATA, OUTPUT, SCHEDULE
from app.config.schema import PlanKind
from app.errors import UserError

cli = typer.Typer(add_completion=False)


@cli.command()
@options.with_flags
def curve(
    *,
    overrides: options.Overrides = None,
    source: options.SourceFlags,
    weights: options.ModelFlags,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…",
            help="numbers of training images",
            show_default="1,3,10,30,… and all",
            rich_help_panel=DATA,
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="runs of each number", rich_help_panel=SCHEDULE)
    ] = 3,
    more: Annotated[
        int, typer.Option(min=1, help="labels whose gain is foretold", rich_help_panel=SCHEDULE)
    ] = 20,
    plan: Annotated[
        PlanKind | None,
        typer.Option(
            metavar="", help="do not train: measure what it would cost", rich_help_panel=SCHEDULE
        ),
    ] = None,
    output_dir: Annotated[
        Path,
        typer.Option(help="folder of the runs; again: what is left", rich_help_panel=OUTPUT),
    ] = Path("outputs/curve"),
) -> None:
    """Train on few and on more of the images, to see what further labels would bring."""
    flags = {"checkpoint": weights.checkpoint, **source.by_key()}
    given = options.to_overrides(overrides, flags)
    try:
        wanted = [int(size) for size in sizes.split(",")] if sizes else []
    except ValueError:
        wanted = [0]
    if any(size < 1 for size in wanted):
        raise UserError(f"--sizes {sizes}: must be numbers of images, such as 1,3,10,30")
    with signals.watch() as stop:
        options.check_paths(given)
        from app.cli.training import train
        from app.planning.curve import Wanted, draw_curve

        asked = Wanted(tuple(given), weights.model, tuple(wanted), seeds, more, output_dir)
        draw_curve(asked, None if plan else lambda request: train(request, stop))
