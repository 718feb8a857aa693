"""The random state: it is set again wherever a run goes on."""

from __future__ import annotations

import random

import numpy as np
import torch

from app.training.random_state import random_state, restore_random_state


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_what_was_drawn_comes_again() -> None:
    state = random_state()
    drawn = _draw()
    assert _draw() != drawn
    restore_random_state(state)
    assert _draw() == drawn


def test_a_state_of_gpus_is_taken_on_a_machine_without_them() -> None:
    """Also that of an older checkpoint, which lists all GPUs that its machine had."""
    state = random_state()
    drawn = _draw()
    for of_gpus in (torch.get_rng_state(), [torch.get_rng_state()] * 2, []):
        restore_random_state(state | {"cuda": of_gpus})
        assert _draw() == drawn
