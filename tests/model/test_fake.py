"""Fake tensors beside real ones: the same shapes, strides, types, shared memory and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.model.fake import Fake, FakeMode, make_fake


def _views(x: Tensor) -> list[Tensor]:
    return [x.T, x[1:], x.reshape(2, 12), x.unsqueeze(1).expand(-1, 3, -1), *x.unbind(), x.detach()]


def _new(x: Tensor) -> list[Tensor]:
    values, indices = x.max(dim=1)
    made = [values, indices, x @ x.T, x.T.contiguous(), torch.cat([x, x]), F.layer_norm(x, (6,))]
    return [*made, x > 0, x * 2, x * True, x.half() + 1, torch.arange(3) + x[0, :3], x.softmax(1)]


def _in_place(x: Tensor) -> list[Tensor]:
    y = torch.zeros(4, 6)
    y[1:3] += 1
    return [
        y.copy_(x).relu_(),
        y.t()[0],
        torch.tensor([1.0, 2.0]).mul_(3),
        y.masked_fill_(y > 0, 2),
    ]


def _narrow(x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [x @ x.T, F.softmax(x @ x.T, dim=0), F.linear(x, x[:2]).sum()]


@pytest.mark.parametrize("work", [_views, _new, _in_place, _narrow])
def test_the_same_as_of_real_tensors(work: Callable[[Tensor], list[Tensor]]) -> None:
    real = work(torch.randn(4, 6))
    mode = FakeMode()
    for _ in range(2):  # computed, then taken from the cache
        with mode:
            found = work(torch.empty(4, 6))
        described = [[(t.shape, t.stride(), t.dtype, t.device) for t in ts] for ts in (found, real)]
        assert described[0] == described[1]
        assert _sharing(found) == _sharing(real)


def _sharing(tensors: list[Tensor]) -> list[list[bool]]:
    """Which of them lie in the same memory."""
    inner = [t.meta if isinstance(t, Fake) else t for t in tensors]
    places = [t.untyped_storage()._cdata for t in inner]
    return [[a == b for b in places] for a in places]


def test_gradients_reach_what_asks_for_them() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.BatchNorm1d(8), nn.Linear(8, 2)).to("meta")
    model[0].requires_grad_(False)
    with FakeMode():
        make_fake(model)
        nn.utils.parametrize.register_parametrization(model[3], "weight", Halved())
        model(torch.empty(5, 4)).square().sum().backward()
    named: dict[str, Any] = dict(model.named_parameters())
    assert {name for name, value in named.items() if value.grad is not None} == {
        *("2.weight", "2.bias", "3.bias", "3.parametrizations.weight.original")
    }
    for value in named.values():
        assert value.grad is None or value.grad.shape == value.shape
    assert all(isinstance(value, Fake) for value in (*named.values(), *model.buffers()))


def test_what_is_shared_is_shared() -> None:
    first = nn.Linear(3, 3, device="meta")
    model = nn.ModuleDict({"a": first, "b": nn.Linear(3, 3, device="meta")})
    model["b"].weight = first.weight
    make_fake(model)
    assert model["a"].weight is model["b"].weight


def test_real_tensors_stay_real() -> None:
    real = torch.arange(4)
    with FakeMode():
        assert (real * 2).tolist() == [0, 2, 4, 6]
        assert isinstance(real + torch.zeros(4), Fake)
        with pytest.raises(NotImplementedError, match="its shape changes in place"):
            torch.zeros(2, 3).t_()
