"""`python -m app train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from app import signals
from app.cli import options
from app.cli.options import CLUSTER, DATA, METHOD, MODEL, OUTPUT, SCHEDULE
from app.config.schema import PlanKind, Resume
from app.errors import UserError
from app.sweeps.words import Words

cli = typer.Typer(add_completion=False)


@cli.command()
@options.with_flags
def train(
    *,
    overrides: options.Overrides = None,
    source: options.SourceFlags,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON: class: prompt, or a list of prompt and synonyms",
            rich_help_panel=DATA,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="train on so many images, chosen by the seed", rich_help_panel=DATA
        ),
    ] = None,
    folds: Annotated[
        str | None,
        typer.Option(
            metavar="2…|loo|none",
            help="score every image by weights that have not seen it; loo: leave one out",
            show_default="5 below 20 images without a validation split, else none",
            rich_help_panel=DATA,
        ),
    ] = None,
    augmentation: Annotated[
        str | None, typer.Option(help="none, light or strong", rich_help_panel=DATA)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="what --eval-only scores: train, valid or test", rich_help_panel=DATA),
    ] = None,
    weights: options.ModelFlags,
    resolution: Annotated[
        int | None, typer.Option(help="pixels, square", rich_help_panel=MODEL)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="full, head, lora-minimal, lora or lora-full", rich_help_panel=METHOD),
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            metavar="PART,…",
            help="not trained: vision, text, detector, geometry, masks, scoring; or none of them",
            rich_help_panel=METHOD,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="weights of any size to learn from as well (keys: distill.* in train.yaml)",
            rich_help_panel=METHOD,
        ),
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(
            help="pixels: from random weights, the trunk learns these first",
            rich_help_panel=METHOD,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="auto: by the number of images; none: configs/train.yaml as it is; or a YAML of "
            "configs/recipe by its name",
            show_default="auto for nano, else none",
            rich_help_panel=METHOD,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML in our schema or in upstream's Trainer's", rich_help_panel=METHOD),
    ] = None,
    use_base_config: Annotated[
        bool,
        typer.Option(
            "--use-base-config",
            help="upstream's full fine-tuning, by its Trainer",
            rich_help_panel=METHOD,
        ),
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="times that every training image is seen",
            show_default="20, unless a recipe says otherwise",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="images a step and process; auto: the most that fit",
            show_default="2; on a GPU up to 4 by its memory",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    grad_accum: Annotated[
        int | None,
        typer.Option(help="steps averaged into one update", rich_help_panel=SCHEDULE),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="learning rate of the detector; the others keep their ratio",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="of weights, order, augmentation and splits",
            show_default="0",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    eval_only: Annotated[
        bool,
        typer.Option("--eval-only", help="score, do not train", rich_help_panel=SCHEDULE),
    ] = False,
    plan: Annotated[
        PlanKind | None,
        typer.Option(
            metavar="[=measure]",
            help="do not train: print what it would take in memory and disk, and refuse what does "
            "not fit; measure: the time too, by a few updates",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    resume: Annotated[
        Resume | None,
        typer.Option(
            metavar="[=auto|weights]",
            help="go on from the newest checkpoint in --output-dir; auto: if there is one; "
            "weights: from its weights alone, with other data or settings",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    output_dir: Annotated[
        str | None,
        typer.Option(
            help="folder that the run leaves",
            show_default="a free outputs/train, outputs/train-2, …",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    sweep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="a run for each of its settings, datasets and seeds (docs/sweeps.md)",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="[=URI]",
            help="send figures, files and weights to MLflow too: at MLFLOW_TRACKING_URI, or else "
            "in outputs/mlflow.db",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(
            help="name in MLflow's model registry that the best weights get",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    num_gpus: Annotated[
        int | None, typer.Option(help="processes to train with", rich_help_panel=CLUSTER)
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="machines, with --cluster slurm", rich_help_panel=CLUSTER)
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="slurm: hand the run to it (keys: cluster.* in train.yaml); or a --sweep, also "
            "kubernetes",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
) -> None:
    """Fine-tune SAM 3 on labelled images, or score weights on them (--eval-only)."""
    flags = {
        "transforms": augmentation,
        "method": method,
        "method.freeze": None if freeze is None else f"[{'' if freeze == 'none' else freeze}]",
        **source.by_key(),
        "dataset.prompts": prompts,
        "dataset.limit": limit,
        "dataset.folds": folds,
        "training.warm_start.method": warm_start,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "training.grad_accum": grad_accum,
        "training.num_gpus": num_gpus,
        "cluster.name": None if sweep else cluster,
        "cluster.nodes": nodes,
        "tracking.mlflow": mlflow,
        "tracking.register_as": register,
        "model.resolution": resolution,
        "output_dir": output_dir,
        "checkpoint": weights.checkpoint,
        "distill.teacher": teacher,
        "evaluation.split": split,
        "seed": seed,
    }
    overrides = options.to_overrides(overrides, flags)
    if sweep is not None:
        base = Words(tuple(overrides), weights.model, recipe, lr)
        own: dict[str, object] = {
            "--config": config,
            "--use-base-config": use_base_config,
            "--eval-only": eval_only,
        }
        own |= {"--plan": plan, "--resume": resume, "--overwrite": overwrite}
        _sweep(sweep, output_dir, base, [flag for flag, value in own.items() if value], cluster)
        return
    with signals.watch() as stop:
        from app.training.output_folder import check_folder

        # Before torch is imported. The other ranks come to a folder that the first writes to.
        named = [text.partition("=")[2] for text in overrides if text.startswith("output_dir=")]
        if named and not plan and not (eval_only and resume) and os.environ.get("RANK", "0") == "0":
            check_folder(Path(named[-1]), resume=resume, overwrite=overwrite)
        options.check_paths(overrides)
        from app.cli import training
        from app.training.prepare import Request

        request = Request(
            overrides,
            size=weights.model,
            file=config,
            recipe=recipe,
            lr=lr,
            eval_only=eval_only,
            resume=resume,
            overwrite=overwrite,
            download=plan is None,
        )
        training.start(request, stop, base_config=use_base_config, plan=plan)


def _sweep(
    file: Path, output_dir: str | None, base: Words, unread: list[str], cluster: str | None
) -> None:
    """Make the runs of a sweep, with these words in each."""
    if unread:
        raise UserError([f"{flag}: --sweep does not read it" for flag in unread])
    with signals.watch() as stop:
        options.check_paths(base.overrides)
        from app.cli import sweeping

        folder = None if output_dir is None else Path(output_dir)
        sweeping.start(file, folder, options.SweepFlags(), stop, base=base, cluster=cluster)
