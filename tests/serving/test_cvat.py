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
from tests.serving.cvat_server import TASK, cvat
from tests.serving.servers import SCENE, Loaded, drawn, opened, scene

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


@pytest.mark.system
def test_cvats_command_annotates_a_task(client: httpx.Client, nano: Loaded, tmp_path: Path) -> None:
    """cvat-cli itself, against a server that answers as CVAT does."""
    command = Path(os.environ.get("SAM3_CVAT_PYTHON", "/nowhere/python")).with_name("cvat-cli")
    if not command.exists():
        pytest.skip('no cvat-cli: pip install "cvat-sdk[masks]" cvat-cli; SAM3_CVAT_PYTHON')
    images = {"a.png": (scene(), 480, 320), "b.png": (drawn(1), 90, 70)}
    with cvat(images, {40: "cross", 41: "circle", 42: "hexagon"}) as server:
        words = ["--server-host", "http://127.0.0.1", "--server-port", server.address.split(":")[2]]
        words += ["task", "auto-annotate", str(TASK), "--function-file", str(FILE)]
        words += ["-p", f"server=str:{str(client.base_url).rstrip('/')}"]
        words += ["-p", "prompts=str:cross,circle", "--conf-threshold", "0.3"]
        done = subprocess.run(
            [command, *words],
            capture_output=True,
            text=True,
            env={"CVAT_ACCESS_TOKEN": "secret", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 0, done.stderr
    assert server.tokens == {"Bearer secret"}
    (uploaded,) = server.annotations
    found = nano.finder.predict(opened(scene()), ["cross", "circle"], threshold=0.3)
    shapes = [shape for shape in uploaded["shapes"] if shape["frame"] == 0]
    ids = {"cross": 40, "circle": 41}
    assert [s["label_id"] for s in shapes] == [ids[found.prompts[p]] for p in found.prompt_ids]
    for shape, mask in zip(shapes, found.masks, strict=True):
        assert shape["type"] == "mask"
        *runs, left, top, right, bottom = map(int, shape["points"])
        pixels = np.repeat(np.arange(len(runs)) % 2, runs).astype(bool)
        whole = np.zeros((320, 480), bool)
        rows, columns = slice(top, bottom + 1), slice(left, right + 1)
        whole[rows, columns] = pixels.reshape(bottom + 1 - top, right + 1 - left)
        assert np.array_equal(whole, decode(mask))


def test_it_needs_nothing_of_this_project() -> None:
    """CVAT runs the file alone, where neither torch nor our packages are."""
    text = FILE.read_text()
    assert "from app" not in text
    assert "import app" not in text
