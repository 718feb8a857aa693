"""Malformed masks and what goes with them: a UserError or a sound dataset, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY


# with tests/fuzz/test_fuzz.py's, 10,000 over the readers of other tools' files
@pytest.mark.parametrize("count", [100, pytest.param(3_000, marks=pytest.mark.slow)])
def test_malformed_masks(memory_folder: Path, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.mask_examples", str(count), str(memory_folder)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert "Traceback" not in done.stderr
    assert sum(json.loads(done.stdout).values()) >= count
