"""Ask a server by tritonclient, which is installed apart, as docs/serving/protocols.md shows.

`python -m tests.serving.triton_client ADDRESS IMAGE`, with the packages on PYTHONPATH. Prints what
it was answered, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def tensor(name: str, *values: bytes | str, binary: bool = True) -> Any:
    """Return a BYTES tensor, in binary or in JSON."""
    made = triton.InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array(values, dtype=object), binary_data=binary)
    return made


def rows(answer: Any) -> dict[str, Any]:
    """Return an answer's tensors."""
    found = {name: answer.as_numpy(name) for name in ("image", "score", "box", "size")}
    found["prompt"] = np.array([text.decode() for text in answer.as_numpy("prompt")])
    return {name: array.tolist() for name, array in found.items()} | {
        "mask": [json.loads(mask) for mask in answer.as_numpy("mask")]
    }


def ask(address: str, image: bytes) -> dict[str, Any]:
    """Return what the server tells of itself, and what it finds, asked in several ways."""
    client = triton.InferenceServerClient(address)
    inputs = [tensor("image", image, image), tensor("prompt", "circle", "cross")]
    binary = rows(client.infer("nano", inputs, request_id="7"))
    some = [
        triton.InferRequestedOutput("score", binary_data=False),
        triton.InferRequestedOutput("mask", binary_data=True),
    ]
    inputs[1] = tensor("prompt", "circle", "cross", binary=False)
    partly = client.infer("nano", inputs, model_version="1", outputs=some)
    words = {"prompts": "circle", "threshold": 0.3}
    later = client.async_infer("nano", inputs[:1], parameters=words).get_result()
    nothing = client.infer("nano", inputs, parameters={"threshold": 1.0})
    boxes = triton.InferInput("boxes", [1, 4], "FP32")
    boxes.set_data_from_numpy(np.array([binary["box"][0]], np.float32))
    low = {"threshold": 0.01}
    examples = rows(client.infer("nano", [tensor("image", image), boxes], parameters=low))
    try:
        client.infer("other", inputs)
        refused = ""
    except InferenceServerException as error:
        refused = f"{error.status()} {error.message()}"
    return {
        "live": [client.is_server_live(), client.is_server_ready()],
        "ready": [client.is_model_ready("nano", "1"), client.is_model_ready("other")],
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("nano"),
        "binary": binary,
        "partly": {
            "score": partly.as_numpy("score").tolist(),
            "mask": len(partly.as_numpy("mask")),
            "box": partly.as_numpy("box"),
        },
        "later": rows(later),
        "nothing": nothing.as_numpy("box").shape,
        "examples": examples["prompt"],
        "refused": refused,
    }


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], Path(sys.argv[2]).read_bytes())))
