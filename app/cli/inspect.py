"""`python -m app inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.console import plain

cli = typer.Typer(add_completion=False)


@cli.command()
def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="file or folder of any tool's weights; last: of the newest run",
            callback=options.last_weights,
        ),
    ],
) -> None:
    """Tell what a checkpoint is, what loads it, and what is missing or unexpected."""
    from app.model.inspection import inspect as look

    for line in look(checkpoint).lines():
        print(plain(line))
