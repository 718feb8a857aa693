"""Upstream's own Trainer, run on a YAML in upstream's schema from the filesystem."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from sam3.model.sam3_image import Sam3Image
from sam3.train.matcher import BinaryHungarianMatcherV2

from app.config.compose import (
    load_config,
)
from app.config.schema import ModelConfig
from app.datasets import coco
from app.datasets.build import Splits
from app.datasets.read_splits import read_splits as read_own_splits
from app.errors import UserError
from app.files import write_text
from app.launch import torchrun
from app.model import weights
from app.model.build import build_model
from app.model.device import is_main
from app.training.output_folder import log_next_steps, prepare_folder
from app.training.prepare import Request
from app.upstream_trainer.adapt import model_size, prepare

log = logging.getLogger("app")


def start(request: Request) -> None:
    """Train by upstream's Trainer; leave `weights/last` beside upstream's own files.

    Raises:
        UserError: whatever the user must mend, before anything is written.
    """
    assert request.file is not None
    eval_only, resume = request.eval_only, request.resume
    if resume == "weights":
        raise UserError("--resume=weights: upstream's Trainer cannot; give --checkpoint")
    flags = dict(text.partition("=")[::2] for text in request.overrides)
    config = prepare(request.file, flags, request.size, request.lr)
    config.trainer.mode = "val" if eval_only else config.trainer.mode
    if config.trainer.mode == "val":
        log.info("note: trainer.mode is val: nothing is trained")
    splits = read_splits(config, flags)
    processes = int(config.launcher.gpus_per_node)
    if processes > 1 and not torchrun.is_launched():
        torchrun.relaunch(processes, sys.argv[1:])

    folder = Path(config.launcher.experiment_log_dir)
    if is_main():
        prepare_folder(folder, resume=resume, overwrite=request.overwrite)
        write_dataset(config, splits, folder)
        # Not resolved: an interpolation may read an environment variable.
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
    else:
        write_dataset(config, splits, folder, write=False)
    join_process_group()
    instantiate(config.trainer, _recursive_=False).run()
    if torch.distributed.get_rank() == 0:
        node = config.trainer.model
        _export(folder, model_size(node.size, node.resolution, node.segmentation), splits)
    torch.distributed.destroy_process_group()


def build(size: str, resolution: int, segmentation: bool, checkpoint_path: str | None) -> Sam3Image:
    """Build `trainer.model`, in place of upstream's builder: any size, strict loading.

    With `checkpoint_path` None, upstream's builder downloads SAM 3; here weights are random.
    """
    matcher = BinaryHungarianMatcherV2(
        focal=True, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2, stable=False
    )
    config = model_size(size, resolution, segmentation)
    recomputing = config.model_copy(update={"activation_checkpointing": True})  # as upstream does
    model = build_model(recomputing, matcher=matcher)
    if checkpoint_path is not None:
        weights.load_into(model, Path(checkpoint_path), merge=True)
    return model


def read_splits(config: DictConfig, flags: dict[str, str]) -> Splits:
    """Read the dataset of our own keys, else of the YAML's paths; `valid/` where `test/` lacks."""
    named = {split: _annotations(config, split) for split in ("train", "val")}
    files = {split: file for split, file in named.items() if file is not None}
    ours = [f"{key}={value}" for key, value in flags.items() if key.startswith("dataset.")]
    if ours or len(files) < 2:
        return read_own_splits(load_config(ours))
    missing = [f"{split}: no annotations at {f}" for split, f in files.items() if not f.is_file()]
    if missing:
        raise UserError([*missing, "Set the YAML's paths, or give --dataset-dir."])
    train, valid = (
        coco.read(file, [Path(config.trainer.data[split].dataset.img_folder), file.parent])
        for split, file in files.items()
    )
    return Splits(train=train, valid=valid, test=None, notes=())


def _annotations(config: DictConfig, split: str) -> Path | None:
    dataset = config.trainer.data[split].dataset
    if not dataset.ann_file:
        return None
    file = Path(dataset.ann_file)
    beside = file.parent.parent / "valid" / file.name
    if not file.is_file() and file.parent.name == "test" and beside.is_file():
        log.info("note: there is no %s; validation uses %s", file, beside)
        dataset.img_folder = str(beside.parent)
        return beside
    return file


def write_dataset(config: DictConfig, splits: Splits, folder: Path, *, write: bool = True) -> None:
    """Write checked copies of the annotations, which upstream's loader reads without checking.

    It raises KeyError without `iscrowd` (coco_json_loaders.py:217), for one.
    """
    for split, dataset in (("train", splits.train), ("val", splits.valid)):
        file = folder / "dataset" / f"{split}.json"
        if write:
            coco.write(dataset, file)
        node = config.trainer.data[split].dataset
        node.ann_file, node.img_folder = str(file), "/"
        if "paths" in config and split in config.paths:
            config.paths[split] = {"img_folder": "/", "ann_file": str(file)}
    for meter in _evaluators(OmegaConf.select(config, "trainer.meters.val")):
        meter.gt_path = str(folder / "dataset" / "val.json")


def _evaluators(node: Any) -> list[DictConfig]:
    if not OmegaConf.is_config(node):
        return []
    keys = list(node) if isinstance(node, DictConfig) else list(range(len(node)))
    own = [node] if isinstance(node, DictConfig) and "gt_path" in node else []
    return own + [meter for key in keys for meter in _evaluators(node._get_node(key))]


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


def _export(folder: Path, config: ModelConfig, splits: Splits) -> None:
    """Write our weights from upstream's checkpoint, without its optimizer: a third of its size."""
    checkpoint = folder / "checkpoints" / "checkpoint.pt"
    if not checkpoint.is_file():
        return
    model = build_model(config)
    weights.load_into(model, checkpoint, merge=True)
    header = weights.Header(
        model=config, prompts=splits.train.class_names, data_hash=splits.train.content_hash()
    )
    weights.save(model, folder / "weights" / "last", header)
    log_next_steps(folder / "weights" / "last", splits)
