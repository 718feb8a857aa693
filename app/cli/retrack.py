"""`python -m app retrack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.options import DATA, MODEL, SCHEDULE

cli = typer.Typer(add_completion=False)


@cli.command()
def retrack(
    weights: Annotated[
        Path,
        typer.Argument(
            help="weights whose trunk was tuned; last: of the newest run",
            callback=options.last_weights,
        ),
    ],
    images: Annotated[
        str,
        typer.Option(
            help="images without labels: a folder, a quoted glob, or a .txt with a path a line",
            rich_help_panel=DATA,
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Meta's file that they began as, where it was moved", rich_help_panel=MODEL
        ),
    ] = None,
    updates: Annotated[
        int, typer.Option(min=1, help="of an image each", rich_help_panel=SCHEDULE)
    ] = 300,
    device: options.Device = "auto",
    seed: Annotated[
        int, typer.Option(help="of the order of the images", rich_help_panel=SCHEDULE)
    ] = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Teach the tracker of films to see through a tuned trunk, on images without labels."""
    from app.inference.inputs import find_images
    from app.model.weight_files import find_file

    find_file(weights)  # before torch is imported
    paths = find_images(images, "--images")
    from app.deploy.retracking import retrack as teach

    teach(
        weights,
        paths,
        base_file=base,
        updates=updates,
        device=device,
        seed=seed,
        overwrite=overwrite,
    )
