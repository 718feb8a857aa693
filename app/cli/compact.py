"""`python -m app compact`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.options import DATA, MODEL, OUTPUT

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)
CUT = "What stays"


@cli.command()
@options.with_flags
def compact(
    *,
    checkpoint: options.Weights,
    overrides: options.Overrides = None,
    output_dir: Annotated[
        Path, typer.Option(help="folder for the smaller weights", rich_help_panel=OUTPUT)
    ],
    overwrite: options.Overwrite = False,
    to: Annotated[
        str | None,
        typer.Option(help="a size to cut down to: small or small-text", rich_help_panel=CUT),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            help="blocks of the trunk that stay: those that matter most", rich_help_panel=CUT
        ),
    ] = None,
    remove_blocks: Annotated[
        str | None,
        typer.Option(
            metavar="5,17-22|dart", help="instead: the blocks that go", rich_help_panel=CUT
        ),
    ] = None,
    mlp: Annotated[
        float | None,
        typer.Option(help="share of the MLPs' units that stays", rich_help_panel=CUT),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="heads that stay in each block", rich_help_panel=CUT)
    ] = None,
    width: Annotated[
        str,
        typer.Option(
            help="how units and heads are chosen: taylor (their part in the loss), activation (how "
            "much they say), or svd (a projection, to compare with)",
            rich_help_panel=CUT,
        ),
    ] = "taylor",
    text_layers: Annotated[int | None, typer.Option(help="that stay", rich_help_panel=CUT)] = None,
    encoder_layers: Annotated[
        int | None, typer.Option(help="of DETR, that stay", rich_help_panel=CUT)
    ] = None,
    decoder_layers: Annotated[
        int | None, typer.Option(help="of DETR, that stay", rich_help_panel=CUT)
    ] = None,
    queries: Annotated[
        int | None, typer.Option(help="of DETR, that stay", rich_help_panel=CUT)
    ] = None,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(
            help="store prompts in the text encoder's place, for deployment: classes for those of "
            "the weights, a file, or each prompt by its own --vocabulary",
            rich_help_panel=MODEL,
        ),
    ] = None,
    resolution: options.Resolution = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="images without labels to measure on: folder, file or glob", rich_help_panel=DATA
        ),
    ] = None,
    measure_on: Annotated[
        int, typer.Option(min=1, help="most images to measure on", rich_help_panel=DATA)
    ] = 16,
    source: options.SourceFlags,
) -> None:
    """Cut weights down to smaller ones, and say what each step removes, leaves and costs."""
    from app.compression.flags import CutFlags, check_width
    from app.files import check_writable
    from app.inference.inputs import find_images
    from app.model.weight_files import require_free

    given = options.to_overrides(overrides, source.by_key())
    by = check_width(width)  # this and what follows: before torch is imported
    options.check_paths([*given, f"checkpoint={checkpoint}"])
    require_free(output_dir, overwrite=overwrite)
    check_writable(output_dir)
    paths = None if images is None else find_images(images, "--images")
    from app.compression.compaction import compact as cut_down

    file = cut_down(
        checkpoint,
        output_dir,
        CutFlags(
            to=to,
            blocks=blocks,
            remove_blocks=remove_blocks,
            mlp=mlp,
            heads=heads,
            text_layers=text_layers,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            queries=queries,
            vocabulary=tuple(vocabulary or ()),
            resolution=resolution,
        ),
        given,
        by=by,
        images=paths,
        measure_on=measure_on,
        has_data=any(text.startswith("dataset.") for text in given),
        overwrite=overwrite,
    )
    log.info("weights: %s", file.parent)
