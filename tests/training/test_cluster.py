"""--cluster slurm: a real Slurm runs, requeues and cancels a run, and nothing of it is lost."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY, Command
from tests.slurm import Slurm, until

EPOCHS = 60


def _words(shapes: Path, folder: Path, *more: object) -> list[str]:
    words = [
        *("train", "--dataset-dir", shapes, "--model", "nano", "--checkpoint", "none", *TINY),
        *("--epochs", EPOCHS, "--output-dir", folder, "training.device=cpu", *more),
        *(f"evaluation.every={EPOCHS}", f"training.save_every={EPOCHS}", "evaluation.pictures=0"),
    ]
    return list(map(str, words))


def _submit(slurm: Slurm, words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "app", *words, "--cluster", "slurm", "cluster.cpus=1"],
        env=slurm.environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"submitted: job (\d+)", done.stdout)[1]


def _epochs(folder: Path) -> int:
    file = folder / "metrics.csv"
    return len(list(csv.DictReader(file.open()))) if file.is_file() else 0


def _weights(folder: Path) -> bytes:
    return (folder / "weights" / "last" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_job_goes_on_after_preemption_and_cancelling(
    slurm: Slurm,
    shapes: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    """Warned by USR2, then requeued by hand, then cancelled and resumed here: the same weights."""
    folder = tmp_path / "out"
    job = _submit(slurm, _words(shapes, folder))
    until(lambda: _epochs(folder) >= 3, 90, "three epochs")
    slurm("scancel", "--signal=USR2", job)
    until(lambda: slurm.field(job, "Restarts") == "1", 60, "the job queued again by itself")
    log = folder / "train.log"
    until(lambda: log.read_text().count("resumed from") == 1, 90, "the run going on")
    before = _epochs(folder)
    until(lambda: _epochs(folder) >= before + 3, 90, "three more epochs")
    slurm("scontrol", "requeue", job)
    until(lambda: slurm.field(job, "Restarts") == "2", 60, "the job requeued")
    until(lambda: log.read_text().count("resumed from") == 2, 90, "the run going on again")
    slurm("scancel", job)
    until(lambda: slurm.field(job, "JobState") == "CANCELLED", 60, "the job cancelled")
    until(lambda: log.read_text().count("stopped after") == 3, 60, "the run saved")
    assert _epochs(folder) < EPOCHS
    resumed = command(*_words(shapes, folder), "--resume")
    assert resumed.code == 0, resumed.err
    whole = command(*_words(shapes, tmp_path / "whole"))
    assert whole.code == 0, whole.err
    assert _weights(folder) == _weights(tmp_path / "whole")


@pytest.mark.slow
def test_what_slurm_refuses(slurm: Slurm, shapes: Path, tmp_path: Path) -> None:
    words = _words(shapes, tmp_path / "out", "--cluster", "slurm", "cluster.partition=none")
    done = subprocess.run(
        [sys.executable, "-m", "app", *words],
        env=slurm.environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "invalid partition" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_slurm(shapes: Path, tmp_path: Path, command: Command, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command(*_words(shapes, tmp_path / "out"), "--cluster", "slurm")
    assert done.code == 2
    assert "no sbatch on this machine" in done.err
    nodes = command(*_words(shapes, tmp_path / "out"), "--nodes", 2)
    assert nodes.code == 2
    assert "--cluster slurm" in nodes.err
