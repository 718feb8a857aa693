"""`python -m app ring`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated

import typer

from app import signals
from app.cli.options import SCHEDULE

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)


@cli.command()
def ring(
    settings: Annotated[Path, typer.Argument(metavar="ring.yaml", help="see docs/labelling.md")],
    *,
    watch: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="look for new labels again and again, until Ctrl-C",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
) -> None:
    """Propose, take what was corrected, train on from the champion, keep what is better."""
    from app.ring.settings import read_ring

    config = read_ring(settings)
    with signals.watch() as stop:
        from app.cli import training
        from app.files import claim
        from app.ring.report import write_report
        from app.ring.rounds import rounds, step

        config.folder.mkdir(parents=True, exist_ok=True)
        claim(config.folder)
        register = None
        if config.register_as is not None:
            from app.tracking.mlflow import track

            def register(folder: Path) -> None:
                track(folder, config.mlflow, config.register_as)

        while True:
            did = step(
                config,
                lambda request: training.train(request, stop),
                training.evaluate,
                register,
            )
            if did:
                log.info("rounds: %s", write_report(config.folder, rounds(config.folder)))
            elif watch is None:
                return
            if not did:
                time.sleep(watch or 0)
                stop.check()
