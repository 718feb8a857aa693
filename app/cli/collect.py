"""`python -m app collect`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.options import DATA, OUTPUT

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)
SHOWN = 20  # images


@cli.command()
def collect(
    folder: Annotated[Path, typer.Argument(help="output folder of ./infer.sh --shards")],
    *,
    to: Annotated[
        str, typer.Option(help="coco, parquet or dataset", rich_help_panel=OUTPUT)
    ] = "coco",
    images: Annotated[
        str | None,
        typer.Option(help="of a dataset, which holds them: what --input was", rich_help_panel=DATA),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="file to write, or of a dataset the folder",
            show_default="coco.json in FOLDER",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Merge what shards have found, if all are done and each image is there once."""
    from app.scale.collect import BAD
    from app.scale.collect import collect as merge

    found = merge(folder, to, output, images=images, overwrite=overwrite)
    if found.bad:
        for name, problem in found.bad[:SHOWN]:
            log.error("bad: %s: %s", name, problem)
        log.error("%d images could not be read: %s", len(found.bad), found.file.parent / BAD)
        raise typer.Exit(3)
