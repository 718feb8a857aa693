"""The losses of a batch: forward pass, matching and upstream's losses."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from app.model.device import autocast
from app.training.collective import raise_on_all_ranks, scale_to_global_counts
from app.training.store import Store

PARTS = (  # of upstream's losses: those that are recorded
    *("loss_bbox", "loss_giou", "loss_ce", "presence_loss", "loss_mask", "loss_dice"),
    *("loss_semantic_seg", "loss_semantic_dice"),
)


class Losses(Protocol):
    """The losses that a run trains by: of labels alone, or of a teacher as well.

    Attributes:
        criterion: upstream's Sam3LossWrapper.
        precision: float32, or the half to multiply in.
        stores: of a teacher's features of images.
    """

    criterion: Any
    precision: torch.dtype
    stores: Sequence[Store]

    def wrap(self, model: Sam3Image) -> nn.Module:
        """Return the module to call in training: the model, or one that returns more of it."""

    def __call__(self, model: nn.Module, batch: BatchedDatapoint, epoch: int) -> dict[str, Tensor]:
        """Return scalars by name; "loss", their weighted sum, has the graph.

        Args:
            model: the module that `wrap` returned, or DDP around it.
            batch: on the model's device.

        Raises:
            FloatingPointError: the model's outputs are not finite, on this or another rank.
        """


class LabelLosses:
    """Upstream's losses of labelled images, and nothing else.

    Args:
        criterion: upstream's Sam3LossWrapper.
        precision: float32, or the half to multiply in.
    """

    def __init__(self, criterion: nn.Module, precision: torch.dtype) -> None:
        self.criterion: Any = criterion
        self.precision = precision
        self.stores: Sequence[Store] = ()

    def wrap(self, model: Sam3Image) -> nn.Module:
        """Return the model itself."""
        return model

    def __call__(
        self,
        model: nn.Module,
        batch: BatchedDatapoint,
        epoch: int = 0,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return "loss", and those of `PARTS` that the criterion has, before they are weighted."""
        with autocast(batch.img_batch.device, self.precision, cache_weights=False):
            outputs = forward(model, batch)
            image_model = model.module if is_ddp(model) else model
            return self.of_outputs(image_model, outputs, batch, over_ranks=is_ddp(model))

    def of_outputs(
        self, model: Any, outputs: Any, batch: BatchedDatapoint, *, over_ranks: bool
    ) -> dict[str, Tensor]:
        """Return the losses of the model's outputs: each layer's queries matched and compared.

        Args:
            model: the Sam3Image.
            over_ranks: scale them so that their mean over the ranks is that of all prompts.
        """
        targets = [model.back_convert(target) for target in batch.find_targets]
        losses = self.criterion(outputs, targets)
        if over_ranks:
            losses = scale_to_global_counts(losses, self.criterion, targets[0])
        parts = {name: losses[name].float() for name in PARTS if name in losses}
        return {"loss": losses["core_loss"], **parts}


def is_ddp(model: nn.Module) -> bool:
    """Return whether several ranks run the model together."""
    return isinstance(model, DistributedDataParallel)


def forward(model: nn.Module, batch: BatchedDatapoint, *arguments: Any) -> Any:
    """Return the model's outputs; images (B, 3, R, R), each with any number of prompts.

    Raises:
        FloatingPointError: the outputs are not finite, on this or another rank. Upstream's matcher
            raises a ValueError where its costs are not.
    """
    together = is_ddp(model)
    with raise_on_all_ranks(batch.img_batch.device) if together else contextlib.nullcontext():
        try:
            return model(batch, *arguments)
        except ValueError as error:
            if "invalid numeric" not in str(error):
                raise
            raise FloatingPointError(str(error)) from None
