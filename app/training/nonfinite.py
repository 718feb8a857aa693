"""A guard that names the first module whose output is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class NotFiniteError(FloatingPointError):
    """A module put out NaN or infinity; the message names it."""


@contextlib.contextmanager
def finite_outputs(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Watch every leaf module of `model`; costs nothing when not enabled, for no hook is set.

    Raises:
        NotFiniteError: at the first output with NaN or infinity, from within the forward pass.
    """
    handles = [
        module.register_forward_hook(_check(name))
        for name, module in model.named_modules()
        if enabled and next(module.children(), None) is None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(name: str) -> Any:
    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            is_float = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            if is_float and not tensor.detach().isfinite().all():  # nothing for autograd
                raise NotFiniteError(
                    f"{name} ({type(module).__name__}) put out a value that is not finite"
                )

    return hook
