"""`python -m app track`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)


@cli.command()
def track(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="[=URI]",
            help="server or store; MLFLOW_TRACKING_URI unless given, or else outputs/mlflow.db",
        ),
    ] = None,
    register: Annotated[
        str | None, typer.Option(help="name in the model registry that the best weights get")
    ] = None,
) -> None:
    """Send to MLflow what it has not of a run: after a server was down, or for the first time."""
    from app.tracking.contents import check_contents

    check_contents(run)  # before MLflow is imported, which takes seconds
    from app.tracking import mlflow as tracking
    from app.tracking.state import registered

    uri, state = tracking.track(run, mlflow or "auto", register)
    log.info("MLflow: run %s at %s", state.run_id, uri)
    if state.version:
        log.info("%s", registered(state))
    if not state.complete:
        log.warning("not all was sent: %s", state.problem)
        raise typer.Exit(3)
