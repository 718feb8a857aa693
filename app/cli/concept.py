"""`python -m app concept`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.options import DATA, OUTPUT, PROMPTS

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)


@cli.command()
def concept(
    *,
    examples: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="images with a few boxes of each class, as training reads them",
            rich_help_panel=DATA,
        ),
    ],
    checkpoint: options.Checkpoint,
    output: Annotated[
        Path, typer.Option(help="file to write, such as widget.concept", rich_help_panel=OUTPUT)
    ],
    words: Annotated[
        bool,
        typer.Option(
            "--words", help="read the class's name beside its boxes", rich_help_panel=PROMPTS
        ),
    ] = False,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Encode example boxes, so that a class is found in other images by them, without training."""
    from app.console import command, counted
    from app.errors import UserError
    from app.files import check_writable, exists_problem
    from app.inference import concepts

    if output.exists() and not overwrite:
        raise UserError(exists_problem(output, "is there already", option="--output"))
    check_writable(output.parent)
    from app.inference.encoding import encode, read_examples
    from app.inference.predictor import Predictor

    shown = read_examples(examples)
    found = encode(Predictor.load(checkpoint, device=device), shown, words=words)
    output.parent.mkdir(parents=True, exist_ok=True)
    concepts.write(output, found)
    for each in found:
        log.info(
            "'%s': %s, %s", each.name, counted(each.boxes, "box"), f"{each.tokens.nbytes} bytes"
        )
    log.info(
        "use it: %s",
        command(
            *("./infer.sh", "--checkpoint", checkpoint, "--concept", output),
            *("--input", shown.images[0].path.parent, "--prompt", found[0].name),
        ),
    )
