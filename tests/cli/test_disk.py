"""A disk that is full, read-only or lost is said in a line, whatever command was writing to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.config.compose import load_config
from app.files import LOCK
from app.model import adapters, weights
from app.model.bundled import NANO
from tests.helpers import REPOSITORY, Command, Result, run_apart

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


@pytest.fixture
def adapter(tiny_run: Path, tmp_path: Path) -> Path:
    """A LoRA beside the weights of the tiny run."""
    best = tiny_run / "weights" / "best"
    model, header = weights.load(best)
    lora = load_config(["method=lora-minimal"]).method.lora
    assert lora is not None
    adapters.apply_lora(model, lora, weights.base_reference(weights.find_file(best)))
    weights.save(model, tmp_path / "adapter", header)
    return tmp_path / "adapter"


def test_a_full_disk_under_smaller_weights(
    command: Command, tiny_run: Path, adapter: Path, disk: Path
) -> None:
    merge = command("merge", adapter, "--output-dir", disk / "merged")
    assert "No space left" in _said(merge)
    words = (tiny_run / "weights" / "best", "--mlp", "0.5", "--width", "svd")
    assert "No space left" in _said(command("compact", *words, "--output-dir", disk / "cut"))
    assert {path.name for path in disk.rglob("*") if path.is_file()} == {LOCK}


def test_a_full_disk_under_a_report(command: Command, tiny_run: Path, disk: Path) -> None:
    for name in ("metrics.json", "predictions"):
        (disk / name).symlink_to(tiny_run / name)
    assert "No space left" in _said(command("report", disk))
    assert not (disk / "report.html").exists()
    assert not [path for path in disk.iterdir() if path.name.startswith(".")]


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folders_of_another_user(tiny_run: Path, adapter: Path, memory_folder: Path) -> None:
    """What can be read alone is not written, and what cannot be read is named."""
    run = shutil.copytree(tiny_run, memory_folder / "run")
    hidden = shutil.copytree(run, memory_folder / "hidden")
    lora = shutil.copytree(adapter, memory_folder / "adapter")
    memory_folder.chmod(0o755)
    (hidden / "metrics.json").chmod(0o600)
    (hidden / "weights").chmod(0o700)
    out, cut = ("--output-dir", memory_folder / "out"), ("--mlp", "0.5", "--width", "svd")
    commands = {
        ("report", run): "Permission denied",
        ("merge", lora, *out): "cannot be written (Permission denied)",
        ("compact", run / "weights/best", *out, *cut): "cannot be written (Permission denied)",
        ("report", hidden): "metrics.json: cannot be read (Permission denied)",
        ("compact", hidden / "weights/best", *out, *cut): "Permission denied",
    }
    nowhere = memory_folder / "none"
    before = (("report", run), ("merge", nowhere, *out), ("compact", nowhere, *out, *cut))
    ended = run_apart(*commands, user=NOBODY, before=before)
    for said, done in zip(commands.values(), ended, strict=True):
        assert said in _said(Result(done.code, "", done.err))
