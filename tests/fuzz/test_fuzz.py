"""Malformed datasets: a UserError or a sound dataset comes out, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import run_module


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_datasets(memory_folder: Path, count: int) -> None:
    ran = run("tests.fuzz.examples", memory_folder, count)
    # Hypothesis stops early where it has seen all that a strategy can give.
    assert sum(ran.values()) >= count, ran


# with tests/fuzz/test_mask_fuzz.py's, 10,000 over the readers of other tools' files
@pytest.mark.parametrize("count", [100, pytest.param(7_000, marks=pytest.mark.slow)])
def test_malformed_files_of_labels(memory_folder: Path, count: int) -> None:
    ran = run("tests.fuzz.readers", memory_folder, count)
    assert sum(ran.values()) >= count, ran


def run(module: str, folder: Path, count: int) -> dict[str, int]:
    """Run a module's examples; return how many it ran of each kind."""
    done = run_module(module, count, folder)
    assert "Traceback" not in done.stderr
    ran: dict[str, int] = json.loads(done.stdout)
    return ran
