"""The command line: `python -m app train`, `infer`, `evaluate`, `data` and the others."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from app import signals
from app.cli import options
from app.config.schema import PlanKind, Resume
from app.console import log_to_stdout, show_problems
from app.datasets import commands
from app.errors import UserError
from app.model.upstream.pin import prove_pin

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
    overrides: options.Overrides = None,
    dataset_dir: options.DatasetDir = None,
    hf_dataset: options.HfDataset = None,
    hf_config: options.HfConfig = None,
    hf_split: options.HfSplit = None,
    columns: options.Columns = None,
    roboflow: options.Roboflow = None,
    format: options.Format = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="train on so many images, chosen by the seed")
    ] = None,
    augmentation: Annotated[str | None, typer.Option(help="none, light or strong")] = None,
    method: Annotated[
        str | None, typer.Option(help="full, head, lora-minimal, lora or lora-full")
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            metavar="PART,…",
            help="not trained: vision, text, detector, geometry, masks, scoring; or none of them",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="YAML or JSON: class: prompt, or [prompt, synonym, …]")
    ] = None,
    model: Annotated[str, typer.Option(help=SIZES)] = "auto",
    checkpoint: Annotated[
        str | None,
        typer.Option(help="weights to start from: file, folder, or none for random ones"),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="weights of any size to learn from as well (keys: distill.* in train.yaml)"
        ),
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="folder that the run leaves")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="images a step and process; auto: the most that fit")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="learning rate of the detector; the others keep their ratio"),
    ] = None,
    grad_accum: Annotated[int | None, typer.Option(help="steps averaged into one update")] = None,
    resolution: Annotated[int | None, typer.Option(help="pixels, square")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="processes to train with")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="slurm: hand the run to it (keys: cluster.* in train.yaml)")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="machines, with --cluster slurm")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    eval_only: Annotated[bool, typer.Option("--eval-only", help="score, do not train")] = False,
    split: Annotated[
        str | None, typer.Option(help="what --eval-only scores: train, valid or test")
    ] = None,
    plan: Annotated[
        PlanKind | None,
        typer.Option(
            metavar="[=measure]",
            help="do not train: print what it would take in memory and disk, and refuse what does "
            "not fit; measure: the time too, by a few updates",
        ),
    ] = None,
    resume: Annotated[
        Resume | None,
        typer.Option(
            metavar="[=auto|weights]",
            help="go on from the newest checkpoint in --output-dir; auto: if there is one; "
            "weights: from its weights alone, with other data or settings",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    recipe: Annotated[
        str | None,
        typer.Option(help="auto: by the number of images; or a YAML of configs/recipe by its name"),
    ] = None,
    warm_start: Annotated[
        str | None, typer.Option(help="pixels: from random weights, the trunk learns these first")
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="[=URI]",
            help="send figures, files and weights to MLflow too: at MLFLOW_TRACKING_URI, or else "
            "in outputs/mlflow.db",
        ),
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(help="name in MLflow's model registry that the best weights get"),
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
        "method": method,
        "method.freeze": None if freeze is None else f"[{'' if freeze == 'none' else freeze}]",
        **options.source(dataset_dir, hf_dataset, hf_config, hf_split, columns, roboflow, format),
        "dataset.prompts": prompts,
        "dataset.limit": limit,
        "training.warm_start.method": warm_start,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "training.grad_accum": grad_accum,
        "training.num_gpus": num_gpus,
        "cluster.name": cluster,
        "cluster.nodes": nodes,
        "tracking.mlflow": mlflow,
        "tracking.register_as": register,
        "model.resolution": resolution,
        "output_dir": output_dir,
        "checkpoint": checkpoint,
        "distill.teacher": teacher,
        "evaluation.split": split,
        "seed": seed,
    }
    with signals.watch() as stop:
        from app.cli import training as start

        start.start(
            options.asked(overrides, flags),
            size=model,
            stop=stop,
            file=config,
            recipe=recipe,
            lr=lr,
            base_config=use_base_config,
            eval_only=eval_only,
            plan=plan,
            resume=resume,
            overwrite=overwrite,
        )


@cli.command()
def infer(
    input: options.Input,
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
    threshold: options.Threshold = None,
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
            "parted by commas; instances and semantic hold one value a pixel, the higher score on "
            "top  [default: overlay,coco]"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="size, for weights that do not say theirs")] = "auto",
    resolution: Annotated[int | None, typer.Option(help="pixels, square")] = None,
    device: options.Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="images seen together")] = 1,
    num_gpus: Annotated[int, typer.Option(min=1, help="processes that share the images")] = 1,
    overwrite: options.Overwrite = False,
) -> None:
    """Find what the prompts name in images; the same command again does what a stop left over."""
    from app.inference.folder import predict_folder
    from app.inference.settings import Settings, make_settings
    from app.inference.worker import open_work

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
        open_work,
        batch_size=batch_size,
        processes=num_gpus,
        overwrite=overwrite,
    )
    if failed:
        raise typer.Exit(3)


@cli.command()
def label(
    input: options.Input,
    checkpoint: Annotated[Path, typer.Option(help="weights file or folder")],
    output_dir: Annotated[Path, typer.Option(help="folder for the dataset; a new one")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="a class; several; without any, the classes of the weights"),
    ] = None,
    threshold: options.Threshold = None,
    max_detections: Annotated[int, typer.Option(min=1, help="an image")] = 100,
    device: options.Device = "auto",
) -> None:
    """Make a dataset of images without labels: what weights find in them are its labels."""
    from app.inference.labelling import label as make

    bad = make(
        input,
        checkpoint,
        output_dir,
        prompt or (),
        threshold=threshold,
        max_detections=max_detections,
        device=device,
    )
    for problem in bad:
        log.warning("left out: %s", problem)
    if bad:
        raise typer.Exit(3)


@cli.command()
def evaluate(
    overrides: options.Overrides = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="weights file or folder to score; none for random ones")
    ] = None,
    dataset_dir: options.DatasetDir = None,
    hf_dataset: options.HfDataset = None,
    hf_config: options.HfConfig = None,
    hf_split: options.HfSplit = None,
    columns: options.Columns = None,
    roboflow: options.Roboflow = None,
    format: options.Format = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "valid",
    truth: Annotated[
        Path | None, typer.Option(help="COCO JSON, to score --predictions against")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="COCO results JSON, from anywhere")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="score above which off-prompt firing is counted")
    ] = 0.5,
    model: Annotated[str, typer.Option(help="size, for weights that do not say theirs")] = "auto",
    output_dir: Annotated[
        Path | None, typer.Option(help="folder for figures and report; outputs/eval unless given")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Score weights on a dataset, or COCO results from elsewhere; write figures and a report."""
    found_in = options.source(
        dataset_dir, hf_dataset, hf_config, hf_split, columns, roboflow, format
    )
    if (truth is None) != (predictions is None):
        raise UserError("--truth and --predictions: give both of them, or --checkpoint")
    if truth is not None and predictions is not None:
        idle = options.asked(overrides, {"checkpoint": checkpoint, **found_in})
        if idle:
            raise UserError(f"{', '.join(idle)}: nothing reads it beside --truth and --predictions")
        from app.evaluation.commands import score_files

        folder = output_dir or Path("outputs/eval")
        score_files(truth, predictions, folder, threshold=threshold, overwrite=overwrite)
        return
    flags = {
        "checkpoint": checkpoint,
        **found_in,
        "evaluation.split": split,
        "prediction.threshold": threshold,
        "output_dir": output_dir,
    }
    with signals.watch() as stop:
        from app.cli import training as start

        start.start(
            options.asked(overrides, flags),
            size=model,
            stop=stop,
            eval_only=True,
            overwrite=overwrite,
        )


@cli.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a finished run or evaluation")],
) -> None:
    """Write a run's report.html anew, from what its folder holds."""
    from app.evaluation.report_page import write_report

    log.info("report: %s", write_report(run))


@cli.command()
def compare(
    run: Annotated[Path, typer.Argument(help="folder of a run or evaluation")],
    other: Annotated[Path, typer.Argument(help="another, on the same images")],
) -> None:
    """Print two runs' figures side by side, and what of their difference chance could explain."""
    from app.evaluation.commands import show_comparison

    show_comparison(run, other)


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
    from app.tracking.mlflow import track as send

    uri, state = send(run, mlflow or "auto", register)
    log.info("MLflow: run %s at %s", state.run_id, uri)
    if state.version:
        log.info("registered: %s", state.version)
    if not state.complete:
        log.warning("not all was sent: %s", state.problem)
        raise typer.Exit(3)


@cli.command()
def compact(
    checkpoint: Annotated[Path, typer.Argument(help="weights folder or file")],
    output_dir: Annotated[Path, typer.Option(help="folder for the smaller weights")],
    overrides: options.Overrides = None,
    to: Annotated[
        str | None, typer.Option(help="a size to cut down to: small or small-text")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="blocks of the trunk that stay: those that matter most")
    ] = None,
    remove_blocks: Annotated[
        str | None, typer.Option(metavar="5,17-22|dart", help="instead: the blocks that go")
    ] = None,
    mlp: Annotated[float | None, typer.Option(help="share of the MLPs' units that stays")] = None,
    heads: Annotated[int | None, typer.Option(help="heads that stay in each block")] = None,
    text_layers: Annotated[int | None, typer.Option(help="that stay")] = None,
    encoder_layers: Annotated[int | None, typer.Option(help="of DETR, that stay")] = None,
    decoder_layers: Annotated[int | None, typer.Option(help="of DETR, that stay")] = None,
    queries: Annotated[int | None, typer.Option(help="of DETR, that stay")] = None,
    width: Annotated[
        str,
        typer.Option(
            help="how units and heads are chosen: taylor (their part in the loss), activation (how "
            "much they say), or svd (a projection, to compare with)"
        ),
    ] = "taylor",
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(
            help="store prompts in the text encoder's place, for deployment: classes for those of "
            "the weights, a file, or each prompt by its own --vocabulary"
        ),
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="pixels, square")] = None,
    images: Annotated[
        str | None, typer.Option(help="images without labels to measure on: folder, file or glob")
    ] = None,
    measure_on: Annotated[int, typer.Option(min=1, help="most images to measure on")] = 16,
    dataset_dir: options.DatasetDir = None,
    hf_dataset: options.HfDataset = None,
    hf_config: options.HfConfig = None,
    hf_split: options.HfSplit = None,
    columns: options.Columns = None,
    roboflow: options.Roboflow = None,
    format: options.Format = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Cut weights down to smaller ones, and say what each step removes, leaves and costs."""
    from app.compression import compaction, goal

    sources = options.source(
        dataset_dir, hf_dataset, hf_config, hf_split, columns, roboflow, format
    )
    given = options.asked(overrides, sources)
    file = compaction.compact(
        checkpoint,
        output_dir,
        lambda header: goal.make_goal(
            header.model,
            to=to,
            blocks=blocks,
            remove_blocks=remove_blocks,
            mlp=mlp,
            heads=heads,
            layers={
                "text_layers": text_layers,
                "encoder_layers": encoder_layers,
                "decoder_layers": decoder_layers,
                "queries": queries,
            },
            vocabulary=goal.read_vocabulary(vocabulary or (), header.prompts),
            resolution=resolution,
        ),
        given,
        by=goal.check_width(width),
        images=images,
        measure_on=measure_on,
        has_data=any(text.startswith("dataset.") for text in given),
        overwrite=overwrite,
    )
    log.info("weights: %s", file.parent)


@cli.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="weights folder or file")],
    output_dir: Annotated[
        Path, typer.Option("--output", "--output-dir", help="folder for what is exported")
    ],
    overrides: options.Overrides = None,
    to_format: Annotated[
        str, typer.Option("--format", help="onnx (any runtime, TensorRT) or hf (transformers)")
    ] = "onnx",
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32, fp16, bf16, int8; several in one where commas part them"),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="what can be asked for; the classes of the weights unless given"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="a file of prompts: .txt, or YAML class: prompt")
    ] = None,
    open_vocabulary: Annotated[
        bool, typer.Option("--open-vocabulary", help="any words: exports the text encoder as well")
    ] = False,
    prompts_a_pass: Annotated[
        int | None, typer.Option(help="prompts that one run of the graph answers")
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="masks of so many queries a prompt alone, as 32; all")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="pixels, square; the weights' own")] = None,
    images: Annotated[
        str | None,
        typer.Option(help="images without labels to compare and calibrate on: folder, file, glob"),
    ] = None,
    measure_on: Annotated[int, typer.Option(min=1, help="most images to compare on")] = 20,
    tensorrt: Annotated[str | None, typer.Option(help="version that it is for; noted")] = None,
    target: Annotated[str | None, typer.Option(help="device that it is for; noted")] = None,
    dataset_dir: options.DatasetDir = None,
    hf_dataset: options.HfDataset = None,
    hf_config: options.HfConfig = None,
    hf_split: options.HfSplit = None,
    columns: options.Columns = None,
    roboflow: options.Roboflow = None,
    format_: Annotated[
        str | None, typer.Option("--dataset-format", help="of --dataset-dir, decided by hand")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write weights for other runtimes, each file compared with the model it came from."""
    from app.deploy import commands

    sources = options.source(
        dataset_dir, hf_dataset, hf_config, hf_split, columns, roboflow, format_
    )
    commands.export(
        checkpoint,
        output_dir,
        to_format,
        options.asked(overrides, sources),
        {
            "--precision": precision,
            "--prompt": prompt,
            "--prompts": prompts,
            "--open-vocabulary": open_vocabulary or None,
            "--prompts-a-pass": prompts_a_pass,
            "--top": top,
            "--resolution": resolution,
            "--images": images,
            "--tensorrt": tensorrt,
            "--target": target,
        },
        measure_on=measure_on,
        overwrite=overwrite,
    )


@cli.command()
def pack(
    weights: Annotated[Path, typer.Argument(help="weights folder or file of a run")],
    output_dir: Annotated[Path, typer.Option(help="folder for the packed ones")],
) -> None:
    """Write weights as float16: half as large, with their SHA-256 beside."""
    from app.model import bundled

    log.info("packed: %s", bundled.pack(weights, output_dir))


@cli.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="folder of a LoRA, such as RUN/weights/best")],
    output_dir: Annotated[Path, typer.Option(help="folder for model.safetensors")],
    overwrite: options.Overwrite = False,
) -> None:
    """Join a LoRA with its base into plain weights."""
    from app.model import weights

    log.info("weights: %s", weights.merge(adapter, output_dir, overwrite=overwrite).parent)


def _spell_out(words: Sequence[str]) -> list[str]:
    """Flags alone as flags with a value: typer has no options whose value may be left out."""
    alone = {"--resume": "--resume=all", "--plan": "--plan=show", "--mlflow": "--mlflow=auto"}
    return [alone.get(word, word) for word in words]


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log_to_stdout()
    try:
        prove_pin()
        cli(_spell_out(sys.argv[1:]))
    except UserError as error:
        show_problems(error)
        sys.exit(2)
    except FloatingPointError as error:  # a loss that is not finite
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except signals.Stopped:
        sys.exit(signals.EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
