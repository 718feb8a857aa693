"""Runs that are killed: `python -m tests.training.killed_runs FOLDER KILLS`.

`python -m app train`, forked from this warm process and saving after each update, kills itself
before one of its file operations, wherever that is: as it reads, validates, trains, saves or draws
its report. Between two of them, no kill can leave anything else. The same command goes on, until it
is killed again or done; then its weights and figures are those of a run that nobody touched, and
another run begins.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import app.training.run  # noqa: F401  what a run imports, once for all of them
from app.__main__ import main as command
from app.datasets.synthetic.shapes import make_shapes
from tests import kills
from tests.helpers import MICRO, metrics_rows


def run(folder: Path, name: str, kill_at: int = -1) -> int | None:
    """Run, or go on with, the run of this name.

    Args:
        kill_at: the file operation before which it is killed.

    Returns:
        How many file operations it had; None where it was killed.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            operations = pipe.read()
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), f"{name} ended with {status}"
        return int(operations) if status == 0 else None
    words = [
        *("train", "--dataset-dir", folder / "set", "--model", "nano", "--checkpoint", "none"),
        *("--output-dir", folder / name, "--resume=auto", "--epochs", 2, "--batch-size", 1),
        *("training.save_minutes=0", "training.ema=0.9", "model.dropout=0.2"),
        *("evaluation.pictures=1", *MICRO),
    ]
    sys.argv = ["app", *map(str, words)]
    output = os.open(folder / f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    count = kills.before_operation(kill_at, folder)
    code = 1
    try:
        command()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.write(writing, str(count()).encode())
        os._exit(code)


def outcome(folder: Path) -> tuple[list[bytes], list[dict[str, str]]]:
    """Return both weights, and the figures that the clock does not decide."""
    weights = [folder / "weights" / name / "model.safetensors" for name in ("best", "last")]
    return [file.read_bytes() for file in weights], metrics_rows(folder, timed=False)


def main() -> None:
    folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
    make_shapes(folder / "set", train=4, valid=1, fog=0, width=64, height=64, seed=0)
    operations = run(folder, "untouched")
    assert operations is not None
    expected = outcome(folder / "untouched")
    places = random.Random(0)
    made, runs = 0, 0
    while made < wanted:
        name = f"run-{runs}"
        while run(folder, name, places.randint(1, operations) if made < wanted else -1) is None:
            made += 1
        assert outcome(folder / name) == expected, name
        runs += 1
    output = "".join(file.read_text(encoding="utf-8") for file in folder.glob("run-*.out"))
    resumed = output.count("resumed from")
    print(json.dumps({"kills": made, "runs": runs, "resumed": resumed}))


if __name__ == "__main__":
    main()
