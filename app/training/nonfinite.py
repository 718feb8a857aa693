"""Find where a loss or gradient first was not finite: which module, which images."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from sam3.model.data_misc import BatchedDatapoint
from torch import Tensor, nn

if TYPE_CHECKING:
    from app.training.step import Step


class NotFiniteError(FloatingPointError):
    """Raise where a module's output, a loss or a gradient is NaN or infinite; names it."""


def explain(step: Step, batches: Sequence[BatchedDatapoint], epoch: int) -> str:
    """Return the message that names module and images; undo what the update had begun.

    The batches are computed again: once with every module's output watched, then with every
    parameter's gradient watched. The fault may be on one rank alone, and all ranks go through the
    same passes, because those that go backward wait for one another.
    """
    ids = [id for batch in batches for id in batch.find_metadatas[0].coco_image_id.tolist()]
    images = ", ".join(str(step.paths[id]) for id in dict.fromkeys(ids))
    faults: list[tuple[str, str]] = []
    for find in (_faulty_module, _faulty_gradient):
        step.undo()
        fault = find(step, batches, epoch)
        faults = gather_object([(fault, images)] if fault else [])  # of all ranks
        if faults:
            break
    step.undo()
    faults = faults or [("no module and no gradient alone", images)]
    where = "; ".join(f"{fault}; with the images {images}" for fault, images in faults)
    in_float16 = step.losses.precision == torch.float16
    beyond = " So does training.precision=fp32, with its larger range." if in_float16 else ""
    return (
        f"The loss or its gradient is not finite: {where}. "
        f"The weights were not updated. A lower --lr often mends it.{beyond}"
    )


def _faulty_module(step: Step, batches: Sequence[BatchedDatapoint], epoch: int) -> str | None:
    """Run the batches again and return the first module whose output is not finite."""
    criterion = step.losses.criterion
    normalization, criterion.normalization = criterion.normalization, "local"  # no other ranks
    try:
        for batch in batches:
            step.batch_losses(batch, epoch, watched=True)
    except FloatingPointError as error:
        return str(error)
    finally:
        criterion.normalization = normalization
    return None


def _faulty_gradient(step: Step, batches: Sequence[BatchedDatapoint], epoch: int) -> str | None:
    """Run the batches again, backward too, and return the first gradient that is not finite."""
    faults: list[str] = []

    def watch(name: str, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            faults.append(f"the gradient of {name} is the first that is not")

    hooks = [
        parameter.register_hook(functools.partial(watch, name))
        for name, parameter in step.module.named_parameters()
        if parameter.requires_grad
    ]
    try:
        for batch in batches:
            step.batch_losses(batch, epoch, watched=True)["loss"].backward()
    finally:
        for hook in hooks:
            hook.remove()
    return faults[0] if faults else None


@contextlib.contextmanager
def finite_outputs(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Watch every leaf module of `model`; costs nothing when not enabled, for no hook is set.

    Raises:
        NotFiniteError: at the first output with NaN or infinity, from within the forward pass.
    """
    handles = [
        module.register_forward_hook(_raise_if_not_finite(name))
        for name, module in model.named_modules()
        if enabled and next(module.children(), None) is None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _raise_if_not_finite(name: str) -> Any:
    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            is_float = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            if is_float and not tensor.detach().isfinite().all():  # nothing for autograd
                raise NotFiniteError(
                    f"{name} ({type(module).__name__}) put out a value that is not finite"
                )

    return hook
