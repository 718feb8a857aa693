"""`python -m app serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.options import MODEL

# Panels of its help.
ADDRESS, LIMITS, WATCHING, VERSIONS = "Address", "Limits", "Watching", "Versions"
LABELLING = "Labelling"
cli = typer.Typer(add_completion=False)


@cli.command()
def serve(
    *,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="weights file or folder, or a folder that export has written; last: of the newest "
            "run; several: the first answers where a request names none",
            show_default="nano's",
            rich_help_panel=MODEL,
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="what requests call each of them",
            show_default="their folders",
            rich_help_panel=MODEL,
        ),
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="example boxes, encoded by python -m app concept, that requests ask for by name; "
            "several",
            rich_help_panel=MODEL,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="models:/NAME@ALIAS",
            help="registered weights, in place of --checkpoint; an alias is followed; several",
            rich_help_panel=VERSIONS,
        ),
    ] = None,
    mlflow: Annotated[
        str,
        typer.Option(
            help="address of the registry",
            show_default="$MLFLOW_TRACKING_URI, else outputs/mlflow.db",
            rich_help_panel=VERSIONS,
        ),
    ] = "auto",
    poll_seconds: Annotated[
        float,
        typer.Option(min=0.1, help="after which its aliases are read", rich_help_panel=VERSIONS),
    ] = 30.0,
    canary: Annotated[
        str | None,
        typer.Option(
            metavar="NAME@ALIAS=SHARE",
            help="answers a share of the requests that name no version, 0 to 1",
            rich_help_panel=VERSIONS,
        ),
    ] = None,
    shadow: Annotated[
        str | None,
        typer.Option(
            metavar="NAME@ALIAS",
            help="is asked the same as well, to be compared in /metrics",
            rich_help_panel=VERSIONS,
        ),
    ] = None,
    device: options.Device = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, fp32, bf16 or fp16", rich_help_panel=MODEL)
    ] = "auto",
    host: Annotated[
        str,
        typer.Option(
            help="address to listen at; beyond this machine, as at 0.0.0.0, with a key in the "
            "environment, SAM3_API_KEY, or --open",
            rich_help_panel=ADDRESS,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0: a free one", rich_help_panel=ADDRESS)
    ] = 8000,
    open: Annotated[
        bool,
        typer.Option(
            "--open", help="without a key, anyone who reaches it may ask", rich_help_panel=ADDRESS
        ),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="a name that it may be called by without a key, beside localhost and numbers",
            rich_help_panel=ADDRESS,
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="images that a GPU sees together", rich_help_panel=LIMITS)
    ] = 8,
    max_wait_ms: Annotated[
        float,
        typer.Option(min=0, help="that the first of them waits for others", rich_help_panel=LIMITS),
    ] = 5.0,
    num_gpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="processes of each model, with a GPU each or a share of the cores",
            rich_help_panel=LIMITS,
        ),
    ] = 1,
    queue: Annotated[
        int,
        typer.Option(
            min=16, help="images at work or waiting; more are refused", rich_help_panel=LIMITS
        ),
    ] = 64,
    cache_mb: Annotated[
        int,
        typer.Option(
            min=0, help="features of images seen before, MB a model", rich_help_panel=LIMITS
        ),
    ] = 512,
    max_mb: Annotated[
        int, typer.Option(min=1, help="MB of a request", rich_help_panel=LIMITS)
    ] = 64,
    max_megapixels: Annotated[
        int, typer.Option(min=1, max=128, help="of an image", rich_help_panel=LIMITS)
    ] = 64,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="seconds of an answer", rich_help_panel=LIMITS)
    ] = 60.0,
    session_minutes: Annotated[
        float,
        typer.Option(min=0.1, help="a session ends so long unasked", rich_help_panel=LIMITS),
    ] = 10.0,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="keep the images that the model is least sure of here, 200 at most, as a dataset "
            "to correct",
            show_default="none is kept",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    label: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="label the images of this folder in the page at /label; their labels are a COCO "
            "file beside them",
            show_default="none",
            rich_help_panel=LABELLING,
        ),
    ] = None,
    ring: Annotated[
        Path | None,
        typer.Option(
            metavar="ring.yaml",
            help="train on what is labelled, as python -m app ring does, at a button of that page, "
            "or as Label Studio asks for it",
            show_default="none",
            rich_help_panel=LABELLING,
        ),
    ] = None,
) -> None:
    """Answer requests over HTTP: an API, and a page for people. Ctrl-C or SIGTERM ends it."""
    import os

    from app.datasets.editing import LabelFile
    from app.errors import UserError
    from app.inference.concepts import read_all
    from app.serving.listening import check_address
    from app.serving.loading import Source, name_all, parse, split_share
    from app.serving.rounds import Ring
    from app.serving.settings import Limits, Settings
    from app.tracking.state import mlflow_uri

    # What is wrong with them is said before anything is loaded.
    labels = None if label is None else LabelFile(label)
    if model and (checkpoint or name):
        raise UserError("--model and --checkpoint, --name: give registered weights, or files")
    known_ring = None
    if ring is not None:
        from app.ring.settings import read_ring

        config = read_ring(ring)
        known_ring = Ring(ring.resolve(), config.every, config.label_studio)
    share = split_share(canary) if canary else None
    others = [share[0]] if share else []
    others += [shadow] if shadow else []
    # What canary and shadow name is loaded and followed as well.
    asked = [*(model or ()), *(each for each in others if model and "@" in each)]
    wanted = list(dict.fromkeys(parse(each) for each in asked))
    paths = [options.last_weights(Path(each)) for each in checkpoint or ()]
    settings = Settings(
        key=os.environ.get("SAM3_API_KEY") or None,
        hosts=tuple(each.lower() for each in allow_host or ()),
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        canary=share,
        shadow=shadow,
        mlflow=mlflow_uri(mlflow),
        poll_seconds=poll_seconds,
        label_studio=os.environ.get("LABEL_STUDIO_URL") or None,
        label_studio_key=os.environ.get("LABEL_STUDIO_API_KEY") or None,
        label=labels,
        ring=known_ring,
        limits=Limits(
            body_bytes=max_mb << 20,
            seconds=timeout,
            pixels=max_megapixels << 20,
            queue=queue,
            session_seconds=60 * session_minutes,
            cache_bytes=cache_mb << 20,
        ),
    )
    check_address(host, settings, open=open)
    # Registered weights are loaded as a source says that has no path yet.
    files = [(Path(), "")] if wanted else name_all(paths, name or ())
    read_all(concept or ())
    concepts = tuple(concept or ())
    sources = [
        Source(path, called, device=device, precision=precision, concepts=concepts)
        for path, called in files
    ]
    from app.serving.listening import run
    from app.serving.metrics import Figures

    keeper = None
    if keep is not None:
        from app.serving.keep import Keeper  # with it come the rooms that write datasets

        keeper = Keeper(keep)
    run(sources, wanted, settings, host, port, Figures(keeper), num_gpus)
