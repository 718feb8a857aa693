"""Measure nano alone and beside two busy processes: an update of 2 images, and a prediction.

And a prediction of a wide size, which computes on several threads. Each figure is the median of a
process of its own. Exits 1 where a goal is missed.

    .venv/bin/python -m benchmarks.contention           # 3 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from app.config.compose import load_config, load_model_config
from app.datasets.build import load_splits
from app.datasets.synthetic.shapes import make_shapes
from app.inference.finder import Finder
from app.inference.predictor import Predictor
from app.inference.worker import Settings, load_predictor
from app.model.build import build_model
from app.model.bundled import NANO
from app.model.device import choose_device, choose_threads
from benchmarks.training import make_step, time_updates

BUSY = 2  # processes
SLOWER = 2.0  # times as long beside them, at most
FASTER = 1.3  # times the speed of an update that recomputes, on as many threads as there are cores
RECOMPUTING = "model.activation_checkpointing=[vision,masks]"
PREDICTIONS = 30
WIDE_RESOLUTION, WIDE_PREDICTIONS = 336, 5


def update(folder: Path, *settings: str) -> float:
    """Return the seconds of an update of 2 images."""
    config = load_config(["model=nano", "training.batch_size=2", "transforms=none", *settings])
    choose_threads(choose_device(), config.model)
    step, batches = make_step(config, folder)
    time_updates(step, batches)  # warms up
    return statistics.median(time_updates(step, batches))


def prediction(folder: Path) -> float:
    """Return the seconds of a prediction of one image with one prompt."""
    return _predict(load_predictor(Settings(checkpoint=str(NANO))), folder, PREDICTIONS)


def wide(folder: Path) -> float:
    """Return the seconds of a prediction of a wide size, from random weights."""
    config = load_model_config("small", [f"model.resolution={WIDE_RESOLUTION}"])
    choose_threads(choose_device(), config)
    return _predict(Predictor(build_model(config), config), folder, WIDE_PREDICTIONS)


def _predict(predictor: Finder, folder: Path, count: int) -> float:
    image = load_splits(folder / "set").train.images[0]
    with Image.open(image.path) as opened:
        pixels = opened.convert("RGB")
    seconds = []
    for number in range(count):
        pixels.paste((8 * number, 0, 0), (0, 0, 40, 40))  # its features are not cached
        begun = time.perf_counter()
        predictor.predict(pixels, ["circle"])
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep processes computing meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measured(work: str, folder: Path, **environment: str) -> float:
    """Measure in a new process, whose threads are the default's."""
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    words = [sys.executable, "-m", "benchmarks.contention", f"--child={work}", f"--folder={folder}"]
    done = subprocess.run(words, env=inherited | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    works = {
        "update": update,
        "recomputing": lambda folder: update(folder, RECOMPUTING),
        "prediction": prediction,
        "prediction of small": wide,
    }
    if arguments.child:
        logging.disable()
        print(json.dumps(works[arguments.child](arguments.folder)))
        return 0
    reached = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shapes(folder / "set", train=32, valid=1, fog=0)
        for work in ("update", "prediction", "prediction of small"):
            alone = measured(work, folder)
            with busy():
                beside = measured(work, folder)
            print(
                f"{work}: {alone:.3f} s alone, {beside:.3f} s beside {BUSY} busy processes: "
                f"{beside / alone:.2f} times as long (goal at most {SLOWER})",
                flush=True,
            )
            reached &= beside <= SLOWER * alone
        alone = measured("update", folder)
        threads = str(os.cpu_count())
        before = measured("recomputing", folder, OMP_NUM_THREADS=threads)
        print(
            f"update: {alone:.3f} s, {before:.3f} s on {threads} threads with activations "
            f"computed again: {before / alone:.2f} times the speed (goal {FASTER})"
        )
        reached &= before >= FASTER * alone
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
