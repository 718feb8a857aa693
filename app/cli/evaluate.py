"""`python -m app evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app import signals
from app.cli import options
from app.cli.options import DATA, DETECTION, FILMS, OUTPUT
from app.errors import UserError

cli = typer.Typer(add_completion=False)


@cli.command()
@options.with_flags
def evaluate(
    *,
    overrides: options.Overrides = None,
    weights: options.ModelFlags,
    source: options.SourceFlags,
    split: Annotated[
        str, typer.Option(help="train, valid or test", rich_help_panel=DATA)
    ] = "valid",
    truth: Annotated[
        Path | None,
        typer.Option(help="COCO JSON, to score --predictions against", rich_help_panel=DATA),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="COCO results JSON, from anywhere; of --video COCO-VID", rich_help_panel=DATA
        ),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            metavar="TRUTH",
            help="films to follow: a COCO-VID JSON, its folder, or MOTChallenge's sequences",
            rich_help_panel=FILMS,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="what MOTChallenge's things are called",
            show_default="pedestrian",
            rich_help_panel=FILMS,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="score above which off-prompt firing is counted; of --video as infer's",
            show_default="0.5; of --video the weights' own",
            rich_help_panel=DETECTION,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="folder for figures and report",
            show_default="a free outputs/eval, outputs/eval-2, …",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Score weights on a dataset or films, or results from elsewhere; write a report."""
    from app.files import free_folder

    if video is None and prompt is not None:
        raise UserError("--prompt: is for --video")
    if video is not None:
        unread = {"truth": truth, **source.by_key()}
        if idle := options.to_overrides(overrides, unread):
            raise UserError(f"{', '.join(idle)}: nothing reads it beside --video")
        if (weights.checkpoint is None) == (predictions is None):
            raise UserError("--video: give either --checkpoint or --predictions beside it")
        from app.evaluation.video import score_video
        from app.inference.settings import Settings

        settings = Settings(
            checkpoint=str(weights.checkpoint),
            threshold=threshold,
            size=None if weights.model == "auto" else weights.model,
        )
        score_video(
            video,
            output_dir or free_folder(Path("outputs/eval")),
            settings=settings,
            tracks=predictions,
            prompt=prompt,
            overwrite=overwrite,
        )
        return
    if (truth is None) != (predictions is None):
        raise UserError("--truth and --predictions: give both of them, or --checkpoint")
    if truth is not None and predictions is not None:
        unread = {"checkpoint": weights.checkpoint, **source.by_key()}
        if idle := options.to_overrides(overrides, unread):
            raise UserError(f"{', '.join(idle)}: nothing reads it beside --truth and --predictions")
        from app.evaluation.score_files import score_files

        folder = output_dir or free_folder(Path("outputs/eval"))
        least = 0.5 if threshold is None else threshold
        score_files(truth, predictions, folder, threshold=least, overwrite=overwrite)
        return
    flags = {
        "checkpoint": weights.checkpoint,
        **source.by_key(),
        "evaluation.split": split,
        "prediction.threshold": threshold,
        "output_dir": output_dir,
    }
    given = options.to_overrides(overrides, flags)
    with signals.watch():
        from app.training.output_folder import check_folder

        if output_dir is not None:  # before torch is imported
            check_folder(output_dir, resume=None, overwrite=overwrite)
        options.check_paths(given)
        from app.cli import training
        from app.training.prepare import Request

        request = Request(
            given,
            size=weights.model,
            eval_only=True,
            overwrite=overwrite,
        )
        training.evaluate(request)
