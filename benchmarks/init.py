"""Is a first training step finite, whatever the seed? Exits 1 where one is not.

    .venv/bin/python -m benchmarks.init --size small --seeds 50

At size sam3 a seed takes some 30 s on 2 cores, most of it initialisation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra.utils import instantiate

from app.config.compose import load_config
from app.config.schema import Config
from app.datasets.build import load_splits
from app.datasets.queries import QueryDataset, collate
from app.datasets.synthetic.shapes import make_shapes
from app.model.build import build_model


def query_dataset(config: Config, folder: Path) -> QueryDataset:
    transforms = [instantiate(node) for node in config.transforms.train]
    return QueryDataset(load_splits(folder).train, transforms, seed=0)


def first_step_is_finite(config: Config, data: QueryDataset, seed: int) -> bool:
    """Check the loss and all gradients of a model that was built with `seed`, on two images."""
    torch.manual_seed(seed)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    batch = collate([data[0], data[1]])
    targets = [model.back_convert(target) for target in batch.find_targets]
    loss = instantiate(config.loss.criterion, _convert_="all")(model(batch), targets)["core_loss"]
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(torch.isfinite(loss)) and all(bool(torch.isfinite(g).all()) for g in gradients)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="nano")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--resolution", type=int, default=112)
    arguments = parser.parse_args()
    config = load_config(
        [
            f"model={arguments.size}",
            f"model.resolution={arguments.resolution}",
            "model.mask_points=64",
        ]
    )
    begun, finite = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        make_shapes(Path(folder) / "set", train=2, valid=1, fog=0, width=96, height=64)
        data = query_dataset(config, Path(folder) / "set")
        for seed in range(arguments.seeds):
            finite += first_step_is_finite(config, data, seed)
            print(f"{finite} of {seed + 1}", file=sys.stderr)
    seconds = time.monotonic() - begun
    print(f"{arguments.size}: {finite} of {arguments.seeds} first steps finite, {seconds:.0f} s")
    return 0 if finite == arguments.seeds else 1


if __name__ == "__main__":
    sys.exit(main())
