"""The command line: `python -m app train | infer | data`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.datasets import commands
from app.errors import UserError
from app.model.upstream import prove_pin

log = logging.getLogger("app")
cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach SAM 3 (Segment Anything with Concepts) to find your things.",
)
cli.add_typer(commands.cli, name="data")
SIZES = "sam3, small, nano, or auto: sam3 where a GPU and its weights are at hand, else nano"


@cli.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="any key of configs/train.yaml"),
    ] = None,
    dataset_dir: Annotated[
        str | None,
        typer.Option(help="folder or zip of labelled images; synthetic shapes where no source is"),
    ] = None,
    hf_dataset: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME[@REVISION]", help="from huggingface.co")
    ] = None,
    hf_config: Annotated[
        str | None, typer.Option(help="configuration of --hf-dataset, where it has several")
    ] = None,
    hf_split: Annotated[
        str | None, typer.Option(help="take this split of --hf-dataset alone")
    ] = None,
    roboflow: Annotated[
        str | None, typer.Option(metavar="WORKSPACE/PROJECT/VERSION", help="from Roboflow")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="image=A,objects=B", help="of --hf-dataset; see configs/train.yaml"),
    ] = None,
    format: Annotated[str | None, typer.Option(help="of --dataset-dir, decided by hand")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="train on so many images, chosen by the seed")
    ] = None,
    augmentation: Annotated[str | None, typer.Option(help="none, light or strong")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="YAML or JSON: class: prompt, or [prompt, synonym, …]")
    ] = None,
    model: Annotated[str, typer.Option(help=SIZES)] = "auto",
    checkpoint: Annotated[
        str | None,
        typer.Option(help="weights to start from: file, folder, or none for random ones"),
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="folder that the run leaves")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option(help="images a step and process")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="learning rate of the detector; the others keep their ratio"),
    ] = None,
    grad_accum: Annotated[int | None, typer.Option(help="steps averaged into one update")] = None,
    resolution: Annotated[int | None, typer.Option(help="pixels, square")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="processes to train with")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    eval_only: Annotated[bool, typer.Option("--eval-only", help="score, do not train")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint in --output-dir")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the run in --output-dir")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(help="a YAML of configs/recipe by its name, such as nano")
    ] = None,
    warm_start: Annotated[
        str | None, typer.Option(help="pixels: from random weights, the trunk learns these first")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML in our schema or in upstream's Trainer's")
    ] = None,
    use_base_config: Annotated[
        bool, typer.Option("--use-base-config", help="upstream's full fine-tuning, by its Trainer")
    ] = False,
) -> None:
    """Fine-tune SAM 3 on labelled images, or score weights on them (--eval-only)."""
    flags = {
        "transforms": augmentation,
        "dataset.dir": dataset_dir,
        "dataset.huggingface.name": hf_dataset,
        "dataset.huggingface.config": hf_config,
        "dataset.huggingface.split": hf_split,
        "dataset.huggingface.columns": columns,
        "dataset.roboflow": roboflow,
        "dataset.format": format,
        "dataset.prompts": prompts,
        "dataset.limit": limit,
        "training.warm_start.method": warm_start,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "training.grad_accum": grad_accum,
        "training.num_gpus": num_gpus,
        "model.resolution": resolution,
        "output_dir": output_dir,
        "checkpoint": checkpoint,
        "seed": seed,
    }
    asked = [f"{key}={value}" for key, value in flags.items() if value is not None]
    from app.training import start

    start.start(
        [*(overrides or []), *asked],
        file=config,
        recipe=recipe,
        size=model,
        lr=lr,
        base_config=use_base_config,
        eval_only=eval_only,
        resume=resume,
        overwrite=overwrite,
    )


@cli.command()
def infer(
    input: Annotated[
        str,
        typer.Option(help="an image, a folder, a quoted glob, or a .txt with a path a line"),
    ],
    checkpoint: Annotated[str, typer.Option(help="weights file or folder; none for random ones")],
    output_dir: Annotated[Path, typer.Option(help="folder for what is found")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="what to find; several; without any, the classes of the weights"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="file of prompts: a line each, or YAML as in training")
    ] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar="X,Y,W,H", help="example box in pixels; several")
    ] = None,
    negative_box: Annotated[
        list[str] | None, typer.Option(metavar="X,Y,W,H", help="box of what is not meant; several")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="least score")] = 0.5,
    max_detections: Annotated[int, typer.Option(min=1, help="an image, or a tile")] = 100,
    nms: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="IoU of masks above which the lower score goes"),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=32, help="pixels; cut larger images into such tiles")
    ] = None,
    overlap: Annotated[float, typer.Option(min=0, max=0.9, help="of neighbouring tiles")] = 0.2,
    save: Annotated[
        list[str] | None,
        typer.Option(
            help="overlay, coco, yolo, instances, semantic, cutouts, geojson, csv; several, or "
            "parted by commas  [default: overlay,coco]"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="size, for weights that do not say theirs")] = "auto",
    resolution: Annotated[int | None, typer.Option(help="pixels, square")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="images seen together")] = 1,
    num_gpus: Annotated[int, typer.Option(min=1, help="processes that share the images")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace earlier results")] = False,
) -> None:
    """Find what the prompts name in images; the same command again does what a stop left over."""
    from app.inference.folder import predict_folder
    from app.inference.settings import Settings, make_settings

    settings = Settings(
        checkpoint=checkpoint,
        prompts=tuple(prompt or ()),
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
    failed = predict_folder(
        input,
        output_dir,
        make_settings(
            settings,
            prompts_file=prompts,
            boxes=box or (),
            negative_boxes=negative_box or (),
            save=save or (),
        ),
        batch_size=batch_size,
        processes=num_gpus,
        overwrite=overwrite,
    )
    if failed:
        raise typer.Exit(3)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    handler: Any = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        prove_pin()
        cli()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}" if not problem.startswith(" ") else problem, file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:  # a loss that is not finite
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
