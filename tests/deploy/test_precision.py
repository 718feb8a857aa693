"""Narrower graphs of a small one: its other outputs stay, and its numbers are near."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from app.deploy.precision import SCOPES, narrow, quantise

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.normal(size=(1, 3, 4, 4)).astype(np.float32)
WEIGHT = RANDOM.normal(size=(4, 8)).astype(np.float32)
PLACES = RANDOM.normal(size=(1, 8)).astype(np.float32)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A trunk's product, and an output that is a constant, as small position maps become."""
    pixels = ir.Value(
        name="pixels", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, 3, 4, 4))
    )
    constants = []
    for name, array in (("weight", WEIGHT), ("position", PLACES)):
        tensor = ir.tensor(array, name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        constants.append(ir.Value(name=name, type=kind, shape=shape, const_value=tensor))
    product = ir.node("MatMul", [pixels, constants[0]])
    product.metadata_props[SCOPES] = "['trunk.blocks.0.mlp.fc1']"
    features = product.outputs[0]
    features.name, features.dtype, features.shape = (
        "fpn0",
        ir.DataType.FLOAT,
        ir.Shape((1, 3, 4, 8)),
    )
    outputs = [features, constants[1]]
    body = ir.Graph(
        [pixels], outputs, nodes=[product], initializers=constants, opset_imports={"": 20}
    )
    ir.save(ir.Model(body, ir_version=10), tmp_path / "image.onnx")
    return tmp_path / "image.onnx"


def _run(file: Path) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(["fpn0", "position"], {"pixels": PIXELS})


@pytest.mark.parametrize(("precision", "within"), [("int8", 0.1), ("fp16", 1e-2), ("bf16", 5e-2)])
def test_a_constant_output_stays(graph: Path, precision: str, within: float, capfd) -> None:
    file = graph.with_name(f"image.{precision}.onnx")
    if precision == "int8":
        quantise(graph, file, [PIXELS])
    else:
        narrow(graph, file, precision, emulated=True)
    features, position = _run(file)
    np.testing.assert_array_equal(position, PLACES)
    errors = np.abs(features - PIXELS @ WEIGHT).max()
    assert 0 < errors < within
    assert capfd.readouterr().err == ""  # ONNX Runtime warns of what is left over
