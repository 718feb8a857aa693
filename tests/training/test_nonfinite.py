from __future__ import annotations

import pytest
import torch
from torch import nn

from app.training.nonfinite import NotFiniteError, finite_outputs


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Sigmoid())


def test_the_first_module_is_named() -> None:
    model = _model()
    nn.init.constant_(model[1][1].weight, float("inf"))
    with finite_outputs(model), pytest.raises(NotFiniteError, match=r"^1\.1 \(Linear\)"):
        model(torch.ones(1, 2))


def test_off_it_sets_no_hook_and_on_it_leaves_none() -> None:
    model = _model()
    with finite_outputs(model, enabled=False):
        assert not any(m._forward_hooks for m in model.modules())
    with finite_outputs(model):
        assert model[0]._forward_hooks
        model(torch.ones(1, 2))
    assert not any(m._forward_hooks for m in model.modules())
