"""Tensors that have a shape, a type and a device, and no contents: what a step makes is counted
without doing its arithmetic.

Torch's own FakeTensor does the same and takes some 0.3 ms for each operation; the 31,000 of a step
at full size are too many for a plan that a person waits for. Here an operation on shapes that were
seen before costs a tenth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, META = torch.device("cpu"), torch.device("meta")
DETACH, SET = torch.ops.aten.detach_.default, torch.ops.aten.set_.source_Tensor


class Hollow(Tensor):
    """A tensor of the CPU without contents; autograd and autocast take it for a real one.

    Attributes:
        meta: the same on the meta device; views share its storage.
    """

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> Hollow:
        tensor: Hollow = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=CPU,
        )
        tensor.meta = meta
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # any operation, as torch passes it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


class Hollowing(TorchDispatchMode):
    """What is made within from nothing is hollow; what is made of real tensors alone is real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_hollow(func, types, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to keep the compiler away costs time


def run_hollow(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What `Hollowing` does with an operation."""
    if Hollow in types or ("device" in kwargs and not _tensors((args, kwargs))):
        return _dispatch(func, args, kwargs)
    return func(*args, **kwargs)


def hollow(model: nn.Module) -> None:
    """Put hollow tensors in place of a model's, which are on the meta device."""
    made: dict[Tensor, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, Hollow):
                if parameter not in made:
                    data = Hollow(parameter.data)
                    made[parameter] = nn.Parameter(data, parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, Hollow):
                module._buffers[name] = made.setdefault(buffer, Hollow(buffer))


class _Made(NamedTuple):
    """A tensor that an operation makes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


# An operation and what it is given → what it makes of that, in the same structure.
_known: dict[Any, Any] = {}


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    schema = func._schema
    if schema.is_mutable and len(schema.returns) == 1:  # in place
        if func is SET and args[0].shape == args[1].shape:  # as parametrizations do
            args[0].meta = args[1].meta
        elif torch.Tag.inplace_view in func.tags and func is not DETACH:
            raise NotImplementedError(f"{func} of a hollow tensor: its shape changes in place")
        return kwargs.get("out", args[0])
    key = None if func.is_view else _key((func, args, kwargs))
    if key in _known:
        return _map(_make, _known[key])
    given = _map(_to_meta, args)
    options = {name: _map(_to_meta, value) for name, value in kwargs.items()}
    if "device" in options:
        options["device"] = META
    outputs = func(*given, **options)
    if key is not None and not _share(outputs, given):
        _known[key] = _map(_describe, outputs)
    return _map(_wrap, outputs)


def _key(value: Any) -> Any:
    """What can be looked up: shapes and types of tensors, all else as it is."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(part)) for name, part in value.items())
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


def _map(function: Any, value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not isinstance(value, _Made):
        return type(value)(_map(function, part) for part in value)
    return function(value)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Hollow):
        return value.meta
    return value.to(META) if isinstance(value, Tensor) else value


def _wrap(value: Any) -> Any:
    return Hollow(value) if isinstance(value, Tensor) else value


def _describe(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Made(tuple(value.shape), value.stride(), value.dtype)


def _make(value: Any) -> Any:
    if not isinstance(value, _Made):
        return value
    size, stride, dtype = value
    return Hollow(torch.empty_strided(size, stride, dtype=dtype, device=META))


def _share(outputs: Any, given: Any) -> bool:
    """Whether something that came out lies in the memory of what went in, as of `_unsafe_view`."""
    after, before = (
        {tensor.untyped_storage()._cdata for tensor in _tensors(part)} for part in (outputs, given)
    )
    return not after.isdisjoint(before)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
