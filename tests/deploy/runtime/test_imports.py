"""What the runtime imports: neither torch nor a backend, and Python 3.10 throughout."""

from __future__ import annotations

import configparser
import fnmatch
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

# What a device has beside a backend: see requirements-jetson.in. These must be imported as well,
# where an output asks for them.
PACKAGES = "numpy PIL rich pygments markdown_it mdurl cv2 yaml pycocotools"
LATER = ("app.datasets.overlay", "app.inference.polygons", "app.inference.yolo_labels")
PROGRAM = """
import importlib, json, sys
from tests.deploy.runtime.device_imports import allow_only

PACKAGES = sys.argv.pop(1).split()

allow_only(PACKAGES)
for name in sys.argv[1:]:
    importlib.import_module(name)
modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "app"}
print(json.dumps({name: module.__file__ for name, module in modules.items()}))
"""
# Syntax that ruff refuses for Python 3.10 and takes for 3.11.
NEWER = "try:\n    pass\nexcept* ValueError:\n    pass\n"


@pytest.fixture(scope="module")
def imported() -> dict[str, Path]:
    """Module of this project → its file, for all that the modules of the runtime import."""
    runtime = REPOSITORY / "app" / "deploy" / "runtime"
    names = [f"app.deploy.runtime.{f.stem}" for f in runtime.glob("*.py") if f.stem[:2] != "__"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, PACKAGES, *names, *LATER],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = {name: Path(file) for name, file in json.loads(done.stdout).items()}
    return {name: file for name, file in files.items() if file.stat().st_size}


def test_the_runtime_needs_no_more_than_a_device_has(imported: dict[str, Path]) -> None:
    assert {"app.deploy.runtime.tensorrt", "app.deploy.runtime.camera"} <= imported.keys()
    assert not {"app.model.weights", "app.model.upstream.fixes"} & imported.keys()


def test_ruff_holds_all_of_it_to_python_3_10(imported: dict[str, Path]) -> None:
    def refused(file: Path) -> bool:
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", file, "-"],
            input=NEWER,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        return "on Python 3.10" in done.stdout

    assert not refused(REPOSITORY / "app" / "training" / "run.py"), "this check can fail"
    assert [str(file) for file in imported.values() if not refused(file)] == []


def test_a_python_3_10_takes_all_of_it(imported: dict[str, Path]) -> None:
    """What no linter sees: that a module's top level runs there."""
    versions = Path.home() / ".pyenv" / "versions"
    # pyenv's own python3.10 is a script that may lead nowhere.
    known = [*versions.glob("3.10.*/bin/python"), "/usr/bin/python3.10"]
    python = next((path for path in known if Path(path).exists()), None)
    if python is None:
        pytest.skip("no Python 3.10 on this machine")
    program = Path(__file__).with_name("device_python.py")
    words = [python, program, f"{PACKAGES} filelock onnxruntime tensorrt cuda", *imported]
    done = subprocess.run(
        words, cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["3.10", str(len(imported))]


def test_mypy_follows_all_of_it(imported: dict[str, Path]) -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / ".ci" / "mypy-py310.ini")
    assert config["mypy"]["files"] == "app/deploy/runtime"
    skipped = [
        pattern
        for section in config.sections()
        if config[section].get("follow_imports") == "skip"
        for pattern in section.removeprefix("mypy-").split(",")
    ]
    assert "app.model.weights" in skipped
    patterns = [*skipped, *(p.removesuffix(".*") for p in skipped)]
    assert not [name for name in imported if any(fnmatch.fnmatch(name, p) for p in patterns)]
