"""Epochs and steps: upstream's model and losses, on accelerate."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
)
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image
from sam3.model.utils.misc import copy_data_to_device
from sam3.train.data.sam3_image_dataset import Datapoint
from sam3.train.optim.optimizer import construct_optimizer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from app.compression.distillation import Distiller, Stage
from app.config.schema import Config, OptimConfig
from app.datasets.queries import QueryDataset, collate
from app.errors import UserError
from app.model.device import choose_precision
from app.signals import held_back, leave_to_parent
from app.training.collective import over_processes, together
from app.training.ema import Average
from app.training.method import set_training
from app.training.nonfinite import NotFiniteError, finite_outputs
from app.training.random_state import random_state, restore_random_state
from app.training.schedule import learning_rate_factor

# The first process validates while the others wait. One that dies is not waited for: torchrun ends
# the others at once.
LONGEST_WAIT = timedelta(hours=12)
TEXT = "backbone.language_backbone."
PARTS = (  # of upstream's losses: those that are recorded
    *("loss_bbox", "loss_giou", "loss_ce", "presence_loss", "loss_mask", "loss_dice"),
    *("loss_semantic_seg", "loss_semantic_dice"),
)


@dataclass(frozen=True)
class StepResult:
    """One update: mean losses of its batches, its norm of gradients, images it took.

    `losses` holds "loss", which is trained, and upstream's parts of it before they are weighted, of
    the last decoder layer and one object a query.
    """

    losses: dict[str, float]
    gradient_norm: float
    images: int

    @property
    def loss(self) -> float:
        return self.losses["loss"]


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) of this process's share of an epoch, in the seed's order.

    The order is padded from its start so that every process has the same number of items. `first`
    of them are left out: a resumed epoch has had them.
    """

    def __init__(self, length: int, seed: int, rank: int, processes: int) -> None:
        self.length, self.seed, self.rank, self.processes = length, seed, rank, processes
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        return math.ceil(self.length / self.processes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        padded = itertools.islice(itertools.cycle(order), len(self) * self.processes)
        start = self.rank + self.first * self.processes
        return ((self.epoch, i) for i in itertools.islice(padded, start, None, self.processes))


class _Items(TorchDataset):
    """Hands a UserError on as a value: raised in a loading process, it comes with a traceback."""

    def __init__(self, data: QueryDataset) -> None:
        self.data = data

    def __getitem__(self, key: tuple[int, int]) -> Datapoint | UserError:
        try:
            return self.data[key]
        except UserError as error:
            return error


def _collate(items: list[Datapoint | UserError]) -> BatchedDatapoint | UserError:
    errors = [item for item in items if isinstance(item, UserError)]
    if errors:
        return UserError([problem for error in errors for problem in error.problems])
    return collate([item for item in items if not isinstance(item, UserError)])


class Loop:
    """Trains one model; every process of a run has one.

    Args:
        lr_scale: of the configuration's learning rates.
        lesson: where there is a teacher; what it prepares is then called instead of the model.
    """

    def __init__(
        self,
        config: Config,
        model: Sam3Image,
        data: QueryDataset,
        accelerator: Accelerator,
        *,
        lr_scale: float,
        lesson: Distiller | None = None,
    ) -> None:
        self.config = config
        self.lesson = lesson
        self.accelerator = accelerator
        self.precision = choose_precision(
            config.training.precision, accelerator.device, config.model
        )
        self.criterion: Any = instantiate(config.loss.criterion, _convert_="all")
        self.sampler = EpochSampler(
            len(data), config.seed, accelerator.process_index, accelerator.num_processes
        )
        workers = config.training.num_workers
        if workers == "auto":
            workers = 4 if accelerator.device.type == "cuda" else 0
        self.loader: DataLoader[Any] = DataLoader(
            _Items(data),
            batch_size=config.training.batch_size,
            sampler=self.sampler,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=leave_to_parent,
            # Its own, or each epoch would draw from what dropout draws from, a resumed one twice.
            generator=torch.Generator(),
            pin_memory=accelerator.device.type == "cuda",
        )
        optimizer = build_optimizer(model, config.optim, lr_scale)
        self.updates_per_epoch = math.ceil(len(self.loader) / config.training.grad_accum)
        total = self.updates_per_epoch * config.training.epochs
        self.scheduler = LambdaLR(
            optimizer,
            lambda i: learning_rate_factor(min(i, total - 1), total, config.optim.schedule),
        )
        decay = config.training.ema
        self.module = model
        called = model if lesson is None else lesson.prepare(model)
        self.model, self.optimizer = accelerator.prepare(called, optimizer)
        self.average = None if decay is None else Average(model, decay)
        self.random_before = random_state()  # the last update
        self._paths = {image.id: image.path for image in data.dataset.images}

    def run_epoch(self, epoch: int, first_update: int = 0) -> Iterator[StepResult]:
        """Train on every image once, but for those of updates that are done; yields after each.

        Raises:
            UserError: images that cannot be decoded, each by its path.
            NotFiniteError: a loss or gradient; names images and module. Nothing was updated.
        """
        self.sampler.epoch = epoch
        training = self.config.training
        self.sampler.first = first_update * training.batch_size * training.grad_accum
        set_training(self.module)
        with held_back():
            batches = iter(self.loader)
        try:
            while group := list(itertools.islice(batches, training.grad_accum)):
                with together(self.accelerator.device):
                    if bad := [batch for batch in group if isinstance(batch, UserError)]:
                        raise bad[0]
                yield self._update(group)
        finally:
            del batches  # ends its processes, which an error would keep, and the exit wait for

    def _update(self, group: list[BatchedDatapoint]) -> StepResult:
        """One update from the mean gradient of the batches in `group`.

        The last group of an epoch may be shorter; it is still a mean. (Upstream adds the gradients
        up and never divides: trainer.py:963.)
        """
        self.random_before = random_state()
        try:
            losses, norm = self._backward(group)
        except FloatingPointError:
            raise NotFiniteError(self._explain(group)) from None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.average is not None:
            self.average.update()
        images = sum(len(batch.img_batch) for batch in group)
        return StepResult(losses, norm, images)

    def _backward(self, group: list[BatchedDatapoint]) -> tuple[dict[str, float], float]:
        """Mean losses of the batches, and the norm of their mean gradient before it was clipped."""
        total: dict[str, float] = {}
        for index, batch in enumerate(group):
            last = index == len(group) - 1
            context = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
            with context:
                losses = self._losses(batch)
                values = torch.stack([value.detach() for value in losses.values()])
                means = self.accelerator.reduce(values, "mean")
                _check_finite(means[0])  # in one process, and so in all
                self.accelerator.backward(losses["loss"] / len(group))
            for name, value in zip(losses, means.tolist(), strict=True):
                total[name] = total.get(name, 0.0) + value / len(group)
        norm = self.accelerator.clip_grad_norm_(
            self.model.parameters(), self.config.optim.max_grad_norm
        )
        _check_finite(norm)
        return total, float(norm)

    def _explain(self, group: list[BatchedDatapoint]) -> str:
        """Where it first was not finite, in which images; all is then as before the update."""
        ids = [id for batch in group for id in batch.find_metadatas[0].coco_image_id.tolist()]
        images = ", ".join(str(self._paths[id]) for id in dict.fromkeys(ids))
        found: list[tuple[str, str]] = []
        every = [("no module and no gradient alone", images)]
        for find in (self._faulty_module, self._faulty_gradient):
            self._begin_anew()
            fault = find(group)
            # Of all processes: it may be one's alone, and they go backward together or not at all.
            found = gather_object([(fault, images)] if fault else [])
            if found:
                break
        self._begin_anew()
        where = "; ".join(f"{fault}; with the images {images}" for fault, images in found or every)
        return (
            f"The loss or its gradient is not finite: {where}. "
            "The weights were not updated. A lower --lr often mends it."
        )

    def _begin_anew(self) -> None:
        """As it was before the update."""
        self.optimizer.zero_grad(set_to_none=True)
        restore_random_state(self.random_before)

    def _faulty_module(self, group: list[BatchedDatapoint]) -> str | None:
        """The batches once more, each module's output watched."""
        normalization, self.criterion.normalization = self.criterion.normalization, "local"
        try:
            for batch in group:
                self._losses(batch, watched=True)
        except FloatingPointError as error:
            return str(error)
        finally:
            self.criterion.normalization = normalization
        return None

    def _faulty_gradient(self, group: list[BatchedDatapoint]) -> str | None:
        """The batches once more, each parameter's gradient watched."""
        faults: list[str] = []

        def watch(name: str, gradient: torch.Tensor) -> None:
            if not gradient.isfinite().all():
                faults.append(f"the gradient of {name} is the first that is not")

        hooks = [
            parameter.register_hook(functools.partial(watch, name))
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        ]
        try:
            for batch in group:
                self._losses(batch, watched=True)["loss"].backward()
        finally:
            for hook in hooks:
                hook.remove()
        return faults[0] if faults else None

    def _losses(self, batch: BatchedDatapoint, *, watched: bool = False) -> dict[str, torch.Tensor]:
        """What `StepResult.losses` says, of one batch; "loss" has the graph."""
        batch = copy_data_to_device(batch, self.accelerator.device, non_blocking=True)
        # DDP would wait for others.
        model = self.accelerator.unwrap_model(self.model) if watched else self.model
        with finite_outputs(self.module, enabled=watched or self.config.training.check_finite):
            if self.lesson is None:
                return batch_losses(model, self.criterion, batch, self.precision)
            return lesson_losses(
                model,
                self.criterion,
                batch,
                self.precision,
                self.lesson,
                self.lesson.stage(self.sampler.epoch),
            )

    def state_dict(self) -> dict[str, Any]:
        """Of all that an update changes, but for the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    @property
    def learning_rate(self) -> float:
        """Of the DETR part: the highest of the groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)


def batch_losses(
    model: nn.Module, criterion: nn.Module, batch: BatchedDatapoint, precision: torch.dtype
) -> dict[str, torch.Tensor]:
    """Losses of one batch by the names of `StepResult.losses`; "loss" has the graph.

    Args:
        model: a Sam3Image, or DDP around one.
        batch: on the model's device.
        precision: float32, or bfloat16 to multiply in.

    Raises:
        FloatingPointError: the model's outputs are not finite, in this or another process.
    """
    module: Any = getattr(model, "module", model)
    with _autocast(batch, precision):
        with _together(model, batch):
            outputs = _forward(model, batch)
        return _label_losses(model, criterion, outputs, _targets(module, batch))


def lesson_losses(
    model: nn.Module,
    criterion: nn.Module,
    batch: BatchedDatapoint,
    precision: torch.dtype,
    lesson: Distiller,
    stage: Stage,
) -> dict[str, torch.Tensor]:
    """Like `batch_losses`, of what a teacher teaches, and of labels in the last stage."""
    module: Any = getattr(model, "module", model)
    labelled: dict[str, torch.Tensor] = {}
    with _autocast(batch, precision):
        words = lesson.draw_words(batch)
        with _together(model, batch):
            outputs, features = _forward(model, batch, words, stage)
        taught = lesson.losses(batch, words, stage, outputs, features)
        total = torch.stack([*taught.values()]).sum()
        if stage == "answers" and lesson.config.labels:
            labelled = _label_losses(model, criterion, outputs, _targets(module.model, batch))
            total = total + lesson.config.labels * labelled.pop("loss")
    return {"loss": total, **labelled, **taught}


def _autocast(batch: BatchedDatapoint, precision: torch.dtype) -> torch.autocast:
    """Not accelerate's: its conversion of outputs to float32 cannot rebuild a SAM3Output.

    Its cache would keep each weight in bfloat16 to the end of the forward pass.
    """
    enabled = precision == torch.bfloat16
    return torch.autocast(
        batch.img_batch.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False
    )


def _together(model: nn.Module, batch: BatchedDatapoint) -> contextlib.AbstractContextManager[None]:
    grouped = hasattr(model, "module")
    return together(batch.img_batch.device) if grouped else contextlib.nullcontext()


def _targets(module: Any, batch: BatchedDatapoint) -> list[dict[str, torch.Tensor]]:
    return [module.back_convert(target) for target in batch.find_targets]


def _label_losses(
    model: nn.Module, criterion: nn.Module, outputs: Any, targets: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    losses = criterion(outputs, targets)
    if hasattr(model, "module"):
        losses = over_processes(losses, criterion, targets[0])
    parts = {name: losses[name].float() for name in PARTS if name in losses}
    return {"loss": losses["core_loss"], **parts}


def _forward(model: nn.Module, batch: BatchedDatapoint, *how: Any) -> Any:
    """The model's outputs; its matcher raises a ValueError where its costs are not finite."""
    try:
        return model(batch, *how)
    except ValueError as error:
        if "invalid numeric" not in str(error):
            raise
        raise FloatingPointError(str(error)) from None


def _check_finite(value: torch.Tensor) -> None:
    if not torch.isfinite(value):
        raise FloatingPointError


def build_optimizer(model: nn.Module, config: OptimConfig, lr_scale: float) -> Optimizer:
    """AdamW with upstream's groups: three learning rates, layer decay, no decay of biases.

    What is frozen is in none of them. It is taken out afterwards: upstream asserts that its groups
    cover all parameters, and that each of its patterns matches (optimizer.py:183, 241).
    """
    parts = OmegaConf.create(
        {
            "optimizer": config.optimizer,
            "options": _of_parts(config.options, model),
            "modifiers": config.param_group_modifiers,
        }
    )
    # Upstream's wrapper sets each group's rate from its own schedule once, and is then left behind.
    optimizer = construct_optimizer(
        model, parts.optimizer, parts.options, parts.modifiers
    ).optimizer
    for group in optimizer.param_groups:
        group["lr"] *= lr_scale
        group["params"] = [p for p in group["params"] if p.requires_grad]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def _of_parts(options: Mapping[str, Any], model: nn.Module) -> dict[str, list[Any]]:
    """Upstream's options without those of the text encoder, where stored words are in its place."""
    if any(name.startswith(TEXT) for name, _ in model.named_parameters()):
        return dict(options)
    return {
        kind: [entry for entry in entries if entry.get("param_names") != [f"{TEXT}*"]]
        for kind, entries in options.items()
    }


def build_accelerator(device: torch.device, *, find_unused: bool = True) -> Accelerator:
    """Device and process group of this process.

    On a CPU the same seed gives the same weights to the bit, for any number of threads.

    Args:
        find_unused: whether some of what is trained takes no part in a step.
    """
    torch.use_deterministic_algorithms(device.type == "cpu")
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
