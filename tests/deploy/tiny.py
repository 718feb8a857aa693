"""An exported folder of two graphs of a few operators, whose answers numpy knows as well.

The image graph averages colours; the ground graph scores a prompt by the image's mean colour.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from app.deploy.runtime.golden import sample
from app.deploy.runtime.manifest import FILE, Manifest, Tolerance, read_manifest
from app.deploy.runtime.runtime import Runtime
from app.files import hash_file

SIDE, TOKENS, WIDTH = 8, 4, 3  # R, L, D
PROMPTS = ("red", "green", "blue")
A_PASS, QUERIES = 2, 2  # K, Q
BOXES = np.array([[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]], dtype=np.float32)  # of each query
SHAPES: dict[str, dict[str, list[int]]] = {
    "image": {
        "pixels": [1, 3, SIDE, SIDE],
        "fpn0": [1, WIDTH, 4, 4],
        "fpn1": [1, WIDTH, 2, 2],
        "fpn2": [1, WIDTH, 1, 1],
        "position": [1, WIDTH, 1, 1],
    },
    "ground": {
        "fpn0": [1, WIDTH, 4, 4],
        "fpn1": [1, WIDTH, 2, 2],
        "fpn2": [1, WIDTH, 1, 1],
        "position": [1, WIDTH, 1, 1],
        "text": [A_PASS, TOKENS, WIDTH],
        "text_mask": [A_PASS, TOKENS],
        "scores": [A_PASS, QUERIES],
        "presence": [A_PASS],
        "boxes": [A_PASS, QUERIES, 4],
        "masks": [A_PASS, QUERIES, 4, 4],
    },
    "text": {"tokens": [1, TOKENS], "text": [1, TOKENS, WIDTH], "text_mask": [1, TOKENS]},
}
TYPES = {"text_mask": TensorProto.BOOL, "tokens": TensorProto.INT64}
NEAR = Tolerance(cosine=0.9999, scores=1e-4, boxes=1e-4, mask_iou=0.999)


def expected_score(image: np.ndarray, prompt: str) -> float:
    """Of the first query on a picture of one colour (3,), 0..255; the second has half of it."""
    levels = image / 127.5 - 1
    weights = np.where(np.array(PROMPTS) == prompt, 2, -1)
    return float(1 / (1 + np.exp(-(levels * weights).sum())))


def write_folder(folder: Path, *, any_words: bool = False) -> Path:
    """A folder in fp32 with golden answers."""
    folder.mkdir(parents=True)
    onnx.save(image_graph(), folder / "image.onnx")
    onnx.save(ground_graph(), folder / "ground.onnx")
    if any_words:
        onnx.save(text_graph(), folder / "text.onnx")
    else:
        np.savez(folder / "text.npz", features=features(), mask=np.zeros((3, TOKENS), bool))
    graphs = ["image", "ground", *(["text"] if any_words else [])]
    write_manifest(
        folder,
        Manifest(
            size="tiny",
            resolution=SIDE,
            prompts=None if any_words else PROMPTS,
            classes=PROMPTS[:2],
            prompts_a_pass=A_PASS,
            context_length=TOKENS,
            masks=True,
            top=None,
            threshold=0.6,
            opset=18,
            graphs={graph: {"fp32": f"{graph}.onnx"} for graph in graphs},
            files={},
            shapes={graph: SHAPES[graph] for graph in graphs},
            tolerances={"fp32": NEAR},
        ),
    )
    if not any_words:
        write_golden(folder)
    return folder


def features() -> np.ndarray:
    """(3, L, D): a prompt is for its own colour and against the others."""
    words = np.eye(3, dtype=np.float32) * 3 - 1
    return np.repeat(words[:, None], TOKENS, axis=1)


def write_golden(folder: Path) -> None:
    runtime = Runtime.load(folder, backend="onnxruntime")
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)
    text, mask = runtime.text(PROMPTS[:A_PASS])
    found: dict[str, Any] = dict(runtime.backend.image(pixels[None] / np.float32(127.5) - 1))
    found |= runtime.backend.ground(found, text, mask)
    kept = {name: sample(value) for name, value in found.items()}
    np.savez(folder / "golden.npz", pixels=pixels, text=text, text_mask=mask, **kept)
    write_manifest(folder, read_manifest(folder))


def write_manifest(folder: Path, manifest: Manifest, **changes: Any) -> None:
    """With the sizes and hashes of what is there."""
    files: Mapping[str, Mapping[str, Any]] = {
        file.name: {"bytes": file.stat().st_size, "sha256": hash_file(file)}
        for file in folder.iterdir()
        if file.is_file() and file.name != FILE
    }
    described = replace(manifest, files=files, **changes)
    (folder / FILE).write_text(json.dumps(described.to_json()), encoding="utf-8")


def image_graph(side: int = SIDE) -> onnx.ModelProto:
    nodes = [
        helper.make_node("AveragePool", ["pixels"], [name], kernel_shape=[n, n], strides=[n, n])
        for name, n in (("fpn0", side // 4), ("fpn1", side // 2), ("fpn2", side))
    ]
    nodes.append(helper.make_node("Sub", ["fpn2", "fpn2"], ["position"]))
    shapes = {**SHAPES["image"], "pixels": [1, 3, side, side]}
    return _model(nodes, shapes, ["pixels"], {})


def ground_graph() -> onnx.ModelProto:
    constants = {
        "column": np.array([WIDTH, 1], dtype=np.int64),
        "flat": np.array([A_PASS], dtype=np.int64),
        "one": np.array([1], dtype=np.int64),
        "shares": np.array([[1, 0.5]], dtype=np.float32),
        "all_boxes": np.stack([BOXES] * A_PASS),
        "ones": np.ones((A_PASS, QUERIES, 4, 4), dtype=np.float32),
    }
    nodes = [
        helper.make_node("ReduceMean", ["text", "one"], ["words"], keepdims=0),  # (K, D)
        helper.make_node("Reshape", ["fpn2", "column"], ["colour"]),
        helper.make_node("MatMul", ["words", "colour"], ["logits"]),  # (K, 1)
        helper.make_node("Sigmoid", ["logits"], ["likely"]),
        helper.make_node("Mul", ["likely", "shares"], ["scores"]),
        helper.make_node("Reshape", ["likely", "flat"], ["presence"]),
        helper.make_node("Identity", ["all_boxes"], ["boxes"]),
        helper.make_node("ReduceMean", ["fpn0", "one"], ["grey"], keepdims=1),  # (1, 1, 4, 4)
        helper.make_node("Mul", ["grey", "ones"], ["masks"]),
    ]
    inputs = ["fpn0", "fpn1", "fpn2", "position", "text", "text_mask"]
    return _model(nodes, SHAPES["ground"], inputs, constants)


def text_graph() -> onnx.ModelProto:
    constants = {
        "zero": np.zeros((), dtype=np.int64),
        "last": np.array([2], dtype=np.int64),
        "threes": np.ones((1, 1, WIDTH), dtype=np.float32),
    }
    nodes = [
        helper.make_node("Equal", ["tokens", "zero"], ["text_mask"]),
        helper.make_node("Cast", ["tokens"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "last"], ["tall"]),
        helper.make_node("Mul", ["tall", "threes"], ["text"]),
    ]
    return _model(nodes, SHAPES["text"], ["tokens"], constants)


def _model(
    nodes: Sequence[onnx.NodeProto],
    shapes: Mapping[str, Sequence[int]],
    inputs: Sequence[str],
    constants: Mapping[str, np.ndarray],
) -> onnx.ModelProto:
    values = {
        name: helper.make_tensor_value_info(name, TYPES.get(name, TensorProto.FLOAT), shape)
        for name, shape in shapes.items()
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [values[name] for name in inputs],
        [value for name, value in values.items() if name not in inputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
