"""What several rooms' tests share: a tiny dataset, a tiny run, the command line."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.__main__ import main
from app.datasets.synthetic.shapes import make_shapes

pytest_plugins = ["pytester", "tests.tiers", "tests.slurm"]
REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "datasets"
# A nano that answers in a blink: what matters in most tests is the path, not the size.
TINY = ["model.resolution=64", "model.mask_points=64"]

# Seconds for what only has to end: a machine may be slow, and these tests do not time it.
PATIENCE = 600

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
    drawn = {"train": 4, "valid": 2, "width": 96, "height": 64, "seed": 3}
    return once(tmp_path_factory, "shapes", lambda folder: make_shapes(folder, **drawn))


@pytest.fixture(scope="session")
def potholes() -> Path:
    if not (SHARED / "potholes").is_dir():
        pytest.skip("../shared/datasets/potholes is not on this machine")
    return SHARED / "potholes"


@pytest.fixture(scope="session")
def tiny_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch."""
    train = ("train", "--dataset-dir", str(shapes), "--model", "nano", "--epochs", "1")
    flags = ("--checkpoint", "none", "evaluation.pictures=1", *TINY)
    return once(
        tmp_path_factory, "tiny-run", lambda out: finish(*train, "--output-dir", str(out), *flags)
    )


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that lies in memory, where there is room: to sync a disk takes most of a save.

    For what a kill leaves: it takes the process alone, and never what was written.
    """
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30
    with tempfile.TemporaryDirectory(dir=memory if roomy else tmp_path) as folder:
        yield Path(folder)


def until(happened: Callable[[], bool], what: str) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            pytest.fail(f"not in {PATIENCE} s: {what}")
        time.sleep(0.05)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker who needs it makes, for all; tests leave it as it is.

    Args:
        name: no other fixture's.
        make: fills a folder that there is not yet.
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
