"""Runs killed at random moments: `python -m tests.training.killed_runs FOLDER KILLS`.

`python -m app train`, forked from this warm process and saving after each update, is killed
wherever it is: while it reads, validates, trains, saves or draws its report. The same command goes
on, until it is killed again or done; then its weights and figures are those of a run that nobody
touched, and another run begins.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import app.training.start  # noqa: F401  what a run imports, once for all of them
from app.__main__ import main as command
from app.datasets.synthetic.shapes import make_shapes
from tests.conftest import TINY
from tests.training.killed_saves import SMALL

TIMED = ("train/seconds_per_update", "train/images_per_second")


def start(folder: Path, name: str) -> int:
    """The id of a process that runs, or goes on with, the run of this name."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    words = [
        *("train", "--dataset-dir", folder / "set", "--model", "nano", "--checkpoint", "none"),
        *("--output-dir", folder / name, "--resume=auto", "--epochs", 2, "--batch-size", 1),
        *("training.save_minutes=0", "training.ema=0.9", "model.dropout=0.2"),
        *("evaluation.pictures=1", *TINY, *SMALL),
    ]
    sys.argv = ["app", *map(str, words)]
    output = os.open(folder / f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        command()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> bool:
    """Whether it has ended well by itself; killed where it has not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"it ended with {os.waitstatus_to_exitcode(status)}"
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def outcome(folder: Path) -> tuple[list[bytes], list[dict[str, str]]]:
    """Both weights, and the figures that the clock does not decide."""
    weights = [folder / "weights" / name / "model.safetensors" for name in ("best", "last")]
    with (folder / "metrics.csv").open(encoding="utf-8") as lines:
        rows = [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(lines)]
    return [file.read_bytes() for file in weights], rows


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    make_shapes(folder / "set", train=4, valid=1, width=64, height=64, seed=0)
    begun = time.monotonic()
    assert ended(start(folder, "untouched"), 600)
    whole = time.monotonic() - begun
    expected = outcome(folder / "untouched")
    moments = random.Random(0)
    made, runs = 0, 0
    while made < kills:
        name = f"run-{runs}"
        while not ended(start(folder, name), moments.uniform(0, whole) if made < kills else 600):
            made += 1
        assert outcome(folder / name) == expected, name
        runs += 1
    said = "".join(file.read_text(encoding="utf-8") for file in folder.glob("run-*.out"))
    resumed = said.count("resumed from")
    print(json.dumps({"kills": made, "runs": runs, "resumed": resumed}))


if __name__ == "__main__":
    main()
