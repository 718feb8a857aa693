"""The exponential moving average (EMA) of the weights: often better than the last ones alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Average a model's trainable parameters over its updates.

    Args:
        decay: 0..1, weight of the average so far at each update; less in the first updates, or
            the first weights would stay in the average for long.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self._averages = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters as they are now to the average."""
        self.updates += 1
        decay = min(self.decay, self.updates / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averages for weights within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self._parameters):
            parameter.data, self._averages[i] = self._averages[i], parameter.data

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
