"""A graph in float32 → the same in float16, bfloat16 or int8, its types written into it.

Only what costs time is narrowed: matrix products and convolutions, with their weights. What lies
between them stays in float32, so that no sum, norm or softmax leaves the range of a half.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

PRODUCTS = ("MatMul", "Gemm")
NARROWED = {  # ONNX knows no convolutions in bfloat16 before opset 22, which TensorRT 10.3 lacks
    "fp16": (*PRODUCTS, "Conv", "ConvTranspose"),
    "bf16": PRODUCTS,
}
TRUNK = re.compile(r"\.mlp\.fc\d|\.attn\.(qkv|proj)\b")  # the products of a block with weights
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch.onnx notes which module a node comes from
TINY = 1e-8  # least magnitude that is divided by: of what is 0 throughout
ZERO = "zero.int8"
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def narrow(source: Path, file: Path, precision: str, *, emulated: bool = False) -> None:
    """Write a graph whose products are computed in half precision.

    Args:
        precision: fp16 or bf16.
        emulated: compute in float32 what has been rounded to the half's digits, and round what
            comes out: what a device does, for a CPU that has no such kernels.
    """
    model = ir.load(source)
    narrowing = _Narrowing(model.graph, TYPES[precision], emulated)
    for node in list(model.graph):
        if node.op_type in NARROWED[precision]:
            narrowing.narrow(node)
    _drop_unused(model.graph)
    save(model, file)


class _Narrowing:
    """Puts the nodes of a graph into half precision, one by one.

    Args:
        emulated: as of `narrow`.
    """

    def __init__(self, graph: ir.Graph, half: ir.DataType, emulated: bool) -> None:
        self._graph, self._half, self._emulated = graph, half, emulated
        self._known: dict[ir.Value, ir.Value] = {}  # a value → it in half precision

    def narrow(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT:
                continue
            if value not in self._known:  # made once, where it is first read
                constant = value.const_value is not None
                self._known[value] = self._round(value) if constant else self._cast(value, node)
            node.replace_input_with(index, self._known[value])
        self._cast_back(node)

    def _round(self, value: ir.Value) -> ir.Value:
        """A weight in half precision."""
        assert value.const_value is not None
        array = value.const_value.numpy().astype(self._half.numpy())
        if self._emulated:
            array = array.astype(np.float32)
        return _constant(self._graph, f"{value.name}.half", array)

    def _cast(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        for kind in (self._half, ir.DataType.FLOAT) if self._emulated else (self._half,):
            cast = _cast(value, kind)
            self._graph.insert_before(reader, cast)
            value = cast.outputs[0]
        return value

    def _cast_back(self, node: ir.Node) -> None:
        """What comes out in float32 again, for all that read it."""
        result = last = node.outputs[0]
        users = list(result.uses())
        for kind in (self._half, ir.DataType.FLOAT) if self._emulated else (ir.DataType.FLOAT,):
            cast = _cast(last, kind)
            self._graph.insert_after(node, cast)
            node, last = cast, cast.outputs[0]
        if not self._emulated:
            result.dtype = self._half
        for user, index in users:
            user.replace_input_with(index, last)
        for index, output in enumerate(self._graph.outputs):
            if output is result:
                last.name, result.name = result.name, f"{result.name}.half"
                self._graph.outputs[index] = last


def _cast(value: ir.Value, kind: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": kind})
    node.outputs[0].dtype = kind
    node.outputs[0].shape = value.shape
    return node


def _drop_unused(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]


def quantise(source: Path, file: Path, images: Iterable[NDArray[np.float32]]) -> None:
    """Write the image graph with its trunk's MLPs and projections in int8, by explicit Q/DQ pairs.

    Weights are symmetric, one scale for each unit; activations symmetric, one scale for each
    product, so wide that what the images showed is not cut: as TensorRT takes them.

    Args:
        images: `pixels` of the user's own images, (1, 3, R, R).
    """
    model = ir.load(source)
    largest = _largest(source, images)
    pairs: dict[ir.Value, ir.Value] = {}  # what is read → the same, rounded
    for node in _products(model.graph):
        read, weight = node.inputs
        assert read is not None
        assert weight is not None
        assert weight.const_value is not None
        if read not in pairs:
            scale = np.float32(max(largest[read.name or ""], TINY) / 127)
            pairs[read] = _add_pair(model.graph, node, read, scale)
        node.replace_input_with(0, pairs[read])
        node.replace_input_with(1, _add_int8(model.graph, node, weight))
    _drop_unused(model.graph)
    save(model, file)


def _products(graph: ir.Graph) -> list[ir.Node]:
    """The trunk's products with weights."""
    return [
        node
        for node in graph
        if node.op_type == "MatMul" and TRUNK.search(node.metadata_props.get(SCOPES, ""))
    ]


def _largest(source: Path, images: Iterable[NDArray[np.float32]]) -> dict[str, float]:
    """What is read by a product → its largest magnitude.

    Each is reduced where it is made, so that none is kept: the quantiser of ONNX Runtime takes
    20 GB for `small` at 672 px, as it reduces all at the end.
    """
    model = ir.load(source)
    names: list[str] = []
    for node in _products(model.graph):
        read = node.inputs[0]
        assert read is not None
        if read.name in names:
            continue
        magnitude = ir.node("Abs", [read])
        most = ir.node("ReduceMax", magnitude.outputs, attributes={"keepdims": 0})
        most.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        most.outputs[0].shape = ir.Shape(())
        model.graph.insert_before(node, [magnitude, most])
        model.graph.outputs.insert(len(names), most.outputs[0])
        names.append(str(read.name))
    del model.graph.outputs[len(names) :]
    _drop_unused(model.graph)
    reducing = source.with_name(f"{source.stem}.reducing.onnx")
    ir.save(model, reducing)  # beside the data of the source, which it reads
    try:
        session = onnxruntime.InferenceSession(str(reducing), providers=["CPUExecutionProvider"])
        found = [session.run(None, {"pixels": pixels}) for pixels in images]
    finally:
        reducing.unlink()
    return dict(zip(names, np.max(found, axis=0).tolist(), strict=True))


def _add_pair(graph: ir.Graph, reader: ir.Node, value: ir.Value, scale: np.float32) -> ir.Value:
    """A value rounded to int8 and back, before who reads it."""
    rounding = [_constant(graph, f"{value.name}.scale", np.array(scale)), _zero(graph)]
    quantised = ir.node("QuantizeLinear", [value, *rounding])
    restored = ir.node("DequantizeLinear", [*quantised.outputs, *rounding])
    graph.insert_before(reader, [quantised, restored])
    restored.outputs[0].type, restored.outputs[0].shape = value.type, value.shape
    return restored.outputs[0]


def _add_int8(graph: ir.Graph, reader: ir.Node, weight: ir.Value) -> ir.Value:
    """A weight (in, out) in int8, one scale for each unit that comes out."""
    assert weight.const_value is not None
    values = weight.const_value.numpy()
    scale = (np.abs(values).max(axis=0).clip(min=TINY) / 127).astype(np.float32)
    rounded = np.rint(values / scale).clip(-127, 127).astype(np.int8)
    parts = {"int8": rounded, "scale": scale, "zero": np.zeros(len(scale), dtype=np.int8)}
    inputs = [_constant(graph, f"{weight.name}.{key}", part) for key, part in parts.items()]
    restored = ir.node("DequantizeLinear", inputs, attributes={"axis": 1})
    graph.insert_before(reader, restored)
    restored.outputs[0].type, restored.outputs[0].shape = weight.type, weight.shape
    return restored.outputs[0]


def _zero(graph: ir.Graph) -> ir.Value:
    return graph.initializers.get(ZERO) or _constant(graph, ZERO, np.array(0, dtype=np.int8))


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
    value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def save(model: ir.Model, file: Path) -> None:
    """Write a graph, its large tensors beside it as `NAME.onnx.data`.

    What torch.onnx notes of the machine that it ran on (stack traces, with paths) is left out.
    """
    model.metadata_props.clear()
    for node in model.graph:
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[SCOPES] = scopes
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    ir.save(model, file, external_data=f"{file.name}.data")
