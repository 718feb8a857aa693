"""Checkpoints are whole or absent, on a disk that fills up and under kills; secrets stay out."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.config.compose import load_config
from app.errors import UserError
from app.files import LOCK
from app.training import checkpoints, method
from app.training.checkpoints import checkpoint_bytes, run_bytes
from app.training.step import Step
from tests.helpers import REPOSITORY, TINY, Command, finish, once

MIB = 1 << 20
FAST = ("--checkpoint", "none", "evaluation.pictures=0", *TINY)


SAVING = ("--epochs", "2", "training.save_minutes=0", "evaluation.every=2", *FAST)


@pytest.fixture(scope="module")
def whole_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of SAVING where the disk has room."""
    train = ("train", "--dataset-dir", str(shapes), *SAVING, "--output-dir")
    return once(tmp_path_factory, "saving", lambda folder: finish(*train, str(folder)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 300 MiB; it takes root to make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(folder: Path, left: int) -> None:
    """All but so many bytes of the disk."""
    (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - left))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("update-*"))


def test_the_size_that_is_foretold(whole_run: Path) -> None:
    checkpoint = _checkpoints(whole_run)[-1]
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    config, average = load_config(TINY), load_config([*TINY, "training.ema=0.9"])
    model = method.on_meta(config, pretrained=False)
    assert checkpoint_bytes(config, model) == pytest.approx(size, rel=0.05)
    parameters = sum(p.numel() for p in model.parameters())
    assert checkpoint_bytes(average, model) - checkpoint_bytes(config, model) == 4 * parameters


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", "7", '{"state": {}}', '{"state": 3, "fingerprint": {}}', "[" * 10_000),
        *('{"state": {}, "fingerprint": []}', '{"state": {"epoch": "1"}, "fingerprint": {}}'),
        '{"state": {"epoch": [1]}, "fingerprint": {}}',
        '{"state": {"rows": [{"epoch": {}}]}, "fingerprint": {}}',
        '{"state": {"unheard of": 1}, "fingerprint": {}}',
    ],
)
def test_a_spoiled_progress_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json: "):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04", pickle.dumps({"step": 1}, 2)])
def test_a_spoiled_state_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    step: Any = None  # nothing is loaded into it
    with pytest.raises(UserError, match="cannot be resumed with these settings"):
        checkpoints.restore(tmp_path, step, 0)


def test_a_lora_of_the_full_size_resumes_from_little() -> None:
    config = load_config(["model=sam3", "method=lora"])
    assert checkpoint_bytes(config, method.on_meta(config, pretrained=True)) < 100e6


def test_a_full_disk_is_found_first(command: Command, shapes, small_disk, monkeypatch) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr("app.training.run.build_model", build)
    words = ("train", "--dataset-dir", shapes, "--output-dir", small_disk / "out", *FAST)
    config = load_config(TINY)
    needed = sum(run_bytes(config, method.on_meta(config, pretrained=False)))
    _fill(small_disk, left=needed - MIB)  # three checkpoints and two weights, but for 1 MiB
    done = command(*words)
    assert done.code == 2
    assert "GB are free, and this run needs" in done.err
    assert {p.name for p in (small_disk / "out").iterdir()} <= {LOCK, "train.log"}


def test_a_folder_that_is_read_only(command: Command, shapes, small_disk) -> None:
    (small_disk / "old").mkdir()
    (small_disk / "old" / "metrics.csv").write_text("epoch\n")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for words in ([small_disk / "out"], [small_disk / "old", "--overwrite"]):
        done = command("train", "--dataset-dir", shapes, *FAST, "--output-dir", *words)
        assert done.code == 2
        assert "cannot be written (Read-only file system)" in done.err
    assert (small_disk / "old" / "metrics.csv").read_text() == "epoch\n"


@pytest.mark.parametrize(  # within the weights, within the state
    "left", [4 * MIB, pytest.param(40 * MIB, marks=pytest.mark.slow)]
)
def test_a_disk_that_fills_up(
    command: Command, shapes, whole_run: Path, small_disk, monkeypatch, left: int
) -> None:
    """It ends with 2 and a line; the last checkpoint is whole, and the run goes on from it."""
    update, updates = Step.__call__, 0

    def fill_at_the_second(*arguments: object) -> object:
        nonlocal updates
        updates += 1
        if updates == 2:
            _fill(small_disk, left)
        return update(*arguments)

    monkeypatch.setattr(Step, "__call__", fill_at_the_second)
    folder = small_disk / "out"
    words = ("train", "--dataset-dir", shapes, "--output-dir", folder, *SAVING)
    done = command(*words)
    assert done.code == 2, done.out + done.err
    assert "could not be written" in done.err
    assert "update-00000001" in done.err
    assert "Traceback" not in done.out + done.err
    assert [path.name for path in _checkpoints(folder)] == ["update-00000001"]
    (small_disk / "filler").unlink()
    resumed = command(*words, "--resume")
    assert resumed.code == 0, resumed.err
    ours, theirs = (
        load_file(f / "weights" / "last" / "model.safetensors") for f in (whole_run, folder)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def _counts(program: str, folder: Path, kills: int) -> dict[str, int]:
    """What a program that kills others says of it."""
    command = [sys.executable, "-m", f"tests.training.{program}", str(folder), str(kills)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


@pytest.mark.slow
def test_two_hundred_kills(memory_folder: Path) -> None:
    counts = _counts("killed_saves", memory_folder, 200)
    assert counts["kills"] == 200
    assert counts["within a save"] > 20
    assert counts["updates"] > 3  # saves that were whole, gone on from


@pytest.mark.slow
def test_runs_killed_anywhere_come_to_the_same_end(memory_folder: Path) -> None:
    """In real runs: while they read, validate, train, save or draw."""
    counts = _counts("killed_runs", memory_folder, 6)
    assert counts["kills"] == 6
    assert counts["runs"] >= 1
    assert counts["resumed"] >= 1  # from a checkpoint; the others began anew


def test_a_canary_is_nowhere(command: Command, shapes, tmp_path: Path, monkeypatch) -> None:
    """What the environment holds is in no file that a run leaves, and in nothing that it says."""
    canary = "canary-5f2d9c"
    names = ("HF_TOKEN", "ROBOFLOW_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
    for name in names:
        monkeypatch.setenv(name, canary)
    folder = tmp_path / "out"
    done = command("train", "--dataset-dir", shapes, "--output-dir", folder, "--epochs", 1, *FAST)
    assert done.code == 0, done.err
    assert canary not in done.out + done.err
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if canary.encode() in path.read_bytes()]
