"""One update of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn

from app.config.schema import Config
from app.model.halves import convert_by_layer, hold_frozen
from app.training.batches import Batches, to_device
from app.training.ema import EMA
from app.training.losses import Losses
from app.training.method import set_training
from app.training.nonfinite import NotFiniteError, explain, finite_outputs
from app.training.optimizer import build_optimizer, build_scheduler
from app.training.random_state import random_state, restore_random_state

# How long a rank waits for another. One that dies is not waited for: torchrun ends the others.
LONGEST_WAIT = timedelta(hours=12)


@dataclass(frozen=True)
class StepResult:
    """One update: mean losses of its batches, norm of its gradient, number of its images.

    `losses` holds "loss", which is trained, and upstream's parts of it before they are weighted, of
    the last decoder layer and one object a query. A `skipped` update changed no weights, because
    its scaled gradient was beyond float16.
    """

    losses: dict[str, float]
    gradient_norm: float
    images: int
    skipped: bool = False

    @property
    def loss(self) -> float:
        return self.losses["loss"]


class Step:
    """Everything that an update changes: model, AdamW, schedule, EMA. Every rank has one.

    `module` is the model; `model` is what is called, around it: of a teacher's losses, or DDP.
    In float16 `scaler` multiplies the loss, so that small gradients do not become 0, and lowers its
    factor where large ones become infinite. `is_whole` says that no update was broken off between
    the first weight and the last.

    Args:
        model: with its pretrained weights, frozen parts and adapters. On a GPU that multiplies in a
            half its frozen matrices are held in it from here on, and others converted by layer.
        losses: what is trained.
        batches: of the run: their number, for the schedule, and the files of their images.
        lr_scale: factor of the configuration's learning rates.
    """

    def __init__(
        self,
        config: Config,
        model: Sam3Image,
        losses: Losses,
        accelerator: Accelerator,
        batches: Batches,
        *,
        lr_scale: float,
    ) -> None:
        self.config, self.losses, self.accelerator = config, losses, accelerator
        self.paths = batches.paths
        if accelerator.device.type == "cuda" and losses.precision != torch.float32:
            hold_frozen(model, losses.precision)
            convert_by_layer(model, losses.precision)
        optimizer = build_optimizer(model, config.optim, lr_scale)
        updates = batches.updates_per_epoch * config.training.epochs
        self.scheduler = build_scheduler(optimizer, config.optim.schedule, updates)
        self.module = model
        # Both are told of, and clipping is torch's own: else accelerate looks for distributed
        # tensors, whose import takes most of a second.
        self.model, self.optimizer = accelerator.prepare(
            losses.wrap(model), optimizer, device_placement=[True, True]
        )
        in_float16 = losses.precision == torch.float16
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=in_float16)
        decay = config.training.ema
        self.ema = None if decay is None else EMA(model, decay)
        self.random_before = random_state()  # before the last update
        self.is_whole = True

    def set_training(self) -> None:
        """Set the model's training mode, but for frozen components."""
        set_training(self.module)

    def __call__(self, batches: Sequence[BatchedDatapoint], epoch: int) -> StepResult:
        """Update the weights once, by the mean gradient of `batches`.

        The last update of an epoch may have fewer batches; its gradient is still their mean.
        (Upstream adds gradients up and never divides: trainer.py:963.)

        Raises:
            NotFiniteError: a loss or gradient is not finite, on any rank; names images and module.
                Nothing was updated.
            torch.OutOfMemoryError: nothing was updated, where `is_whole`.
        """
        self.random_before = random_state()
        try:
            names: list[str] = []
            found: list[Tensor] = []  # what the GPU has not told yet: asking for it is to wait
            for number, batch in enumerate(batches, 1):
                with self._sync(last=number == len(batches)):
                    losses = self.batch_losses(batch, epoch)  # scalars; "loss" has the graph
                    names += losses
                    found.append(self._mean_over_ranks(losses))  # (len(losses),)
                    loss = self.scaler.scale(losses["loss"] / len(batches))
                    self.accelerator.backward(loss)
            self.scaler.unscale_(self.optimizer.optimizer)
            norm = nn.utils.clip_grad_norm_(
                self.model.parameters(), self.config.optim.max_grad_norm
            )
            *means, gradient_norm = torch.cat([*found, norm[None]]).tolist()
            totals = _mean_of_batches(names, means, len(batches))
            skipped = self._is_skipped(totals["loss"], gradient_norm)
        except FloatingPointError:
            raise NotFiniteError(explain(self, batches, epoch)) from None
        except torch.OutOfMemoryError:
            self.undo()
            raise
        self.is_whole = False
        self.scaler.step(self.optimizer.optimizer)  # not where the gradient is not finite
        self.is_whole = True
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not skipped:
            self.scheduler.step()
        if self.ema is not None and not skipped:
            self.ema.update()
        images = sum(len(batch.img_batch) for batch in batches)
        return StepResult(totals, gradient_norm, images, skipped)

    def _is_skipped(self, loss: float, gradient_norm: float) -> bool:
        """Return whether the scale of the loss was too high for the gradient, which is no error.

        Raises:
            FloatingPointError: the loss is not finite, or its gradient without a scale to blame.
        """
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            return False
        if math.isfinite(loss) and self.scaler.get_scale() > 1:
            return True
        raise FloatingPointError

    def batch_losses(
        self, batch: BatchedDatapoint, epoch: int, *, watched: bool = False
    ) -> dict[str, Tensor]:
        """Return the losses of one batch, on any device; "loss" has the graph.

        Args:
            watched: raise at the first module whose output is not finite. DDP, which would wait
                for the other ranks, is left out.
        """
        batch = to_device(batch, self.accelerator.device)
        model = self.accelerator.unwrap_model(self.model) if watched else self.model
        with finite_outputs(self.module, enabled=watched or self.config.training.check_finite):
            return self.losses(model, batch, epoch)

    def _sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Let ranks exchange gradients at the last batch alone, where all are added up."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def _mean_over_ranks(self, losses: Mapping[str, Tensor]) -> Tensor:
        values = torch.stack([value.detach() for value in losses.values()])
        means: Tensor = self.accelerator.reduce(values, "mean")
        return means

    def undo(self) -> None:
        """Forget the gradients and set the random state from before the last update."""
        self.optimizer.zero_grad(set_to_none=True)
        restore_random_state(self.random_before)

    def state_dict(self) -> dict[str, Any]:
        """Return all that an update changes, but for the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": self.ema.state_dict() if self.ema is not None else None,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["average"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the DETR part: the highest of the groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)


def _mean_of_batches(names: list[str], values: list[float], batches: int) -> dict[str, float]:
    """Return each loss's mean over the batches, whose names and values follow one another."""
    totals: dict[str, float] = {}
    for name, value in zip(names, values, strict=True):
        totals[name] = totals.get(name, 0.0) + value / batches
    return totals


def build_accelerator(device: torch.device, *, find_unused: bool = True) -> Accelerator:
    """Return the device and process group of this process.

    On a CPU the same seed gives the same weights to the bit, for any number of threads.

    Args:
        find_unused: whether some trained parameters take no part in a step.
    """
    # As use_deterministic_algorithms, which imports torch's compiler besides: two seconds.
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    # It costs time, and nothing here reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=find_unused),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
    )
