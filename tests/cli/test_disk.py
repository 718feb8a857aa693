"""A disk that is full, read-only or lost is said in a line, whatever command was writing to it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.files import LOCK
from app.model.bundled import NANO
from tests.helpers import REPOSITORY, Command, Result

SCENE = REPOSITORY / "examples" / "scene.png"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 16 KiB left; it takes root to make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _said(done: Result) -> str:
    assert done.code == 2, done.out + done.err
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_full_disk(command: Command, shapes: Path, disk: Path) -> None:
    pack = command("pack", NANO, "--output-dir", disk / "packed")
    assert "No space left" in _said(pack)
    words = ("--input", SCENE, "--checkpoint", NANO, "--prompt", "circle")
    label = command("label", *words, "--output-dir", disk / "labelled")
    assert "No space left" in _said(label)
    words = ("--checkpoint", NANO, "--dataset-dir", shapes, "evaluation.off_prompts=0")
    evaluate = command("evaluate", *words, "--output-dir", disk / "evaluated")
    assert "No space left" in _said(evaluate)
    assert {path.name for path in disk.rglob(".*") if path.is_file()} <= {LOCK}


def test_a_read_only_disk(command: Command, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = command("pack", NANO, "--output-dir", disk / "packed")
    assert "Read-only file system" in _said(done)
    words = ("--input", SCENE, "--checkpoint", NANO, "--prompt", "circle")
    done = command("label", *words, "--output-dir", disk / "labelled")
    assert "Read-only file system" in _said(done)
