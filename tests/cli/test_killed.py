"""A command that is killed leaves what was there, or what it came to write; never a half."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import run_module


@pytest.mark.slow
def test_no_kill_leaves_half_a_file(tiny_run: Path, memory_folder: Path) -> None:
    shutil.copytree(tiny_run, memory_folder / "run")
    done = run_module("tests.cli.killed_commands", memory_folder, 6)
    counts = json.loads(done.stdout)
    assert counts.keys() == {"merge", "compact", "report"}
    assert all(count["kills"] == 6 for count in counts.values())
    assert all(count["that kept the old"] > 0 for count in counts.values())
