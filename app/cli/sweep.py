"""`python -m app sweep`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from app import signals
from app.cli import options
from app.cli.options import CLUSTER, OUTPUT
from app.errors import UserError

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)
ASKING = ("status", "table")


@cli.command()
@options.with_flags
def sweep(
    *,
    what: Annotated[
        str,
        typer.Argument(
            metavar="FILE|FOLDER|status|table",
            help="YAML (docs/sweeps.md); the folder of a sweep that is to go on; or what to tell "
            "of one",
        ),
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="of the sweep to tell of")
    ] = None,
    flags: options.SweepFlags,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="folder of the sweep; again: what is left",
            show_default="outputs/NAME of the file",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="make this one alone, from 0; auto: by SLURM_ARRAY_TASK_ID or "
            "JOB_COMPLETION_INDEX",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="slurm: one array of jobs; kubernetes: an Indexed Job (keys: cluster.*)",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
) -> None:
    """Train over settings, datasets and seeds; again: what is left."""
    from app.cli import sweeping

    if what in ASKING:
        if folder is None:
            raise UserError(f"python -m app sweep {what} FOLDER: name the sweep's folder")
        sweeping.tell(folder, whole=what == "table")
        return
    if folder is not None:
        raise UserError(f"{folder}: only status and table take a folder beside them")
    with signals.watch() as stop:
        sweeping.start(Path(what), output_dir, flags, stop, cell=cell, cluster=cluster)
