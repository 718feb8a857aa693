"""The random state of this process: of dropout, drop path and the choice of mask points."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """Return the states of Python, NumPy, torch and this process's GPU, None where it has none.

    `weights_only=True` reads them. Those of other GPUs are of no use here, and a machine that the
    run goes on at may have fewer.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set what `random_state` returned; the GPU's where the run goes on at one.

    Older checkpoints hold a list, of all GPUs that were visible.
    """
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and len(state["cuda"]) and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_own(state["cuda"]))


def _own(states: Tensor | list[Tensor]) -> Tensor:
    """Return the state of this process's GPU."""
    if isinstance(states, Tensor):
        return states
    return states[min(torch.cuda.current_device(), len(states) - 1)]
