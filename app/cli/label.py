"""`python -m app label`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.options import DETECTION, OUTPUT
from app.config.schema import ProposalForm

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)


@cli.command()
def label(
    *,
    input: options.Input,
    checkpoint: options.Checkpoint,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="new folder for the dataset",
            show_default="a free data/labelled, data/labelled-2, …",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    prompt: options.Classes = None,
    threshold: options.Threshold = None,
    max_detections: Annotated[
        int, typer.Option(min=1, help="an image", rich_help_panel=DETECTION)
    ] = 100,
    to: Annotated[
        ProposalForm,
        typer.Option(
            metavar="coco|labelme|label-studio",
            help="a dataset, or what a tool opens to correct it: LabelMe and X-AnyLabeling, or "
            "Label Studio",
            rich_help_panel=OUTPUT,
        ),
    ] = "coco",
    device: options.Device = "auto",
) -> None:
    """Make a dataset of images without labels: what weights find in them are its proposals."""
    from app.files import free_folder
    from app.inference import labelling

    bad = labelling.label(
        input,
        checkpoint,
        output_dir or free_folder(Path("data/labelled")),
        prompt or (),
        threshold=threshold,
        max_detections=max_detections,
        device=device,
        form=to,
    )
    for problem in bad:
        log.warning("left out: %s", problem)
    if bad:
        raise typer.Exit(3)
