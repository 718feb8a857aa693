"""Narrower graphs of small ones: their other outputs stay, and their numbers are near."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from app.deploy.precision import SCOPES, narrow, quantise

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.normal(size=(1, 3, 4, 4)).astype(np.float32)
WEIGHT = RANDOM.normal(size=(4, 8)).astype(np.float32)
PLACES = RANDOM.normal(size=(1, 8)).astype(np.float32)
KERNEL = RANDOM.normal(size=(2, 3, 3, 3)).astype(np.float32)
BIAS = RANDOM.normal(size=2).astype(np.float32)
WORDS = [{"text": np.zeros(1, dtype=np.float32)}]
FLOAT = ir.TensorType(ir.DataType.FLOAT)


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    """A folder of an image graph and a ground graph.

    Of the image there are a trunk's product, and a constant, as small position maps become; the
    ground graph finds masks by a convolution, and presence by what reads them.
    """
    pixels = ir.Value(name="pixels", type=FLOAT, shape=ir.Shape(PIXELS.shape))
    weight, places = _constant("weight", WEIGHT), _constant("position", PLACES)
    product = ir.node("MatMul", [pixels, weight])
    product.metadata_props[SCOPES] = "['trunk.blocks.0.mlp.fc1']"
    features = _named(product, "fpn0", (1, 3, 4, 8))
    _save(tmp_path / "image.onnx", [pixels], [features, places], [product], [weight, places])

    features = ir.Value(name="fpn0", type=FLOAT, shape=ir.Shape((1, 3, 4, 8)))
    kernel, bias = _constant("kernel", KERNEL), _constant("bias", BIAS)
    nodes = [ir.node("Relu", [features])]
    seen = _named(nodes[-1], "seen", (1, 3, 4, 8))
    nodes.append(ir.node("Conv", [seen, kernel, bias], {"pads": [1, 1, 1, 1]}))
    masks = _named(nodes[-1], "masks", (1, 2, 4, 8))
    nodes.append(ir.node("Sigmoid", [masks]))
    presence = _named(nodes[-1], "presence", (1, 2, 4, 8))
    _save(tmp_path / "ground.onnx", [features], [masks, presence], nodes, [kernel, bias])
    return tmp_path


def _constant(name: str, array: NDArray[np.float32]) -> ir.Value:
    shape = ir.Shape(array.shape)
    return ir.Value(name=name, type=FLOAT, shape=shape, const_value=ir.tensor(array, name=name))


def _named(node: ir.Node, name: str, shape: tuple[int, ...]) -> ir.Value:
    (value,) = node.outputs
    value.name, value.type, value.shape = name, FLOAT, ir.Shape(shape)
    return value


def _save(
    file: Path,
    inputs: list[ir.Value],
    outputs: list[ir.Value],
    nodes: list[ir.Node],
    constants: list[ir.Value],
) -> None:
    body = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 20})
    ir.save(ir.Model(body, ir_version=10), file)


def _run(file: Path, **inputs: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize(("precision", "within"), [("int8", 0.1), ("fp16", 1e-2), ("bf16", 5e-2)])
def test_a_constant_output_stays(graphs: Path, precision: str, within: float, capfd) -> None:
    file = graphs / f"image.{precision}.onnx"
    if precision == "int8":
        quantise(graphs, [PIXELS], WORDS)
    else:
        narrow(graphs / "image.onnx", file, precision, emulated=True)
    found = _run(file, pixels=PIXELS)
    np.testing.assert_array_equal(found["position"], PLACES)
    errors = np.abs(found["fpn0"] - PIXELS @ WEIGHT).max()
    assert 0 < errors < within
    assert capfd.readouterr().err == ""  # ONNX Runtime warns of what is left over


def test_a_convolution_is_that_of_rounded_numbers(graphs: Path) -> None:
    """Rounded are what goes in, the kernel of each unit, and what comes out, to 127 steps."""
    quantise(graphs, [PIXELS / 3, PIXELS, PIXELS / 2], WORDS)
    features = PIXELS @ WEIGHT
    found = _run(graphs / "ground.int8.onnx", fpn0=features)
    read = torch.from_numpy(features).relu()
    kernel, bias = torch.from_numpy(KERNEL), torch.from_numpy(BIAS)
    whole = torch.conv2d(read, kernel, bias, padding=1)
    rounded = torch.conv2d(
        _rounded(read, read.max()),
        _rounded(kernel, kernel.abs().amax((1, 2, 3), True)),
        bias,
        padding=1,
    )
    step = float(whole.abs().max()) / 127
    expected = _rounded(rounded, whole.abs().max()).numpy()
    errors = np.abs(found["masks"] - expected)
    assert (errors > step / 2).mean() < 0.05  # sums that lie between two steps go either way
    assert errors.max() < 1.01 * step
    assert np.abs(found["masks"] - whole.numpy()).max() > step / 2
    np.testing.assert_allclose(found["presence"], 1 / (1 + np.exp(-found["masks"])), atol=1e-6)


def _rounded(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return (values * 127 / largest).round().clamp(-127, 127) * largest / 127


def test_a_graph_with_nothing_to_round_is_not_written(graphs: Path) -> None:
    features = ir.Value(name="fpn0", type=FLOAT, shape=ir.Shape((1, 3, 4, 8)))
    node = ir.node("Sigmoid", [features])
    scores = _named(node, "scores", (1, 3, 4, 8))
    _save(graphs / "ground.onnx", [features], [scores], [node], [])
    quantise(graphs, [PIXELS], WORDS)
    names = {file.name for file in graphs.glob("*.onnx")}
    assert names == {"image.onnx", "ground.onnx", "image.int8.onnx"}
