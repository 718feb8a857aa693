"""What a process on a GPU finds of faults that only a GPU has, as JSON. Usage: faults.py SHAPES"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from app.compression.importance import Measure
from app.config.compose import load_config
from app.datasets.build import load_splits
from app.model.build import build_model
from app.model.device import choose_device, choose_precision, free_memory
from app.training.batches import query_dataset
from app.training.random_state import random_state, restore_random_state
from app.training.step import build_accelerator
from tests.helpers import MICRO
from tests.training.updates import make_updates


def tensors(part: Any) -> list[torch.Tensor]:
    """Return all tensors of a batch."""
    if isinstance(part, torch.Tensor):
        return [part]
    if isinstance(part, list):
        return [tensor for each in part for tensor in tensors(each)]
    if dataclasses.is_dataclass(part):
        return tensors([getattr(part, field.name) for field in dataclasses.fields(part)])
    return []


def main(folder: Path) -> dict[str, Any]:
    """Return the findings by name."""
    found: dict[str, Any] = {}
    device = choose_device()
    splits = load_splits(folder)
    config = load_config([*MICRO, "training.num_workers=1", "dataset.views=2"])
    data = query_dataset(config, splits.train)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    precision = choose_precision(config.training.precision, device, config.model)
    found["precision"] = str(precision)
    updates = make_updates(config, model, data, build_accelerator(device))

    group = next(iter(updates.batches.epoch(0)))
    found["pinned"] = [tensor.is_pinned() for tensor in tensors(group) if tensor.numel()]
    updates.step.set_training()
    updates.step(group, 0)

    state = random_state()
    data[(0, 0)]
    found["a drawn image leaves the generator"] = torch.equal(
        state["cuda"], torch.cuda.get_rng_state()
    )
    measure = Measure(config, model, splits.valid, torch.float32)
    measure.mean_loss(model)
    found["a measured image leaves the generator"] = torch.equal(
        state["cuda"], torch.cuda.get_rng_state()
    )
    torch.cuda.manual_seed(5)
    every = torch.cuda.get_rng_state_all()
    restore_random_state(state | {"cuda": [*every, every[0], every[0]]})
    found["states of more GPUs are taken"] = torch.equal(torch.cuda.get_rng_state(), every[0])

    before = free_memory(device)
    held = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    found["held"] = before - free_memory(device)
    del held
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
