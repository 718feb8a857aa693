"""The full state of a run: saved whole, found, resumed."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sam3.model.sam3_image import Sam3Image
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from app.errors import UserError
from app.files import atomic_folder
from app.model import weights

KEEP = 2  # newest checkpoints


@dataclass
class RunState:
    """How far a run has come.

    Attributes:
        epoch: epochs that are done.
        best: the best value of the chosen metric so far; None before the first validation.
        rows: the rows of metrics.csv.
        baseline: figures before training.
    """

    epoch: int = 0
    best: float | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    baseline: dict[str, float] = field(default_factory=dict)


def save(
    folder: Path,
    state: RunState,
    model: Sam3Image,
    header: weights.Header,
    optimizer: Optimizer,
    scheduler: LRScheduler,
) -> None:
    """Write `folder/epoch-NNNN/`, whole or not at all, and drop all but the newest two."""
    with atomic_folder(folder / f"epoch-{state.epoch:04d}") as temporary:
        weights.save(model, temporary, header)
        content = {
            "run": vars(state),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": _random_state(),
        }
        torch.save(content, temporary / "state.pt")
    for old in _epochs(folder)[:-KEEP]:
        shutil.rmtree(old)


def find_newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`; None where a run was stopped before its first."""
    epochs = _epochs(folder)
    return epochs[-1] if epochs else None


def restore(
    checkpoint: Path, model: Sam3Image, optimizer: Optimizer, scheduler: LRScheduler
) -> RunState:
    """Load what `save` wrote into the parts of a run, random states included."""
    weights.load_into(model, checkpoint)
    try:
        content = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["scheduler"])
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"{checkpoint}: cannot be resumed with these settings ({error}). Resume with the "
            "settings it was started with, or start anew from its weights with --checkpoint."
        ) from None
    _restore_random_state(content["random"])
    return RunState(**content["run"])


def _epochs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("epoch-*") if (path / "state.pt").is_file())


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
