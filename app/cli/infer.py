"""`python -m app infer`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from app import signals
from app.cli import options
from app.cli.options import DETECTION, FILMS, MANY, MODEL, OUTPUT, PROMPTS
from app.errors import UserError

cli = typer.Typer(add_completion=False)


@cli.command()
def infer(
    *,
    input: Annotated[
        str,
        typer.Option(
            help="an image or a film, a folder, a quoted glob, or a .txt with a path a line; "
            "camera:0 or the address of an RTSP stream",
            rich_help_panel=options.DATA,
        ),
    ],
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
            "top; of films video, gif, youtube-vis and mot as well",
            show_default="overlay,coco; of films video,coco,mot,csv",
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
    track: Annotated[
        bool,
        typer.Option("--track", help="the images are the frames of a film", rich_help_panel=FILMS),
    ] = False,
    every: Annotated[
        int, typer.Option(min=1, help="take each second frame, third, …", rich_help_panel=FILMS)
    ] = 1,
    begin: Annotated[
        str | None,
        typer.Option("--from", metavar="TIME", help="as 10 or 1:30", rich_help_panel=FILMS),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option("--to", metavar="TIME", help="as 20 or 1:40", rich_help_panel=FILMS),
    ] = None,
    fill_gaps: Annotated[
        bool,
        typer.Option(
            "--fill-gaps",
            help="put a track where it was between two places, at most a second apart",
            rich_help_panel=FILMS,
        ),
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            help="own: detections joined to tracks; hf, sam3: the tracker of SAM 3, of a folder "
            "that export --format hf --video or --format sam3 made",
            rich_help_panel=FILMS,
        ),
    ] = "own",
    fps: Annotated[
        float,
        typer.Option(min=0.01, max=1000, help="frames a second of --track", rich_help_panel=FILMS),
    ] = 25,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="pieces that the images are done in, by their names",
            rich_help_panel=MANY,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="do this one alone; auto: by SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX",
            rich_help_panel=MANY,
        ),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="slurm or kubernetes: a job a shard", rich_help_panel=MANY)
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="jobs that run together", rich_help_panel=MANY)
    ] = None,
    cluster_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="of cluster.* in train.yaml; several", rich_help_panel=MANY
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="of an hour of this machine: tell what a million costs",
            rich_help_panel=MANY,
        ),
    ] = None,
) -> None:
    """Find what the prompts name in images, and follow it in films; again: what a stop left."""
    from app.cli import scaling
    from app.cli.scaling import Scale
    from app.files import free_folder
    from app.inference.films import is_film
    from app.inference.folder import list_jobs, predict_folder
    from app.inference.following import ENGINES, follow_films, list_films, read_following
    from app.inference.settings import RANDOM, SAVES, Settings, make_settings, with_defaults
    from app.inference.track_files import TRACK_DEFAULTS, TRACK_SAVES
    from app.model.weight_files import find_file
    from app.scale.sources import KINDS, is_many

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
    split = Scale(shards, shard, cluster, at_once, cluster_option or (), price)
    many = is_many(input) and not is_film(input)
    if split.is_asked or many or {*KINDS} & {*_parted(save)}:
        given: dict[str, object] = {"--track": track, "--box": box, "--negative-box": negative_box}
        given |= {"--tile": tile, "--overwrite": overwrite, "--every": every > 1}
        given |= {"--from": begin, "--to": end, "--fill-gaps": fill_gaps}
        if unread := [flag for flag, value in given.items() if value]:
            raise UserError([f"{flag}: is not for images by the million" for flag in unread])
        settings = replace(settings, save=KINDS[:1])
        settings = make_settings(
            settings,
            prompts_file=prompts,
            boxes=(),
            negative_boxes=(),
            save=save or (),
            kinds=KINDS,
        )
        if checkpoint != RANDOM:
            find_file(Path(checkpoint))
        with signals.watch() as stop:
            scaling.start(
                input,
                output_dir or free_folder(Path("outputs/infer")),
                with_defaults(settings),
                split,
                stop,
                batch_size=batch_size,
                processes=num_gpus,
            )
        return
    follows = track or is_film(input)
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: there is {', '.join(ENGINES)}")
    if engine != "own" and not follows:
        raise UserError("--engine: is for films; with --track images are frames of one")
    if engine != "own":
        given = {"--box": box, "--negative-box": negative_box}
        given |= {"--examples": examples, "--concept": concept, "--tile": tile, "--nms": nms}
        given["--fill-gaps"] = fill_gaps
        if unread := [flag for flag, value in given.items() if value]:
            raise UserError([f"{flag}: --engine {engine} does not read it" for flag in unread])
    if follows:
        settings = replace(settings, save=TRACK_DEFAULTS)
    following = read_following(
        *(follows, every, begin, end),
        fill=fill_gaps,
        overwrite=overwrite,
        batch_size=batch_size,
        engine=engine,
    )
    settings = make_settings(
        settings,
        prompts_file=prompts,
        boxes=box or (),
        negative_boxes=negative_box or (),
        save=save or (),
        kinds=TRACK_SAVES if follows else SAVES,
    )
    output = output_dir or free_folder(Path("outputs/infer"))
    if follows:
        if num_gpus > 1:
            raise UserError("--num-gpus: is for images; a film is followed by one process")
        films = list_films(input, output, settings.save, fps=fps, overwrite=overwrite)
        if checkpoint != RANDOM:
            find_file(Path(checkpoint))
        settings = with_defaults(settings)
        if engine == "own":
            from app.inference.worker import load_predictor  # torch: where there is work to do

            finder: Any = load_predictor(settings)
            finder.check_length(settings.prompts)
        elif engine == "hf":
            from app.inference import propagation

            finder = propagation.propagating(settings)
        else:
            from app.inference import upstream_propagation

            finder = upstream_propagation.propagating(settings)
        if follow_films(films, output, settings, following, finder):
            raise typer.Exit(3)
        return
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


def _parted(save: list[str] | None) -> list[str]:
    """Return the kinds of --save, which may be parted by commas."""
    return [kind for text in save or () for kind in text.split(",")]
