"""The trunk in fewer operations, tried on a CPU, is upstream's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sam3.model.vitdet import ViT
from torch import Tensor

from app.config.compose import load_model_config
from app.model.build import build_model
from app.model.upstream import trunk as ours

SIDE = 128
SIZE = ["model.vision.window_size=4"]


def _trunk(*words: str) -> Any:
    torch.manual_seed(0)
    trunk = build_model(load_model_config("nano", [*SIZE, *words])).backbone.vision_backbone.trunk
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return trunk


def _upstreams(trunk: Any, pixels: Tensor) -> list[Tensor]:
    return ViT.forward.__wrapped__(trunk, pixels)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_maps_and_gradients_are_upstreams(recomputed: bool, precision: torch.dtype) -> None:
    trunk = _trunk(f"model.activation_checkpointing={str(recomputed).lower()}")
    pixels = torch.randn(2, 3, SIDE, SIDE)
    tight = precision == torch.float32
    answers = []
    for encode in (ours.encode, _upstreams):
        with torch.autocast("cpu", precision, enabled=not tight):
            (found,) = encode(trunk, pixels)
        found.float().sin().sum().backward()
        answers.append([found, *(parameter.grad for parameter in trunk.parameters())])
        trunk.zero_grad()
    assert answers[0][0].std() > 0.1
    for our, their in zip(*answers, strict=True):
        assert our.dtype == their.dtype
        difference = (our - their).float().norm() / their.float().norm()
        assert difference < (1e-5 if tight else 0.03)


def test_predictions_are_upstreams() -> None:
    trunk, pixels = _trunk().eval(), torch.randn(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        torch.testing.assert_close(ours.encode(trunk, pixels), _upstreams(trunk, pixels))


def test_depth_is_that_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image whose blocks are all left out keeps its patches; a factor of 1 changes nothing."""
    trunk, pixels = _trunk(), torch.randn(2, 3, SIDE, SIDE)
    factors = torch.tensor([0.0, 1.0])
    monkeypatch.setattr(ours, "_depth", lambda *_: [(factors, factors)] * len(trunk.blocks))
    (found,) = ours.encode(trunk, pixels)
    (whole,) = _upstreams(trunk, pixels)
    trunk.blocks = torch.nn.ModuleList()
    monkeypatch.setattr(ours, "_depth", lambda *_: [])
    (patches,) = ours.encode(trunk, pixels)
    torch.testing.assert_close(found[0], patches[0])
    torch.testing.assert_close(found[1], whole[1])


def test_depth_is_drawn_as_upstream_draws_it() -> None:
    trunk, tokens = _trunk("model.vision.drop_path=0.5"), torch.zeros(4000, 1, 1, 1)
    rates = [0, 1 / 6, 1 / 3, 1 / 2]
    for rate, factors in zip(rates, ours._depth(trunk, tokens), strict=True):
        for factor in factors:
            assert factor.shape == (4000,)
            assert (factor == 0).float().mean().item() == pytest.approx(rate, abs=0.05)
            torch.testing.assert_close(factor.max(), torch.tensor(1 / (1 - rate)))
    assert ours._depth(trunk.eval(), tokens) == [(None, None)] * 4


def test_a_cpu_takes_upstreams_way() -> None:
    assert not ours.is_usual(_trunk(), torch.zeros(1, 3, SIDE, SIDE))
