"""What several rooms' tests share: a tiny dataset, a tiny run, the command line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.__main__ import main
from app.datasets.shapes import make_shapes

pytest_plugins = ["tests.slurm"]
REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "datasets"
# A nano that answers in a blink: what matters in most tests is the path, not the size.
TINY = ["model.resolution=64", "model.mask_points=64"]

# Starts a command and says its peak memory. A process's peak counts what the one that started it
# held: this is a small one.
PEAK = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `python -m app WORDS` in this process."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["app", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two validation images of shapes."""
    folder = tmp_path_factory.mktemp("shapes") / "set"
    make_shapes(folder, train=4, valid=2, width=96, height=64, seed=3)
    return folder


@pytest.fixture(scope="session")
def potholes() -> Path:
    if not (SHARED / "potholes").is_dir():
        pytest.skip("../shared/datasets/potholes is not on this machine")
    return SHARED / "potholes"


@pytest.fixture(scope="session")
def tiny_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch."""
    folder = tmp_path_factory.mktemp("run") / "out"
    finish(
        *("train", "--dataset-dir", str(shapes), "--model", "nano", "--epochs", "1"),
        *("--checkpoint", "none"),
        *("--output-dir", str(folder), "evaluation.pictures=1", *TINY),
    )
    return folder


def until(happened: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            pytest.fail(f"not in {seconds:g} s: {what}")
        time.sleep(0.05)


def finish(*words: str) -> None:
    """`python -m app WORDS` in this process, for fixtures that many tests share."""
    before, sys.argv = sys.argv, ["app", *words]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"the run ended with {stop.code}") from None
    finally:
        sys.argv = before
