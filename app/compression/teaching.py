"""A teacher's losses beside those of the labels: what a taught run trains by."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn

from app.compression import distillation
from app.compression.distillation import Distiller
from app.config.schema import Config
from app.datasets.build import Splits
from app.datasets.prompts import NOUNS
from app.model.device import autocast, choose_device
from app.training import features
from app.training.losses import LabelLosses, forward, is_ddp
from app.training.store import Store

log = logging.getLogger("app")


class TaughtLosses:
    """The losses of a student beside its teacher, and of labels in the last stage.

    Args:
        labels: the losses of labelled images.
        distiller: the losses of the teacher.
        stores: of the teacher's features of images.
    """

    def __init__(
        self, labels: LabelLosses, distiller: Distiller, stores: Sequence[Store] = ()
    ) -> None:
        self.labels, self.distiller, self.stores = labels, distiller, stores
        self.criterion: Any = labels.criterion
        self.precision = labels.precision

    def wrap(self, model: Sam3Image) -> nn.Module:
        """Return a module that returns the model's features beside its outputs."""
        return self.distiller.prepare(model)

    def __call__(self, model: nn.Module, batch: BatchedDatapoint, epoch: int) -> dict[str, Tensor]:
        """Return "loss", the teacher's parts, and in the last stage those of labels."""
        distiller, stage = self.distiller, self.distiller.stage(epoch)
        labelled: dict[str, Tensor] = {}
        with autocast(batch.img_batch.device, self.labels.precision, cache_weights=False):
            words = distiller.draw_words(batch)
            outputs, features = forward(model, batch, words, stage)
            taught = distiller.losses(batch, words, stage, outputs, features)
            total = torch.stack([*taught.values()]).sum()
            if stage == "answers" and distiller.config.labels:
                wrapper: Any = model.module if is_ddp(model) else model
                labelled = self.labels.of_outputs(
                    wrapper.model, outputs, batch, over_ranks=is_ddp(model)
                )
                total = total + distiller.config.labels * labelled.pop("loss")
        return {"loss": total, **labelled, **taught}


def teach(
    config: Config,
    model: Sam3Image,
    splits: Splits,
    labels: LabelLosses,
    folder: Path | None = None,
) -> TaughtLosses:
    """Load the run's teacher; return its losses beside those of the labels.

    Args:
        model: the student, frozen where it does not learn.
        folder: of the cache of the teacher's features; None: `features.FOLDER`.
    """
    if note := distillation.note(config):
        log.info("note: %s", note)
    device = choose_device(config.training.device)
    teacher = distillation.load_teacher(config, model, device, labels.precision)
    assert teacher is not None  # `distill.teacher` names it
    stores: list[Store] = []
    if config.training.cache_features:
        folder = folder or features.FOLDER
        stores = features.cache_encoders(teacher.model, features.ENCODERS, folder, labels.precision)
    features.cache_prompts(teacher.model, features.ENCODERS)
    learns = any(p.requires_grad for p in model.backbone.language_backbone.parameters())
    words = [*splits.train.class_names, *NOUNS] if learns else []
    return TaughtLosses(labels, Distiller(teacher, config.distill, words), stores)
