"""Upstream's own Trainer, run on a YAML in upstream's schema from the filesystem."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sam3.model.sam3_image import Sam3Image
from sam3.train.matcher import BinaryHungarianMatcherV2

from app.config.schema import ModelConfig
from app.datasets.build import Splits
from app.datasets.coco import Dataset
from app.errors import UserError
from app.files import write_text
from app.launch import torchrun
from app.model import weights
from app.model.build import build_model
from app.model.device import is_main
from app.training.output_folder import log_next_steps, prepare_folder
from app.training.prepare import Request
from app.upstream_trainer.adapt import model_size, prepare
from app.upstream_trainer.data import read_datasets, write_datasets

log = logging.getLogger("app")


def start(request: Request) -> None:
    """Train by upstream's Trainer; leave `weights/last` beside upstream's own files.

    Raises:
        UserError: whatever the user must mend, before anything is written.
    """
    resume = request.resume
    if resume == "weights":
        raise UserError("--resume=weights: upstream's Trainer cannot; give --checkpoint")
    flags = dict(text.partition("=")[::2] for text in request.overrides)
    try:
        config = prepare(request, flags)
        datasets = read_datasets(config, flags)
    except OmegaConfBaseException as error:  # an interpolation, mostly
        raise UserError(f"{request.file}: {' '.join(str(error).split())}") from None
    processes = int(config.launcher.gpus_per_node)
    if processes > 1 and not torchrun.is_launched():
        torchrun.relaunch(processes, sys.argv[1:])

    folder = Path(config.launcher.experiment_log_dir)
    if is_main():
        prepare_folder(folder, resume=resume, overwrite=request.overwrite)
        write_datasets(config, datasets, folder)
        # Not resolved: an interpolation may read an environment variable.
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
    else:
        write_datasets(config, datasets, folder, write=False)
    join_process_group()
    instantiate(config.trainer, _recursive_=False).run()
    if "train" in datasets and torch.distributed.get_rank() == 0:
        node = config.trainer.model
        size = model_size(node.size, node.resolution, node.segmentation)
        start = None if node.checkpoint_path is None else Path(node.checkpoint_path)
        _export(folder, size, datasets, None if start is None else weights.origin(start))
    torch.distributed.destroy_process_group()


def build(size: str, resolution: int, segmentation: bool, checkpoint_path: str | None) -> Sam3Image:
    """Build `trainer.model`, in place of upstream's builder: any size, strict loading.

    With `checkpoint_path` None, upstream's builder downloads SAM 3; here weights are random.
    """
    matcher = BinaryHungarianMatcherV2(
        focal=True, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2, stable=False
    )
    path = None if checkpoint_path is None else Path(checkpoint_path)
    has_masks = segmentation if path is None else weights.describe(path, size).model.segmentation
    config = model_size(size, resolution, has_masks)
    recomputing = config.model_copy(update={"activation_checkpointing": True})  # as upstream does
    model = build_model(recomputing, matcher=matcher)
    if path is not None:
        weights.load_into(model, path, merge=True)
    if not segmentation:  # only now, for weights that have a mask head to be read strictly
        model.segmentation_head = None
    return model


def join_process_group() -> None:
    """Set for one process what torchrun sets for several."""
    if torchrun.is_launched():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"
    )


def _export(
    folder: Path, config: ModelConfig, datasets: dict[str, Dataset], base: weights.Origin | None
) -> None:
    """Write our weights from upstream's checkpoint, without its optimizer: a third of its size.

    Args:
        base: the published file that the run started from.
    """
    checkpoint = folder / "checkpoints" / "checkpoint.pt"
    if not checkpoint.is_file():
        return
    train = datasets["train"]
    splits = Splits(train=train, valid=datasets.get("val", train), test=None, notes=())
    model = build_model(config)
    weights.load_into(model, checkpoint, merge=True)
    header = weights.Header(
        model=config,
        prompts=train.class_names,
        data_hash=train.content_hash(),
        base=base,
    )
    weights.save(model, folder / "weights" / "last", header)
    log_next_steps(folder / "weights" / "last", splits)
