"""NVIDIA's own client, installed apart, is answered as the predictor answers."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.deploy.apart import run_apart
from tests.serving.servers import SCENE, Loaded, opened, scene

pytestmark = pytest.mark.system


def test_tritonclient_is_answered(client: httpx.Client, nano: Loaded, tmp_path: Path) -> None:
    address = str(client.base_url).removeprefix("http://")
    program = ("-m", "tests.serving.triton_client", address, str(SCENE))
    told = json.loads(run_apart("triton", tmp_path, *program))
    assert told["live"] == [True, True]
    assert told["ready"] == [True, False]
    assert told["server"]["name"] == "sam3-finetuning"
    assert told["model"]["versions"] == ["1"]
    found = nano.finder.predict(opened(scene()), ["circle", "cross"])
    assert len(found) > 1
    binary = told["binary"]
    assert binary["score"] == [*found.scores.tolist(), *found.scores.tolist()]
    assert binary["image"] == [0] * len(found) + [1] * len(found)
    assert binary["mask"] == [*found.masks, *found.masks]
    words = [found.prompts[prompt] for prompt in found.prompt_ids]
    assert binary["prompt"] == [*words, *words]
    assert binary["size"] == [[found.height, found.width]] * 2
    assert told["partly"] == {"score": binary["score"], "mask": 2 * len(found), "box": None}
    lower = nano.finder.predict(opened(scene()), "circle", threshold=0.3)
    assert np.array_equal(told["later"]["score"][: len(lower)], lower.scores)
    assert told["nothing"] == [0, 4]
    assert set(told["examples"]) == {"visual"}
    assert told["refused"].startswith("404")
    assert "there is nano" in told["refused"]
