"""The learning curve: a known law is found again, and its interval is as wide as noise is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from app.evaluation.learning_curve import POWERS, Law, fit

SIZES = [1, 3, 10, 30, 100]


def test_a_law_without_noise_is_found_again() -> None:
    law = Law(0.8, 0.7, 0.5)
    values = law(np.array(SIZES, dtype=float))
    fitted = fit(SIZES, [float(value) for value in values])
    x = np.array([2.0, 20.0, 200.0])
    assert np.allclose(fitted.law(x), law(x), atol=0.02)
    gain, spread = fitted.gain(100, 20)
    assert gain == pytest.approx(float(np.diff(law(np.array([100.0, 120.0])))[0]), abs=0.003)
    assert spread < 0.005


def test_the_interval_covers_the_law() -> None:
    """Of repeated draws; 95 % by name, with few runs to tell the noise from."""
    law, covered, draws = Law(0.7, 0.6, 0.6), 0, 60
    random = np.random.default_rng(1)
    sizes = SIZES * 3
    x = np.array([40.0])
    for seed in range(draws):
        noise = random.normal(0, 0.05, len(sizes))
        values = law(np.array(sizes, dtype=float)) + noise
        low, high = fit(sizes, [float(value) for value in values], seed).bounds(x)
        covered += bool(low[0] <= law(x)[0] <= high[0])
    assert covered >= 0.82 * draws


def test_it_is_the_least_squares() -> None:
    """Within the limits of a law, as scipy finds it."""
    random = np.random.default_rng(3)
    x = np.array(SIZES, dtype=float)
    for _ in range(5):
        y = np.sort(random.uniform(0.2, 0.8, len(SIZES)))
        law = fit(SIZES, [float(value) for value in y]).law
        costs = [
            lsq_linear(
                np.stack([np.ones_like(x), -(x**-power)], axis=1), y, bounds=([0, 0], [1, np.inf])
            ).cost
            for power in POWERS
        ]
        assert ((y - law.top + law.fall * x**-law.power) ** 2).sum() / 2 == pytest.approx(
            min(costs)
        )


def test_a_curve_never_falls_and_stays_within_0_and_1() -> None:
    fitted = fit([1, 10, 100], [0.9, 0.5, 0.2])
    values = fitted.law(np.geomspace(1, 1000, 20))
    assert (np.diff(values) >= 0).all()
    assert ((values >= 0) & (values <= 1)).all()
    with pytest.raises(ValueError, match="two numbers of images"):
        fit([3, 3], [0.1, 0.2])
