"""`python -m app merge`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)


@cli.command()
def merge(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="folder of a LoRA, such as RUN/weights/best; last: of the newest run",
            callback=options.last_weights,
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option(help="folder for model.safetensors", rich_help_panel=options.OUTPUT)
    ],
    overwrite: options.Overwrite = False,
) -> None:
    """Join a LoRA with its base into plain weights."""
    from app.files import check_writable
    from app.model.weight_files import require_adapter, require_free

    require_adapter(adapter)  # before torch is imported
    require_free(output_dir, overwrite=overwrite)
    check_writable(output_dir)
    from app.evaluation.model_card import write_merged_card
    from app.model import weights

    folder = weights.merge(adapter, output_dir, overwrite=overwrite).parent
    write_merged_card(adapter, folder)
    log.info("weights: %s", folder)
