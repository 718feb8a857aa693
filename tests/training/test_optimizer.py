from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.config.compose import load_config
from app.config.schema import ScheduleConfig
from app.model.build import build_model
from app.training.optimizer import build_optimizer, learning_rate_factor, learning_rates
from tests.helpers import MICRO

NAMES = ["inverse_sqrt", "linear", "cosine", "constant"]


def _config(name: str, warmup: int = 20, cooldown: int = 20) -> ScheduleConfig:
    return ScheduleConfig(name=name, warmup_steps=warmup, timescale=20, cooldown_steps=cooldown)


@given(
    st.sampled_from(NAMES), st.integers(1, 400), st.integers(0, 60), st.integers(0, 60), st.data()
)
def test_every_update_of_every_run_has_a_rate(name, total, warmup, cooldown, data) -> None:
    update = data.draw(st.integers(0, total - 1))
    factor = learning_rate_factor(update, total, _config(name, warmup, cooldown))
    assert 0 < factor <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_one_update(name: str) -> None:
    assert learning_rate_factor(0, 1, _config(name)) == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_it_rises_then_never_rises_again(name: str) -> None:
    factors = [learning_rate_factor(i, 1000, _config(name)) for i in range(1000)]
    peak = factors.index(max(factors))
    assert peak <= 21
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_known_points() -> None:
    assert learning_rate_factor(0, 1000, _config("linear")) == pytest.approx(1 / 21)
    assert learning_rate_factor(510, 1000, _config("linear")) == pytest.approx(490 / 980)
    assert learning_rate_factor(510, 1000, _config("cosine")) == pytest.approx(
        0.5 * (1 - math.cos(math.pi / 2))
    )
    assert learning_rate_factor(40, 1000, _config("inverse_sqrt")) == pytest.approx(2**-0.5)
    assert learning_rate_factor(999, 1000, _config("constant")) == 1.0


def test_rates_of_what_is_trained_alone() -> None:
    config = load_config()
    model = build_model(config.model, device="meta")
    rates = {"detector": 8e-5, "vision": 2.5e-5, "text": 5e-6}
    assert learning_rates(config.optim, model, 0.1) == pytest.approx(rates)
    model.backbone.language_backbone.requires_grad_(False)
    assert list(learning_rates(config.optim, model, 0.1)) == ["detector", "vision"]
    model.requires_grad_(False)
    model.backbone.vision_backbone.trunk.blocks[0].requires_grad_(True)
    assert list(learning_rates(config.optim, model, 0.1)) == ["vision"]


def test_learning_rates_are_upstreams_groups() -> None:
    config = load_config()
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optim, lr_scale=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[parameter]] = group["lr"]
            decays[names[parameter]] = group["weight_decay"]
    assert set(rates) == set(names.values())
    assert rates["transformer.decoder.query_embed.weight"] == pytest.approx(8e-5)
    assert rates["backbone.language_backbone.resizer.weight"] == pytest.approx(5e-6)
    assert rates["backbone.vision_backbone.convs.0.conv_1x1.weight"] == pytest.approx(2.5e-5)
    block = "backbone.vision_backbone.trunk.blocks.{}.mlp.fc1.weight"
    for index in range(4):  # a factor of 0.9 for each block further from the output
        assert rates[block.format(index)] == pytest.approx(2.5e-5 * 0.9 ** (4 - index))
    assert rates["backbone.vision_backbone.trunk.pos_embed"] == pytest.approx(2.5e-5)
    assert decays[block.format(0)] == pytest.approx(0.1)
    assert decays["backbone.vision_backbone.trunk.blocks.0.mlp.fc1.bias"] == 0
    assert decays["backbone.vision_backbone.trunk.blocks.0.norm1.weight"] == 0


def test_updates_counted_at_once_are_torchs() -> None:
    """To the bit, with its state, where a weight has no gradient too."""
    config, found = load_config([*MICRO]), []
    for cls in (None, torch.optim.AdamW):
        torch.manual_seed(0)
        model = build_model(config.model)
        optimizer = build_optimizer(model, config.optim, 1.0)
        assert type(optimizer) is not torch.optim.AdamW
        optimizer.__class__ = cls or type(optimizer)
        for _ in range(3):
            for name, parameter in model.named_parameters():
                if "geometry" not in name:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        state = {i: list(kept.values()) for i, kept in optimizer.state_dict()["state"].items()}
        found.append((list(model.parameters()), state))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert {float(kept[0]) for kept in found[0][1].values()} == {3.0}
