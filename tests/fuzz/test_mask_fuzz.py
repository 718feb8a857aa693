"""Malformed masks and what goes with them: a UserError or a sound dataset, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import run_module


# with tests/fuzz/test_fuzz.py's, 10,000 over the readers of other tools' files
@pytest.mark.parametrize("count", [100, pytest.param(3_000, marks=pytest.mark.slow)])
def test_malformed_masks(memory_folder: Path, count: int) -> None:
    done = run_module("tests.fuzz.mask_examples", count, memory_folder)
    assert "Traceback" not in done.stderr
    assert sum(json.loads(done.stdout).values()) >= count
