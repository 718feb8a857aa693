"""From the command line's words to a run: which configuration, which weights, which trainer."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from app.config.compose import load_config, load_model_config, model_names, read_yaml, recipe_file
from app.config.schema import Config, PlanKind, Resume
from app.datasets.build import Splits
from app.datasets.read_splits import read_splits
from app.errors import UserError, nearest
from app.launch import slurm, torchrun
from app.model import weights
from app.model.bundled import bundled_nano
from app.model.device import choose_device
from app.planning import plan as planning
from app.signals import StopRequest
from app.tracking.files import followed_by_mlflow
from app.tracking.state import mlflow_uri
from app.training import checkpoints, method, run
from app.training.recipe import auto
from app.upstream_trainer import run as upstream_trainer

log = logging.getLogger("app")
BATCH_SIZE = "training.batch_size"


def start(
    overrides: Sequence[str],
    *,
    size: str,
    stop: StopRequest,
    file: Path | None = None,
    recipe: str | None = None,
    lr: float | None = None,
    base_config: bool = False,
    eval_only: bool = False,
    plan: PlanKind | None = None,
    resume: Resume | None = None,
    overwrite: bool = False,
) -> None:
    """Check everything that can be checked, then train, score, plan, or hand over to upstream.

    Raises:
        UserError: whatever the user must mend, before anything is written.
    """
    given = {"--use-base-config": base_config, "--config": file, "--recipe": recipe}
    if len(named := [flag for flag, value in given.items() if value]) > 1:
        raise UserError(f"{' and '.join(named)}: give one of them")
    if base_config:
        file = upstream_trainer.BASE_CONFIG
    if recipe not in (None, "auto"):
        file = recipe_file(recipe)
    if plan and eval_only:
        raise UserError("--plan and --eval-only: a plan is of training; leave one of them out")
    tracks = any(text.startswith("tracking.") for text in overrides)
    if tracks and eval_only:
        raise UserError("--mlflow and --register: of a training; leave them out, or --eval-only")
    if file is not None and upstream_trainer.is_upstream_schema(file):
        auto_batch = f"{BATCH_SIZE}=auto" in overrides
        ours = {"--plan": plan, "--batch-size auto": auto_batch, "--mlflow, --register": tracks}
        if problems := [
            f"{flag}: of this project's own training, and {file} is for upstream's Trainer; "
            "leave one of them out"
            for flag, value in ours.items()
            if value
        ]:
            raise UserError(problems)
        upstream_trainer.start(
            overrides,
            file,
            size=size,
            lr=lr,
            eval_only=eval_only,
            resume=resume,
            overwrite=overwrite,
        )
        return
    if eval_only and resume:
        raise UserError("--resume: of a training; leave it out, or --eval-only")
    main = os.environ.get("RANK", "0") == "0"
    if not main:
        log.setLevel(logging.WARNING)
    fitted, overrides = _take_auto_batch(overrides)
    ways = {"eval_only": eval_only, "download": plan is None}
    config, weights_file = configure(overrides, file, size, lr, **ways)
    trained = weights_file is not None
    tracking = config.tracking
    if tracking.register_as and not (eval_only or tracking.mlflow or mlflow_uri(None)):
        raise UserError("--register: is of MLflow; give --mlflow as well, or MLFLOW_TRACKING_URI")
    handed_over = config.cluster.name == "slurm" and not slurm.is_inside()
    if not handed_over:
        choose_device(config.training.device)
    if not eval_only:
        method.check(config, weights_file)
    splits = read_splits(config)
    run.check_words(config, splits)

    def changed(more: Sequence[str]) -> Config:
        """The configuration with other overrides, of the same model and weights."""
        at_hand = weights_file is None or weights_file.is_file()
        fixed = f"checkpoint={(weights_file or 'none') if at_hand else 'auto'}"
        found, _ = configure([*more, fixed], file, config.model.name, lr, **ways)
        return found.model_copy(update={"checkpoint": config.checkpoint})

    if recipe == "auto":
        images = len(splits.train.images)
        decided = [*(["optim.lr_scale"] if lr else []), *([BATCH_SIZE] if fitted else [])]
        chosen = auto(images, config.model.name, [*overrides, *decided], trained=trained)
        overrides = [*chosen, *overrides]
        config = changed(overrides)
        method.check(config, weights_file)
    if eval_only:
        run.choose_split(config, splits)
    else:
        run.check_masks(config, splits.train)
    found: list[str] = []  # here, once, for all processes
    if not (eval_only or handed_over):
        config = run.settle_features(config, splits, resume, trained=trained)
        found.append(f"training.cache_features={json.dumps(config.training.cache_features)}")
        found.append(f"dataset.views={json.dumps(config.dataset.views)}")
    if fitted and not handed_over:
        found.append(_fitted_batch(config, splits, resume, trained=trained))
        config = changed([*overrides, *found])
    overrides = [*overrides, *found]
    if plan:
        if handed_over:
            log.info("--cluster slurm: memory and disk are those of this machine, not of the job's")
        planned = planning.make_plan(config, splits, trained=trained)
        planning.show(planned, splits)
        planning.require_fit(planned, splits, lambda more: changed([*overrides, *more]))
        if plan == "measure":
            planning.show_times(planning.measure(config, splits, trained=trained), planned, splits)
        return
    processes = config.training.num_gpus * config.cluster.nodes
    if eval_only and processes > 1:
        log.info("--eval-only: in one process, whatever --num-gpus and --nodes say")
    elif processes > 1 and not (handed_over or torchrun.is_launched()):
        torchrun.relaunch(config.training.num_gpus, [*sys.argv[1:], *found], config.cluster.nodes)
    folder = Path(config.output_dir)
    if resume and handed_over:
        open_yet = [*run.SETTLED, *([BATCH_SIZE] if fitted else [])]
        run.check_resume(config, splits, resume, processes, open_yet)
    elif resume:
        run.check_resume(config, splits, resume, int(os.environ.get("WORLD_SIZE", "1")))
    if handed_over:
        run.prepare_folder(folder, resume=resume, overwrite=overwrite)
        slurm.submit(config, sys.argv[1:], resume)
        return
    if main:
        run.prepare_folder(folder, resume=resume, overwrite=overwrite)
        if not eval_only:
            checkpoints.check_space(folder, config, trained=weights_file is not None)
        run.write_settings(folder, config, overrides, splits, resume)
        logging.raiseExceptions = False  # a full disk is told once, not by each line of the log
        log.addHandler(logging.FileHandler(folder / "train.log", encoding="utf-8"))
    if eval_only:
        run.evaluate(config, splits, weights_file)
    else:
        following = followed_by_mlflow(config.tracking, folder) if main else nullcontext()
        with torchrun.without_others(), following:
            run.train(config, splits, weights_file, resume=resume, stop=stop)


def configure(
    overrides: Sequence[str],
    file: Path | None,
    size: str,
    lr: float | None,
    *,
    eval_only: bool = False,
    download: bool = True,
) -> tuple[Config, Path | None]:
    """The run's configuration, and the weights that it starts from (None: random).

    Args:
        download: whether to get Meta's weights where they are meant and not at hand; the file is
            not there otherwise.
    """
    asked = _asked(overrides, file)
    size = str(asked.get("model", "auto")) if size == "auto" else size
    if size not in ("auto", *model_names()):
        raise UserError(
            f"--model {size}: there is no such size; there are auto, {', '.join(model_names())}."
            f"{nearest(size, model_names())}"
        )
    checkpoint = str(asked.get("checkpoint", "auto"))
    if checkpoint in ("none", "auto"):
        size, weights_file = _default_weights(size, random=checkpoint == "none", download=download)
    else:
        weights_file = weights.find_file(Path(checkpoint))
    expected = None if size == "auto" else size
    read = weights_file if weights_file and weights_file.is_file() else None
    model = weights.describe(read, expected).model if read else load_model_config(size)
    if read and model.name in model_names():  # what is recomputed is of training, not of weights
        kept = {"activation_checkpointing": load_model_config(model.name).activation_checkpointing}
        model = model.model_copy(update=kept)
    overrides = [text for text in overrides if not text.startswith("model=")]
    config = load_config(overrides, file, model)
    if lr is not None:
        config = load_config([*overrides, f"optim.lr_scale={lr / config.optim.lr}"], file, model)
    if weights_file and config.training.warm_start.method != "none" and not eval_only:
        raise UserError(
            f"training.warm_start.method={config.training.warm_start.method}: is for random "
            f"weights, and would spoil those of {weights_file}; leave it out, or --checkpoint none"
        )
    if "output_dir" not in asked:
        folder = Path("outputs/eval" if eval_only else config.output_dir)
        config = config.model_copy(update={"output_dir": str(run.free_folder(folder))})
    return config, weights_file


def _take_auto_batch(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether the batch size is to be found, and the overrides without the word for it.

    Where a number is given too, it was found by the process that started this one.
    """
    rest = [text for text in overrides if text != f"{BATCH_SIZE}=auto"]
    found = any(text.startswith(f"{BATCH_SIZE}=") for text in rest)
    return len(rest) < len(overrides) and not found, rest


def _fitted_batch(config: Config, splits: Splits, resume: Resume | None, *, trained: bool) -> str:
    """The override with the largest batch that fits, or, of a run to resume, that it had."""
    newest = checkpoints.find_newest(Path(config.output_dir) / "checkpoints") if resume else None
    if newest is not None:
        size = checkpoints.read(newest)[1][BATCH_SIZE]
    else:
        size = planning.largest_batch(config, splits, trained=trained)
        if not size:
            raise UserError(
                "--batch-size auto: not even one image a step fits. --plan --batch-size 1 says "
                "what would"
            )
    log.info("batch size: %d images (the largest that fits)", size)
    return f"{BATCH_SIZE}={size}"


def _asked(overrides: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Top-level keys that the user set, in the file or on the command line, which wins."""
    content = read_yaml(file) if file is not None else {}
    items = content.items() if isinstance(content, dict) else ()
    asked = {key: value for key, value in items if isinstance(value, str)}
    if isinstance(content, dict) and isinstance(size := content.get("model"), dict):
        asked |= {"model": size["name"]} if "name" in size else {}
    for text in overrides:
        key, _, value = text.partition("=")
        asked[key] = value
    return asked


def _default_weights(size: str, *, random: bool, download: bool) -> tuple[str, Path | None]:
    """Size and weights where no checkpoint is named; says what was chosen, and why."""
    if size == "auto":
        cached = not random and weights.cached_sam3() is not None
        size = "sam3" if torch.cuda.is_available() and cached else "nano"
        why = (
            "a GPU and SAM 3's weights are at hand"
            if size == "sam3"
            else ("no GPU with SAM 3's weights at hand")
        )
        log.info("model: %s (%s; --model decides by hand)", size, why)
    if random:
        return size, None
    if size == "sam3":
        if not download and weights.cached_sam3() is None:
            log.info("weights: %s/%s (to be downloaded, 3.4 GB)", *weights.HUB)
            return size, Path(weights.HUB[1])
        return size, weights.published_sam3()
    if size == "nano" and (nano := bundled_nano()) is not None:
        log.info("weights: %s (the project's own; --checkpoint none for random ones)", nano)
        return size, weights.find_file(nano)
    log.info("weights: random; size %s has no published ones (--checkpoint names yours)", size)
    return size, None
