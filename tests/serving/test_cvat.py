"""CVAT's function by CVAT's own driver, where cvat-sdk is: SAM3_CVAT_PYTHON=/path/of/bin/python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.datasets.rle import decode
from tests.helpers import REPOSITORY
from tests.serving.servers import SCENE, Loaded, opened, scene

FILE = REPOSITORY / "app" / "serving" / "cvat.py"
DRIVER = Path(__file__).with_name("cvat_driver.py")


def drive(client: httpx.Client, kind: str) -> list[dict[str, Any]]:
    python = os.environ.get("SAM3_CVAT_PYTHON")
    if python is None:
        pytest.skip('no cvat-sdk: pip install "cvat-sdk[masks]" in an environment of its own')
    address = str(client.base_url).rstrip("/")
    done = subprocess.run(
        [python, DRIVER, FILE, SCENE, address, kind], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.system
@pytest.mark.parametrize("kind", ["mask", "polygon", "rectangle"])
def test_shapes_are_what_is_found(client: httpx.Client, nano: Loaded, kind: str) -> None:
    found = nano.finder.predict(opened(scene()), ["circle", "cross"], threshold=0.3)
    shapes = drive(client, kind)[: len(found)]
    ids = {"circle": 41, "cross": 40}
    assert [s["label"] for s in shapes] == [ids[found.prompts[p]] for p in found.prompt_ids]
    assert {s["frame"] for s in shapes} == {5}
    assert {s["type"] for s in shapes} == {kind}
    for shape, mask, box in zip(shapes, found.masks, found.boxes_xyxy, strict=True):
        points = np.array(shape["points"])
        if kind == "mask":
            assert np.array_equal(points.astype(bool), decode(mask))
        elif kind == "polygon":
            rows, columns = np.nonzero(decode(mask))
            assert columns.min() <= points[::2].min() <= points[::2].max() <= columns.max() + 1
            assert rows.min() <= points[1::2].min() <= points[1::2].max() <= rows.max() + 1
        else:
            assert points == pytest.approx(box, abs=1e-3)


def test_it_needs_nothing_of_this_project() -> None:
    """CVAT runs the file alone, where neither torch nor our packages are."""
    text = FILE.read_text()
    assert "from app" not in text
    assert "import app" not in text
