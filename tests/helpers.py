"""Helpers of several rooms' tests: sizes, commands in this process, and what a run has left."""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from app.__main__ import main

if TYPE_CHECKING:
    from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "datasets"

# A nano of few pixels, for tests that need nano's weights or its widths.
TINY = ["model.resolution=64", "model.mask_points=64"]

# A model of every part and next to no weights, to start from none. Nano is 60 % CLIP's token
# embedding, which a run would save several times.
MICRO = [
    *(*TINY, "model.text.width=8", "model.text.num_heads=1", "model.text.depth=1"),
    *("model.vision.embed_dim=32", "model.vision.depth=2", "model.vision.global_blocks=[1]"),
    *("model.d_model=16", "model.num_heads=2", "model.feedforward=16", "model.num_queries=8"),
    *("model.encoder_layers=1", "model.decoder_layers=1"),
]

# Seconds after which a test fails instead of hanging; nothing is expected to take that long.
PATIENCE = 600

# Starts a command and prints its peak memory. The peak of a process counts what its parent held
# when it forked, so that the parent must be small.
PEAK = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


@dataclass(frozen=True)
class Result:
    """The exit code of a command, and its output."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


def finish(*words: object) -> None:
    """Run `python -m app WORDS` in this process, for fixtures that many tests share.

    Raises:
        RuntimeError: the command ended with an error.
    """
    before, sys.argv = sys.argv, ["app", *map(str, words)]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"the run ended with {stop.code}") from None
    finally:
        sys.argv = before


APART = """
import json, os, sys
from app.__main__ import main
commands, before, user = json.loads(sys.argv[1])
for number, words in enumerate(before + commands):
    if number == len(before) and user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    sys.argv = ["app", *words]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    print("ended", code, "torch" in sys.modules, file=sys.stderr, flush=True)
"""


@dataclass(frozen=True)
class Apart:
    """What a command in another process came to, and whether torch was imported by then."""

    code: int
    imported_torch: bool
    err: str


def run_apart(
    *commands: Sequence[object], user: int | None = None, before: Sequence[Sequence[object]] = ()
) -> list[Apart]:
    """Run commands, one after the other, in one process that has imported nothing before.

    Args:
        user: id of the user who runs them, where root starts them.
        before: commands that root runs first, so that all is imported that the user may not read.
    """
    words = [[[*map(str, command)] for command in part] for part in (commands, before)]
    done = subprocess.run(
        [sys.executable, "-c", APART, json.dumps([*words, user])],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    parts = re.split(r"^ended (\d+) (True|False)\n", done.stderr, flags=re.MULTILINE)
    ends = zip(parts[1::3], parts[2::3], parts[::3], strict=False)
    found = [Apart(int(code), torch == "True", err) for code, torch, err in ends][len(before) :]
    assert len(found) == len(commands), done.stderr
    return found


def run_module(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a module of the tests on one thread, in a process of its own, which must end with 0."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first worker to need it makes for all. Tests leave it as it is.

    Args:
        name: no other fixture's.
        make: fills a folder that does not exist yet.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers have it in common
    folder, made = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            make(folder)
            made.touch()
    return folder


def log_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets what the program logs from now on, each line once."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("app")
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.setLevel(logging.INFO)  # as the command line does
    return lines


def at_work(words: str) -> list[int]:
    """Return the processes that have these words in their command, but for this one."""
    import psutil

    return [
        each.pid
        for each in psutil.process_iter(["cmdline"])
        if each.pid != os.getpid() and words in " ".join(each.info["cmdline"] or [])
    ]


def until(happened: Callable[[], bool], what: str) -> None:
    """Wait for an event; fail instead of hanging."""
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            pytest.fail(f"not in {PATIENCE} s: {what}")
        time.sleep(0.05)


# --- what a run has left -------------------------------------------------------------------------

# The columns of metrics.csv that the clock decides.
TIMED = ("train/seconds_per_update", "train/images_per_second")


def metrics_rows(folder: Path, *, timed: bool = True) -> list[dict[str, str]]:
    """Return the rows of metrics.csv; without `timed`, only what two runs have in common."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if timed:
        return rows
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def metrics(folder: Path) -> dict[str, Any]:
    """Return the content of metrics.json."""
    figures: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return figures


def saved_weights(folder: Path, which: str = "last") -> dict[str, Tensor]:
    """Return the weights of a run by their names: the last ones or the best."""
    from safetensors.torch import load_file  # imports torch, which many tests do without

    return load_file(folder / "weights" / which / "model.safetensors")


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether two sets of tensors are equal to the bit."""
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_weights(a: Path, b: Path, which: str = "last") -> bool:
    """Return whether two runs have come to the same weights, to the bit."""
    return same_tensors(saved_weights(a, which), saved_weights(b, which))
