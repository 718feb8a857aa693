"""Faults that only a GPU has, on a stand-in: its kernels compute nothing, all else is real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import PATIENCE, REPOSITORY, once

STAND_IN = REPOSITORY.parent / "shared" / "gpu"
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc makes the stand-in"),
    pytest.mark.skipif(not STAND_IN.is_dir(), reason="../shared/gpu is not on this machine"),
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in's library."""
    words = ["bash", str(STAND_IN / "build.sh"), sys.prefix]
    return once(
        tmp_path_factory, "null-gpu", lambda out: subprocess.run([*words, str(out)], check=True)
    )


def _run(stand_in: Path, *words: object, **knobs: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the stand-in, and without a compiler."""
    environment = os.environ | {
        "NULLGPU": "1",
        "NULLGPU_ONE_BYTE": "1",
        "NULLGPU_LIB": str(stand_in),
        "LD_LIBRARY_PATH": str(stand_in),
        "LD_PRELOAD": str(stand_in / "libnullgpu.so"),
        "PYTHONPATH": f"{STAND_IN / 'site'}:{REPOSITORY}",
        "TRITON_CACHE_DIR": str(stand_in / "triton"),  # of no earlier run that had a compiler
        "PATH": str(stand_in),
    }
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env=environment | knobs,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_on_a_gpu_without_bfloat16(stand_in: Path, shapes: Path) -> None:
    """One of Turing, such as a T4, on a machine without a compiler."""
    done = _run(stand_in, "-m", "tests.gpu.faults", shapes, NULLGPU_CC="75")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["precision"] == "torch.float16"
    assert len(found["pinned"]) > 10
    assert all(found["pinned"])
    assert found["a drawn image leaves the generator"]
    assert found["a measured image leaves the generator"]
    assert found["states of more GPUs are taken"]
    assert abs(found["held"]) < 1 << 20
    assert "warn" not in done.stderr.lower()
