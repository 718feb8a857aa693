from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.schema import ScheduleConfig
from app.training.schedule import learning_rate_factor

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
