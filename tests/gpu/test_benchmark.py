"""benchmarks/gpu.py, whole, where its values mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS, Figure
from tests.gpu.null_gpu import NullGpu, environment
from tests.helpers import PATIENCE, REPOSITORY


@pytest.mark.slow
def test_each_part_runs_to_its_end(null_gpu: NullGpu, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    words = ["-m", "benchmarks.gpu", "--size", "nano", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=environment(null_gpu.library),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    found = {row["name"]: row for row in json.loads(file.read_text())}
    for part in PARTS:
        assert found[f"[{part}] failed"]["value"] == 0, done.stderr
    for command in ("train", "resume", "lora, batch auto"):
        assert found[f"nano {command}: exit code"]["value"] == 0, done.stderr
    for update in ("full, batch 1", "full, 20 prompts", "lora, batch 4", "head, batch 4"):
        assert 0.9 <= found[f"{update}: planned"]["value"] <= 1.25
    assert done.returncode == 1  # the GPU computes nothing, which the parity sees
    assert "parity: loss off by" in done.stdout
    assert "MISSED" in done.stdout


def test_a_figure_is_held_to_its_goal() -> None:
    assert Figure("speed", 12.0, least=10).reached
    assert not Figure("speed", 8.0, least=10).reached
    assert not Figure("memory", 1.3, least=0.9, most=1.25).reached
    assert not Figure("gradient", float("nan"), most=1e-6).reached
    assert "MISSED" in str(Figure("speed", 8.0, least=10))
