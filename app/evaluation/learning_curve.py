"""A figure over the number of labelled images, and what more of them would bring.

The form is a power law, as learning curves of deep networks have it (Hestness et al., "Deep
Learning Scaling is Predictable, Empirically", arXiv 1712.00409).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POWERS = np.geomspace(0.1, 2.0, 12)
RESAMPLINGS = 200
LEVELS = (0.025, 0.975)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """Hold the curve `top - fall * images ** -power`, 0..1."""

    top: float
    fall: float
    power: float

    def __call__(self, images: Array) -> Array:
        """Return the figure at numbers of images."""
        found: Array = np.clip(self.top - self.fall * images**-self.power, 0.0, 1.0)
        return found


@dataclass(frozen=True)
class Fitted:
    """Hold the law that is nearest to what was measured, and others that noise as large allows."""

    law: Law
    others: tuple[Law, ...]

    def bounds(self, images: Array) -> tuple[Array, Array]:
        """Return the 95 % interval of the law at numbers of images."""
        values = np.array([other(images) for other in self.others])
        low, high = np.quantile(values, LEVELS, axis=0)
        return low, high

    def gain(self, images: int, more: int) -> tuple[float, float]:
        """Return what so many more images would bring, and half of its 95 % interval."""
        ends = np.array([images, images + more], dtype=np.float64)
        gains = [float(np.diff(law(ends))[0]) for law in (self.law, *self.others)]
        low, high = np.quantile(gains[1:], LEVELS)
        return gains[0], float(high - low) / 2


def fit(images: Sequence[int], values: Sequence[float], seed: int = 0) -> Fitted:
    """Fit the law to a figure that was measured at numbers of images, some of them repeatedly.

    The others are fitted to the law with noise of the spread that the measurements have around it.

    Raises:
        ValueError: fewer than two numbers of images.
    """
    if len(set(images)) < 2:
        raise ValueError("a curve takes two numbers of images")
    x, y = np.array(images, dtype=np.float64), np.array(values, dtype=np.float64)
    (law,) = _nearest(x, y[None])
    free = max(len(y) - 3, 1)  # three numbers are fitted
    spread = float(np.sqrt(((y - law(x)) ** 2).sum() / free))
    random = np.random.default_rng(seed)
    noisy = law(x) + random.normal(0, spread, (RESAMPLINGS, len(x)))
    return Fitted(law, tuple(_nearest(x, noisy)))


def _nearest(x: Array, values: Array) -> list[Law]:
    """Return the law of the least squares to each row of values (R, N), by a search over powers.

    A law has two linear numbers: the least within their limits is free, or lies on one of these.
    """
    costs, found = [], []
    for power in POWERS:
        falls = -(x**-power)  # (N,)
        free = np.linalg.lstsq(np.stack([np.ones_like(x), falls], axis=1), values.T, rcond=None)[0]
        tops = [free[0], values.mean(axis=1), np.zeros(len(values)), np.ones(len(values))]
        drops = [free[1], np.zeros(len(values))]
        drops += [
            np.maximum((values - top[:, None]) @ falls / (falls @ falls), 0) for top in tops[2:]
        ]
        for top, drop in zip(tops, drops, strict=True):
            is_law = (top >= 0) & (top <= 1) & (drop >= 0)
            errors = values - top[:, None] - drop[:, None] * falls
            costs.append(np.where(is_law, (errors**2).sum(axis=1), np.inf))
            found.append((top, drop, power))
    best = np.argmin(costs, axis=0)
    return [
        Law(float(found[k][0][row]), float(found[k][1][row]), float(found[k][2]))
        for row, k in enumerate(best)
    ]
