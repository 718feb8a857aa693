"""Can a SAM 3 learn at all? nano, 8 images of shapes on plain ground, random weights, a CPU.

The known failure of compact SAM 3s is AP 0; this is its regression check. Exits 1 below the goal.
    .venv/bin/python -m benchmarks.overfit
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import tempfile
import time
from pathlib import Path

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.synthetic.shapes import make_shapes
from app.tracking.files import Tracker
from app.training import run
from app.training.output_folder import prepare_folder

GOAL = {"bbox/AP": 0.95, "segm/AP": 0.95}
GOAL_SECONDS = 240


def overfit(folder: Path, *, images: int, epochs: int, overrides: list[str]) -> dict[str, float]:
    """Train on a few shape images and validate on the same ones; returns the figures."""
    settings = {
        "fog": 0,
        "max_shapes": 5,
        "background": "plain",
        "radius": [0.06, 0.18],
        "turn": 180,
    }
    make_shapes(folder / "shapes", train=images, valid=1, seed=0, **settings)
    splits = load_splits(folder / "shapes")
    config = load_config(
        [
            f"output_dir={folder / 'run'}",
            f"training.epochs={epochs}",
            f"evaluation.every={epochs}",
            f"training.save_every={epochs}",
            "training.batch_size=4",
            "optim.schedule.name=linear",
            "optim.max_grad_norm=1.0",
            "optim.lr=1.2e-3",
            "optim.lr_vision=1.2e-3",
            "optim.lr_text=1.2e-3",
            "optim.layer_decay=1.0",
            "transforms=none",
            "dataset.negatives=0",
            *overrides,
        ]
    )
    folder = Path(config.output_dir)
    prepare_folder(folder, resume=None, overwrite=False)
    both = dataclasses.replace(splits, valid=splits.train)
    return run.train(config, both, None, recorder=Tracker(folder)).figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=230)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, help="keep the images and the run here")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        figures = overfit(folder, images=8, epochs=arguments.epochs, overrides=arguments.overrides)
    seconds = time.monotonic() - begun
    print(f"epochs {arguments.epochs}, {seconds:.0f} s (goal {GOAL_SECONDS} s)")
    for name, goal in GOAL.items():
        print(f"{name} {figures[name]:.3f} (goal {goal})")
    reached = all(figures[name] >= goal for name, goal in GOAL.items())
    return 0 if reached and seconds <= GOAL_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
