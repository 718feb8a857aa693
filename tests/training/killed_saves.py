"""Saves killed at random moments: `python -m tests.training.killed_saves FOLDER KILLS`.

After each kill the newest checkpoint is loaded, as a resumed run does. Each child, forked from this
warm process, goes on from there and saves after each of its updates until it is killed, for real.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
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
from tests.conftest import TINY
from tests.training.updates import make_updates

# Saves and loads in a blink, so that most of the time goes into saves.
SMALL = (
    *("model.text.width=8", "model.text.num_heads=1", "model.vision.embed_dim=32"),
    *("model.d_model=16", "model.num_heads=2", "model.feedforward=16", "model.num_queries=8"),
    *("model.vision.depth=2", "model.vision.global_blocks=[1]", "model.text.depth=1"),
    *("model.encoder_layers=1", "model.decoder_layers=1"),
)


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    logging.disable()
    torch.set_num_threads(1)
    config = load_config([*TINY, *SMALL])
    make_shapes(folder / "set", train=2, valid=1, width=64, height=64, seed=0)
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
        weights.load_into(model, newest)
        state = checkpoints.restore(newest, updates.step, 0)
        assert newest.name == f"update-{state.updates:08d}"
        assert (first == state.updates).all(), "weights and state are of two saves"
        return state

    state = RunState()
    save(state)
    begun = time.monotonic()
    save(state)
    longest = 2 * (time.monotonic() - begun)  # some saves end before the kill, some do not
    moments = random.Random(0)
    partial = 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            while True:
                state.updates += 1
                save(state)
        time.sleep(moments.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        partial += any((folder / "run").glob(".update-*.part-*"))
        state = load()
    state.updates += 1
    save(state)
    assert len(list((folder / "run").iterdir())) == checkpoints.KEEP  # nothing is left behind
    print(json.dumps({"kills": kills, "within a save": partial, "updates": state.updates}))


if __name__ == "__main__":
    main()
