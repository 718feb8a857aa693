"""A command that is killed leaves what was there, or what it came to write; never a half."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY


@pytest.mark.slow
def test_no_kill_leaves_half_a_file(tiny_run: Path, memory_folder: Path) -> None:
    shutil.copytree(tiny_run, memory_folder / "run")
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.killed_commands", memory_folder, "6"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout)
    assert counts.keys() == {"merge", "compact", "report"}
    assert all(count["kills"] == 6 for count in counts.values())
    assert all(count["that kept the old"] > 0 for count in counts.values())
