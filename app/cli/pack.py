"""`python -m app pack`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)


@cli.command()
def pack(
    weights: options.Weights,
    output_dir: Annotated[Path, typer.Option(help="folder for the packed ones")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="weights that these were tuned from: the mean of both is packed, which forgets "
            "less of what they knew",
            show_default="none",
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="of the tuned ones in that mean")
    ] = 0.75,
) -> None:
    """Write weights as float16: half as large, with their SHA-256 beside."""
    from app.model import bundled

    log.info("packed: %s", bundled.pack(weights, output_dir, base, share))
