"""`python -m app infer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.options import DETECTION, MODEL, OUTPUT, PROMPTS

cli = typer.Typer(add_completion=False)


@cli.command()
def infer(
    *,
    input: options.Input,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="weights file or folder; last: of the newest run; none: random ones",
            callback=options.last_weights,
            rich_help_panel=MODEL,
        ),
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="folder for what is found",
            show_default="a free outputs/infer, outputs/infer-2, …",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="what to find; several; without any, the classes of the weights",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="file of prompts: a line each, or YAML as in training", rich_help_panel=PROMPTS
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y,W,H", help="example box in pixels; several", rich_help_panel=PROMPTS
        ),
    ] = None,
    negative_box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y,W,H",
            help="box of what is not meant; several",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="a dataset of a few boxes: its classes are found by these, without words",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="such examples, encoded by python -m app concept; several",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    threshold: options.Threshold = None,
    max_detections: Annotated[
        int, typer.Option(min=1, help="an image, or a tile", rich_help_panel=DETECTION)
    ] = 100,
    nms: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="IoU of masks above which the lower score goes",
            rich_help_panel=DETECTION,
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=32, help="pixels; cut larger images into such tiles", rich_help_panel=DETECTION
        ),
    ] = None,
    overlap: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="of neighbouring tiles", rich_help_panel=DETECTION),
    ] = 0.2,
    save: Annotated[
        list[str] | None,
        typer.Option(
            help="overlay, coco, yolo, instances, semantic, cutouts, geojson, csv; several, or "
            "parted by commas; instances and semantic hold one value a pixel, the higher score on "
            "top",
            show_default="overlay,coco",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    model: options.Size = "auto",
    resolution: options.Resolution = None,
    device: options.Device = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, fp32, bf16 or fp16", rich_help_panel=MODEL)
    ] = "auto",
    batch_size: Annotated[
        int, typer.Option(min=1, help="images seen together", rich_help_panel=DETECTION)
    ] = 1,
    num_gpus: Annotated[
        int,
        typer.Option(min=1, help="processes that share the images", rich_help_panel=DETECTION),
    ] = 1,
) -> None:
    """Find what the prompts name in images; again with the same --output-dir: what a stop left."""
    from app.files import free_folder
    from app.inference.folder import list_jobs, predict_folder
    from app.inference.settings import RANDOM, Settings, make_settings, with_defaults
    from app.model.weight_files import find_file

    settings = Settings(
        checkpoint=checkpoint,
        prompts=tuple(prompt or ()),
        concepts=tuple(concept or ()),
        examples=examples,
        threshold=threshold,
        max_detections=max_detections,
        nms=nms,
        tile=tile,
        overlap=overlap,
        size=None if model == "auto" else model,
        resolution=resolution,
        device=device,
        precision=precision,
    )
    settings = make_settings(
        settings,
        prompts_file=prompts,
        boxes=box or (),
        negative_boxes=negative_box or (),
        save=save or (),
    )
    output = output_dir or free_folder(Path("outputs/infer"))
    jobs = list_jobs(input, output, settings.save, overwrite=overwrite)
    if checkpoint != RANDOM:
        find_file(Path(checkpoint))
    from app.inference.worker import open_work  # torch: only where there is something to do

    failed = predict_folder(
        jobs,
        output,
        with_defaults(settings),
        open_work,
        batch_size=batch_size,
        processes=num_gpus,
        overwrite=overwrite,
    )
    if failed:
        raise typer.Exit(3)
