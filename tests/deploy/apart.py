"""Packages of other tools, from the package index, in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

# What the tools' modules import, without torch and what else is here anyway.
PACKAGES = {
    "ultralytics": ["ultralytics==8.4.190"],
    "samgeo": [
        *("segment-geospatial==1.4.2", "segment_anything", "leafmap", "xyzservices", "geopandas"),
        *("shapely", "pyproj", "pyogrio", "rasterio", "affine", "click-plugins", "cligj"),
    ],
    "roboflow": [
        "inference-models==0.39.6",
        "supervision==0.31.2",
        "backoff",
        "defusedxml",
        "pydeprecate",
    ],
    "triton": [
        *("tritonclient==2.73.0", "python-rapidjson", "geventhttpclient", "gevent", "greenlet"),
        *("zope.event", "zope.interface", "brotli"),
    ],
}


def run_apart(name: str, folder: Path, *arguments: str) -> str:
    """Run Python with a tool's packages; return the last line of what it prints.

    The test is skipped, with the reason, where the packages cannot be had.

    Args:
        folder: empty, for the packages and for what the tool keeps in a home.
    """
    uv = str(Path(sys.executable).with_name("uv"))  # of the lock
    install = [uv, "pip", "install", "--python", sys.executable, "--quiet", "--no-deps"]
    words = [*install, "--target", str(folder / "site"), *PACKAGES[name]]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} cannot be installed here: {done.stderr.strip()[-200:]}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
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
    return done.stdout.splitlines()[-1]
