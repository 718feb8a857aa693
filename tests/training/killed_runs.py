"""Runs that are killed: `python -m tests.training.killed_runs FOLDER KILLS [folds]`.

`python -m app train`, forked from this warm process and saving after each update, kills itself
before one of its file operations, wherever that is: as it reads, validates, trains, saves or draws
its report. Between two of them, no kill can leave anything else. The same command goes on, until it
is killed again or done; then its weights and figures are those of a run that nobody touched, and
another run begins.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import app.training.run  # noqa: F401  what a run imports, once for all of them
from app.datasets.synthetic.shapes import make_shapes
from tests import kills
from tests.helpers import MICRO, metrics_rows


def run(folder: Path, name: str, kill_at: int = -1, *, folds: bool = False) -> int | None:
    """Run, or go on with, the run of this name.

    Args:
        folds: in two folds.
        kill_at: the file operation before which it is killed.

    Returns:
        How many file operations it had; None where it was killed.
    """
    data = ("--dataset-dir", folder / "set", "--epochs", "2")
    if folds:
        data = ("--dataset-dir", folder / "set" / "train", "--folds", "2", "--epochs", "1")
    words = [
        *("train", *data, "--model", "nano", "--checkpoint", "none"),
        *("--output-dir", folder / name, "--resume=auto", "--batch-size", 1),
        *("training.save_minutes=0", "training.ema=0.9", "model.dropout=0.2"),
        *("evaluation.pictures=1", *MICRO),
    ]
    return kills.run_command(words, folder, kill_at, output=folder / f"{name}.out")


def outcome(folder: Path) -> tuple[list[bytes], list[dict[str, str]]]:
    """Return both weights, and the figures that the clock does not decide."""
    weights = [folder / "weights" / name / "model.safetensors" for name in ("best", "last")]
    return [file.read_bytes() for file in weights], metrics_rows(folder, timed=False)


def main() -> None:
    folder, wanted, folds = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["folds"]
    make_shapes(folder / "set", train=4, valid=1, fog=0, width=64, height=64, seed=0)
    operations = run(folder, "untouched", folds=folds)
    assert operations is not None
    expected = outcome(folder / "untouched")
    places = random.Random(0)
    made, runs = 0, 0
    while made < wanted:
        name = f"run-{runs}"
        while True:
            kill_at = places.randint(1, operations) if made < wanted else -1
            if run(folder, name, kill_at, folds=folds) is not None:
                break
            made += 1
        assert outcome(folder / name) == expected, name
        runs += 1
    output = "".join(file.read_text(encoding="utf-8") for file in folder.glob("run-*.out"))
    resumed = output.count("resumed from")
    print(json.dumps({"kills": made, "runs": runs, "resumed": resumed}))


if __name__ == "__main__":
    main()
