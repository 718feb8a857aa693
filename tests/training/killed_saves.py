"""Saves that are killed: `python -m tests.training.killed_saves FOLDER KILLS`.

After each kill the newest checkpoint is loaded, as a resumed run does. Each child, forked from this
warm process, goes on from there and saves after each of its updates until it kills itself, for
real: before one of its file operations, or within a file.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from hydra.utils import instantiate

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.queries import QueryDataset
from app.datasets.synthetic.shapes import make_shapes
from app.model import weights
from app.model.build import build_model
from app.training import checkpoints
from app.training.checkpoints import RunState
from app.training.random_state import random_state
from app.training.step import build_accelerator
from tests import kills
from tests.helpers import MICRO
from tests.training.updates import make_updates


def main() -> None:
    folder, made = Path(sys.argv[1]), int(sys.argv[2])
    logging.disable()
    torch.set_num_threads(1)
    config = load_config(MICRO)
    make_shapes(folder / "set", train=2, valid=1, fog=0, width=64, height=64, seed=0)
    transforms = [instantiate(node) for node in config.transforms.train]
    data = QueryDataset(load_splits(folder / "set").train, transforms, seed=0)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    updates = make_updates(
        config, model, data, build_accelerator(torch.device("cpu")), lr_scale=1.0
    )
    list(updates.epoch(0))  # so that the optimiser has its moments
    first = next(model.parameters())

    def save(state: RunState) -> None:
        with torch.no_grad():
            first.fill_(state.updates)  # as an update would, and known again
        header = weights.Header(model=config.model)
        states = [random_state()]
        checkpoints.save(
            folder / "run", state, model, header, updates.step, fingerprint={}, random_states=states
        )

    def load() -> RunState:
        newest = checkpoints.find_newest(folder / "run")
        assert newest is not None
        weights.load_into(model, newest, merge=False)
        state = checkpoints.restore(newest, updates.step, 0)
        assert newest.name == f"update-{state.updates:08d}"
        assert (first == state.updates).all(), "weights and state are of two saves"
        return state

    state = RunState()
    save(state)
    operations = _operations(folder / "run", lambda: save(state))
    longest = max(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
    partial = 0
    for number in range(made):
        child = os.fork()
        if child == 0:
            _kill(number // 2, number % 2 == 0, folder / "run", operations, longest)
            while True:
                state.updates += 1
                save(state)
        _, status = os.waitpid(child, 0)
        assert status in (signal.SIGKILL, signal.SIGXFSZ), status
        partial += any((folder / "run").glob(".update-*.part-*"))
        state = load()
    state.updates += 1
    save(state)
    assert len(list((folder / "run").iterdir())) == checkpoints.KEEP  # nothing is left behind
    print(json.dumps({"kills": made, "within a save": partial, "updates": state.updates}))


def _operations(folder: Path, save: Callable[[], object]) -> int:
    """Return how many file operations a save has."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        count = kills.before_operation(-1, folder)
        save()
        os.write(writing, str(count()).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return int(os.read(reading, 100))


def _kill(number: int, by_operation: bool, folder: Path, operations: int, longest: int) -> None:
    """Choose the place of this process's end: in the first save, or in the two after it."""
    if by_operation:
        kills.before_operation(1 + number % (3 * operations), folder)
    else:
        kills.within_a_file(number * 7919 % longest)  # a prime spreads the sizes


if __name__ == "__main__":
    main()
