"""Loaders from the package index, installed apart, take all of what is exported for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import REPOSITORY
from tests.model.published import build_small, video_model, write_sam3

pytestmark = pytest.mark.system

# What the loaders' modules import, without torch and what else is here anyway.
PACKAGES = {
    "ultralytics": ["ultralytics==8.4.190"],
    "samgeo": [
        *("segment-geospatial==1.4.2", "segment_anything", "leafmap", "xyzservices", "geopandas"),
        *("shapely", "pyproj", "pyogrio", "rasterio", "affine", "click-plugins", "cligj"),
    ],
}


def _install(name: str, folder: Path) -> None:
    """Install a loader's packages into a folder of their own, or skip."""
    uv, pip = shutil.which("uv"), [shutil.which("python3") or sys.executable, "-m", "pip"]
    tool = [uv, "pip", "install", "--python", sys.executable] if uv else [*pip, "install"]
    words = [*tool, "--quiet", "--no-deps", "--target", str(folder), *PACKAGES[name]]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} cannot be installed here: {done.stderr.strip()[-200:]}")


def _load(name: str, file: Path, folder: Path) -> dict[str, Any]:
    _install(name, folder / "site")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.deploy.other_loaders", name, str(file)],
        cwd=REPOSITORY,
        env=os.environ
        | {"PYTHONPATH": str(folder / "site"), "YOLO_CONFIG_DIR": str(folder), "HOME": str(folder)}
        | {"YOLO_AUTOINSTALL": "false", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if "No module named" in done.stderr and done.returncode:
        pytest.skip(f"{name} wants more than is here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_ultralytics_misses_nothing(tmp_path: Path) -> None:
    """Of the full size: each tensor is one number, seen as many."""
    whole = video_model(on_meta=True).state_dict()
    state = {k: torch.zeros(1, dtype=v.dtype).expand(v.shape) for k, v in whole.items()}
    torch.save(state, tmp_path / "sam3.pt")
    found = _load("ultralytics", tmp_path / "sam3.pt", tmp_path)
    assert found["missing"] == [[], []]
    assert min(found["tensors"]) > 700


def test_samgeo_has_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_small(monkeypatch)
    write_sam3(tmp_path / "sam3.pt")
    found = _load("samgeo", tmp_path / "sam3.pt", tmp_path)
    assert found["other"] == []
    assert found["tensors"] > 250
