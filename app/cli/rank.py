"""`python -m app rank`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.options import DATA, OUTPUT

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)


@cli.command()
def rank(
    *,
    images: Annotated[
        str,
        typer.Option(
            help="images without labels: a folder, a quoted glob, or a .txt with a path a line",
            rich_help_panel=DATA,
        ),
    ],
    checkpoint: options.Checkpoint,
    top: Annotated[int, typer.Option(min=1, help="images to choose", rich_help_panel=DATA)] = 50,
    labelled: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="dataset that is labelled already: what is unlike it comes first, and its rare "
            "classes count more",
            rich_help_panel=DATA,
        ),
    ] = None,
    prompt: options.Classes = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="folder for the list and its page",
            show_default="a free outputs/rank, outputs/rank-2, …",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    device: options.Device = "auto",
) -> None:
    """Say which images to label next: of most doubt, and each unlike the others."""
    from app.errors import UserError
    from app.files import check_writable, free_folder
    from app.inference.inputs import check_prompts, find_images, root_of
    from app.model.weight_files import find_file

    folder = output_dir or free_folder(Path("outputs/rank"))
    check_writable(folder)
    if (folder / "rank.csv").exists():
        raise UserError(f"--output-dir {folder}: holds a list already; name another folder")
    paths = find_images(images, "--images")
    find_file(checkpoint)
    from app.datasets.build import survey
    from app.inference import ranking
    from app.inference.predictor import Predictor
    from app.inference.ranked_files import write

    known = None
    if labelled is not None:
        surveyed = survey(labelled)
        surveyed.require_sound(1.0)
        known = surveyed.splits["train"]
        there = {image.path.resolve() for image in known.images}
        paths = [path for path in paths if path.resolve() not in there]
    predictor = Predictor.load(checkpoint, device=device)
    names = check_prompts(prompt or predictor.prompts)
    seen, bad = ranking.look(predictor, paths, names)
    chosen = ranking.rank(
        seen,
        names,
        top,
        weights=ranking.weights_of(names, known),
        labelled=[] if known is None else ranking.features_of(predictor, known),
    )
    root = root_of(images).resolve()
    page = write(folder, chosen, predictor, names, root, str(checkpoint))
    for number, each in enumerate(chosen[:10], start=1):
        log.info("%3d  %.3f  %s (%s)", number, each.doubt, each.image.name, each.reason)
    log.info("%d of %d images: %s, and %s for --input", len(chosen), len(paths), page, "rank.txt")
    for problem in bad:
        log.warning("left out: %s", problem)
    if bad:
        raise typer.Exit(3)
