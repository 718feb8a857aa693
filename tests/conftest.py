"""Fixtures of several rooms' tests: a tiny dataset, a finished tiny run, the command line."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from app.__main__ import main
from app.datasets.synthetic.shapes import make_shapes
from tests.helpers import MICRO, SHARED, Command, Result, finish, once

pytest_plugins = ["pytester", "tests.tiers", "tests.slurm"]


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


@pytest.fixture(autouse=True)
def _blank_drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save curves as blank pictures, because matplotlib takes a third of a tiny run.

    Tests whose subject is a drawing have the mark `drawings`. Fixtures of a session or a module
    come before this one, and so have their real drawings.
    """
    if request.node.get_closest_marker("drawings") is None:
        monkeypatch.setattr(Figure, "savefig", _save_blank)


def _save_blank(_: Figure, file: Path | IO[Any], format: str = "png", **__: object) -> None:
    if format == "svg":
        content: Any = '<svg xmlns="http://www.w3.org/2000/svg"/>'
    else:
        buffer = io.BytesIO()
        Image.new("RGB", (1, 1)).save(buffer, format)
        content = buffer.getvalue()
    if isinstance(file, Path):
        file.write_bytes(content)
    else:
        file.write(content)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two validation images of shapes."""
    drawn = {"train": 4, "valid": 2, "width": 96, "height": 64, "seed": 3}
    drawn |= {"fog": 0, "radius": [0.08, 0.25], "max_shapes": 5}
    return once(tmp_path_factory, "shapes", lambda folder: make_shapes(folder, **drawn))


@pytest.fixture(scope="session")
def potholes() -> Path:
    """Real photographs with their labels."""
    if not (SHARED / "potholes").is_dir():
        pytest.skip("../shared/datasets/potholes is not on this machine")
    return SHARED / "potholes"


@pytest.fixture(scope="session")
def tiny_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch."""
    train = ("train", "--dataset-dir", shapes, "--model", "nano", "--epochs", 1)
    flags = ("--checkpoint", "none", "evaluation.pictures=1", *MICRO)
    return once(
        tmp_path_factory, "tiny-run", lambda out: finish(*train, "--output-dir", out, *flags)
    )


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that lies in memory, where there is room: to sync a disk takes most of a save.

    It is for what a kill leaves, because a kill takes the process alone, never what was written.
    """
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30
    with tempfile.TemporaryDirectory(dir=memory if roomy else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A real signal to this process, after so many calls of a method: an update, unless named."""

    def arm(calls: int, owner: type | None = None, method: str = "__call__") -> None:
        if owner is None:
            from app.training.step import (
                Step as owner,  # imports torch, which many tests do without
            )

        original = getattr(owner, method)
        left = calls

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            result = original(*args, **kwargs)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(owner, method, call)

    return arm
