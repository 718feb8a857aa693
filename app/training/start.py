"""From the command line's words to a run: which configuration, which weights, which trainer."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app.config import (
    Config,
    Resume,
    load_config,
    load_model_config,
    model_names,
    read_yaml,
    recipe_file,
)
from app.errors import UserError, nearest
from app.model import weights
from app.model.carried import carried_nano
from app.model.device import choose_device
from app.training import checkpoints, cluster, launch, method, run, upstream_trainer
from app.training.recipe import auto
from app.training.signals import StopRequest

log = logging.getLogger("app")


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
    resume: Resume | None = None,
    overwrite: bool = False,
) -> None:
    """Check everything that can be checked, then train, score, or hand over to upstream.

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
    if file is not None and upstream_trainer.is_upstream_schema(file):
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
    config, weights_file = configure(overrides, file, size, lr, eval_only=eval_only)
    handed_over = config.cluster.name == "slurm" and not cluster.is_inside()
    nodes, processes = config.cluster.nodes, config.training.num_gpus
    if nodes * processes > 1 and not (handed_over or launch.is_launched() or eval_only):
        launch.relaunch(processes, sys.argv[1:], nodes)
    if not handed_over:
        choose_device(config.training.device)
    if not eval_only:
        method.check(config, weights_file)
    splits = run.read_splits(config)
    if recipe == "auto":
        trained = weights_file is not None
        images, name = len(splits.train.images), config.model.name
        overrides = auto(images, name, overrides, trained=trained)
        config, weights_file = configure(overrides, file, size, lr, eval_only=eval_only)
        method.check(config, weights_file)
    if eval_only:
        run.choose_split(config, splits)
    else:
        run.check_masks(config, splits.train)
    folder = Path(config.output_dir)
    if resume:
        run.check_resume(config, splits, resume, int(os.environ.get("WORLD_SIZE", "1")))
    if handed_over:
        run.prepare_folder(folder, resume=resume, overwrite=overwrite)
        cluster.submit(config, sys.argv[1:])
        return
    if os.environ.get("RANK", "0") == "0":
        run.prepare_folder(folder, resume=resume, overwrite=overwrite)
        if not eval_only:
            checkpoints.check_space(folder, config)
        run.write_settings(folder, config, overrides)
        logging.raiseExceptions = False  # a full disk is told once, not by each line of the log
        log.addHandler(logging.FileHandler(folder / "train.log", encoding="utf-8"))
    else:
        log.setLevel(logging.WARNING)
    if eval_only:
        run.evaluate(config, splits, weights_file)
    else:
        run.train(config, splits, weights_file, resume=resume, stop=stop)


def configure(
    overrides: Sequence[str],
    file: Path | None,
    size: str,
    lr: float | None,
    *,
    eval_only: bool = False,
) -> tuple[Config, Path | None]:
    """The run's configuration, and the weights that it starts from (None: random)."""
    asked = _asked(overrides, file)
    size = str(asked.get("model", "auto")) if size == "auto" else size
    if size not in ("auto", *model_names()):
        raise UserError(
            f"--model {size}: there is no such size; there are auto, {', '.join(model_names())}."
            f"{nearest(size, model_names())}"
        )
    checkpoint = str(asked.get("checkpoint", "auto"))
    if checkpoint in ("none", "auto"):
        size, weights_file = _default_weights(size, random=checkpoint == "none")
    else:
        weights_file = weights.find_file(Path(checkpoint))
    expected = None if size == "auto" else size
    model = weights.describe(weights_file, expected).model if weights_file else None
    model = model or load_model_config(size)
    overrides = [text for text in overrides if not text.startswith("model=")]
    config = load_config(overrides, file, model)
    if lr is not None:
        config = load_config([*overrides, f"optim.lr_scale={lr / config.optim.lr}"], file, model)
    if weights_file and config.training.warm_start.method != "none":
        raise UserError(
            f"training.warm_start.method={config.training.warm_start.method}: is for random "
            f"weights, and would spoil those of {weights_file}; leave it out, or --checkpoint none"
        )
    if "output_dir" not in asked:
        folder = Path("outputs/eval" if eval_only else config.output_dir)
        config = config.model_copy(update={"output_dir": str(run.free_folder(folder))})
    return config, weights_file


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


def _default_weights(size: str, *, random: bool) -> tuple[str, Path | None]:
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
        return size, weights.published_sam3()
    if size == "nano" and (nano := carried_nano()) is not None:
        log.info("weights: %s (the project's own; --checkpoint none for random ones)", nano)
        return size, weights.find_file(nano)
    log.info("weights: random; size %s has no published ones (--checkpoint names yours)", size)
    return size, None
