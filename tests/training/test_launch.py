"""Several processes on one machine, for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.errors import UserError
from app.training import launch
from tests.conftest import REPOSITORY, TINY


@pytest.mark.slow
def test_two_processes_train_one_model(shapes: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "app", "train", "--dataset-dir", str(shapes), "--model", "nano"),
        *("--num-gpus", "2", "--epochs", "2", "--batch-size", "1", "training.device=cpu"),
        *("--output-dir", str(tmp_path / "out"), "evaluation.pictures=0", *TINY),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert done.stdout.count("    2/2  ") == 1  # the second process is silent
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["epochs"] == 2


def test_more_gpus_than_there_are(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="this machine has 1"):
        launch.relaunch(4, [])
