"""`python -m app compare`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.console import counted

if TYPE_CHECKING:
    from app.evaluation.compare import Comparison

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)


@cli.command()
def compare(
    run: Annotated[Path, typer.Argument(help="folder of a run or evaluation")],
    other: Annotated[Path, typer.Argument(help="another, on the same images")],
) -> None:
    """Print two runs' figures side by side, and what of their difference chance could explain."""
    from app.evaluation import compare as comparing

    comparison = comparing.compare(run, other)
    show(comparison, run, other)
    for line in comparison.settings:
        log.info("%s", line)


def show(comparison: Comparison, one: Path, other: Path) -> None:
    """Print a table of the figures of two runs, and of each class."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from app.console import plain
    from app.evaluation.compare import label

    log.info("first: %s", one)
    log.info("second: %s", other)
    table = Table()
    for heading in ("figure", "first", "second", "difference", "95 % interval"):
        table.add_column(Text(heading), overflow="fold")
    for line in comparison.lines:
        interval = "" if line.interval is None else "{:+.3f}…{:+.3f}".format(*line.interval)
        sure = " *" if line.is_sure else ""
        cells = (
            label(line.name),
            f"{line.one:.3f}",
            f"{line.other:.3f}",
            f"{line.difference:+.3f}",
        )
        table.add_row(*(Text(plain(cell)) for cell in (*cells, interval + sure)))
    Console(soft_wrap=True).print(table)
    log.info(
        "intervals: paired, of %s%s",
        counted(comparison.images, "image"),
        "; * leaves out 0" if any(line.is_sure for line in comparison.lines) else "",
    )
