"""`python -m app report`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)


@cli.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a finished run or evaluation")],
) -> None:
    """Write a run's report.html anew, from what its folder holds."""
    from app.evaluation.report_page import write_report

    log.info("report: %s", write_report(run))
