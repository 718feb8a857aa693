"""Convert a graph from float32 to float16, bfloat16 or int8, with its types written into it.

Only matrix products and convolutions are converted, with their weights, because they cost the time.
All else stays in float32, so that no sum, norm or softmax overflows a half.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

PRODUCTS = ("MatMul", "Gemm")
NARROWED = {  # ONNX knows no convolutions in bfloat16 before opset 22, which TensorRT 10.3 lacks
    "fp16": (*PRODUCTS, "Conv"),
    "bf16": PRODUCTS,
}
# Products with weights: of the trunk, its neck, and DETR's encoder, which process each pixel.
WEIGHTED = re.compile(
    r"\.mlp\.fc\d|\.attn\.(qkv|proj)\b|\.dconv_2x2\w*\.product|\.encoder\.layers\.\d+\.linear\d"
)
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of torch.onnx: the module a node comes from
EPSILON = 1e-8  # least magnitude to divide by, for tensors of zeros
ZERO = "zero.int8"
Arrays = Mapping[str, NDArray[Any]]
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def narrow(source: Path, file: Path, precision: str, *, emulated: bool = False) -> None:
    """Write a graph whose products are computed in half precision.

    Args:
        precision: fp16 or bf16.
        emulated: compute in float32 on inputs that are rounded to the half, and round the outputs,
            as a device does; for CPUs, which have no such kernels.
    """
    model = ir.load(source)
    narrowing = _Narrowing(model.graph, TYPES[precision], emulated)
    for node in list(model.graph):
        if node.op_type in NARROWED[precision]:
            narrowing.narrow(node)
    _drop_unused(model.graph)
    save(model, file)


class _Narrowing:
    """Converts the nodes of a graph to half precision, one by one.

    Args:
        emulated: as in `narrow`.
    """

    def __init__(self, graph: ir.Graph, half: ir.DataType, emulated: bool) -> None:
        self._graph, self._half, self._emulated = graph, half, emulated
        self._halves: dict[ir.Value, ir.Value] = {}  # a value → the same in half precision

    def narrow(self, node: ir.Node) -> None:
        """Convert one node: its inputs to the half, its output back to float32."""
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT:
                continue
            if value not in self._halves:  # converted once, before the first node that reads it
                constant = value.const_value is not None
                self._halves[value] = self._round(value) if constant else self._cast(value, node)
            node.replace_input_with(index, self._halves[value])
        self._cast_back(node)

    def _round(self, value: ir.Value) -> ir.Value:
        """Return a weight in half precision."""
        assert value.const_value is not None
        array = value.const_value.numpy().astype(self._half.numpy())
        if self._emulated:
            array = array.astype(np.float32)
        return _constant(self._graph, f"{value.name}.half", array)

    def _cast(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """Cast a value before the node that reads it."""
        for kind in (self._half, ir.DataType.FLOAT) if self._emulated else (self._half,):
            cast = _cast(value, kind)
            self._graph.insert_before(reader, cast)
            value = cast.outputs[0]
        return value

    def _cast_back(self, node: ir.Node) -> None:
        """Cast the output of a node back to float32, for all nodes that read it."""
        result = last = node.outputs[0]
        users = list(result.uses())
        for kind in (self._half, ir.DataType.FLOAT) if self._emulated else (ir.DataType.FLOAT,):
            cast = _cast(last, kind)
            self._graph.insert_after(node, cast)
            node, last = cast, cast.outputs[0]
        if not self._emulated:
            result.dtype = self._half
        _replace_uses(self._graph, result, last, users)


def _replace_uses(
    graph: ir.Graph, value: ir.Value, last: ir.Value, users: Iterable[tuple[ir.Node, int]]
) -> None:
    """Replace a value by another for its users, and among the outputs of the graph."""
    for user, index in users:
        user.replace_input_with(index, last)
    for index, output in enumerate(graph.outputs):
        if output is value:
            last.name, value.name = value.name, f"{value.name}.inner"
            graph.outputs[index] = last


def _cast(value: ir.Value, kind: ir.DataType) -> ir.Node:
    """Return a node that casts a value."""
    node = ir.node("Cast", [value], attributes={"to": kind})
    node.outputs[0].dtype = kind
    node.outputs[0].shape = value.shape
    return node


def _drop_unused(graph: ir.Graph) -> None:
    """Remove constants that no node reads."""
    outputs = set(graph.outputs)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]


def quantise(folder: Path, images: Iterable[NDArray[np.float32]], texts: Sequence[Arrays]) -> None:
    """Write `image.int8.onnx` and `ground.int8.onnx` beside the graphs in float32.

    The trunk's MLPs and projections, its neck, the MLPs of DETR's encoder and the convolutions of
    masks are quantised by explicit Q/DQ pairs; a graph that has none of these is not written.
    As TensorRT requires, all is symmetric: weights with a scale for each unit, activations with a
    scale for each tensor, which covers the largest magnitude on the images.

    Args:
        images: `pixels` of the user's own images, (1, 3, R, R).
        texts: `text` and `text_mask`, inputs of the ground graph, for one image after another, and
            from the first again.
    """
    for name, largest in _largest(folder, images, texts).items():
        model = ir.load(folder / f"{name}.onnx")
        quantising = _Quantising(model.graph, largest)
        for node in _quantised(model.graph):
            quantising.quantise(node)
        _drop_unused(model.graph)
        save(model, folder / f"{name}.int8.onnx")


def _quantised(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes to quantise: all that cost time but the convolution of the pixels."""
    pixels = graph.inputs[0]
    return [
        node
        for node in graph
        if (node.op_type == "MatMul" and WEIGHTED.search(node.metadata_props.get(SCOPES, "")))
        or (node.op_type == "Conv" and node.inputs[0] is not pixels)
    ]


def _rounded(node: ir.Node) -> list[ir.Value]:
    """Return the values to round beside a node's weight: its input, and a convolution's output.

    ONNX Runtime computes a convolution in int8 only where its output is rounded as well.
    """
    read = node.inputs[0]
    assert read is not None
    return [read, *(node.outputs if node.op_type == "Conv" else ())]


def _largest(
    folder: Path, images: Iterable[NDArray[np.float32]], texts: Sequence[Arrays]
) -> dict[str, dict[str, float]]:
    """Return graph → value to round → its largest magnitude on the images.

    Each value is reduced within the graph, because ONNX Runtime's own quantiser keeps all of them
    to the end and takes 20 GB for `small` at 672 px.
    """
    image, ground = (_Reducing(folder / f"{name}.onnx") for name in ("image", "ground"))
    for pixels, text in zip(images, itertools.cycle(texts), strict=False):
        features = image.run({"pixels": pixels})
        if ground.largest:
            ground.run({**features, **text})
    graphs = {"image": image.largest, "ground": ground.largest}
    return {name: largest for name, largest in graphs.items() if largest}


class _Reducing:
    """A graph with further outputs: the largest magnitude of each value to round.

    Attributes:
        largest: value → its largest magnitude in all runs so far.
    """

    def __init__(self, source: Path) -> None:
        model = ir.load(source)
        self._outputs = [str(value.name) for value in model.graph.outputs]
        self.largest: dict[str, float] = {}
        for node in _quantised(model.graph):
            for value in _rounded(node):
                if value.name not in self.largest:
                    self._reduce(model.graph, node, value)
        reducing = source.with_name(f"{source.stem}.reducing.onnx")
        ir.save(model, reducing)  # in the same folder, because it reads the data of the source
        try:
            self._session = onnxruntime.InferenceSession(
                str(reducing), providers=["CPUExecutionProvider"]
            )
        finally:
            reducing.unlink()

    def _reduce(self, graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
        """Add the largest magnitude of a value to the outputs."""
        magnitude = ir.node("Abs", [value])
        most = ir.node("ReduceMax", magnitude.outputs, attributes={"keepdims": 0})
        most.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        most.outputs[0].shape = ir.Shape(())
        graph.insert_after(node, [magnitude, most])
        graph.outputs.append(most.outputs[0])
        self.largest[str(value.name)] = 0.0

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph; return the outputs of the source by name."""
        names = {value.name for value in self._session.get_inputs()}
        outputs = self._session.run(None, {k: v for k, v in inputs.items() if k in names})
        count = len(self._outputs)
        for name, most in zip(self.largest, outputs[count:], strict=True):
            self.largest[name] = float(np.maximum(self.largest[name], most))  # nan stays
        return dict(zip(self._outputs, outputs[:count], strict=True))


class _Quantising:
    """Quantises the nodes of a graph to int8, one by one.

    Args:
        largest: value to round → its largest magnitude.
    """

    def __init__(self, graph: ir.Graph, largest: Mapping[str, float]) -> None:
        self._graph, self._largest = graph, largest
        self._rounded: set[ir.Value] = set()
        self._pairs: Counter[ir.Value] = Counter()

    def quantise(self, node: ir.Node) -> None:
        """Round a node's input, its weight, and a convolution's output."""
        read, weight = node.inputs[:2]
        assert read is not None
        assert weight is not None
        if read not in self._rounded:
            pair = self._pair(read)
            self._graph.insert_before(node, pair)
            node.replace_input_with(0, pair[-1].outputs[0])
        convolution = node.op_type == "Conv"
        node.replace_input_with(1, self._round_weight(node, weight, axis=0 if convolution else 1))
        if convolution:
            (result,) = node.outputs
            users = list(result.uses())
            pair = self._pair(result)
            self._graph.insert_after(node, pair)
            last = pair[-1].outputs[0]
            self._rounded.add(last)
            _replace_uses(self._graph, result, last, users)

    def _pair(self, value: ir.Value) -> list[ir.Node]:
        """Return the nodes that round a value to int8 and back, for one node that reads it.

        The scales of several pairs of one value differ in their last digit, because ONNX Runtime
        joins equal pairs and then multiplies in float32.
        """
        scale = np.float32(max(self._largest[str(value.name)], EPSILON) / 127)
        for _ in range(self._pairs[value]):
            scale = np.nextafter(scale, np.float32(np.inf))
        name = f"{value.name}.scale.{self._pairs[value]}"
        self._pairs[value] += 1
        rounding = [_constant(self._graph, name, np.array(scale)), self._zero()]
        quantised = ir.node("QuantizeLinear", [value, *rounding])
        restored = ir.node("DequantizeLinear", [*quantised.outputs, *rounding])
        restored.outputs[0].type, restored.outputs[0].shape = value.type, value.shape
        return [quantised, restored]

    def _round_weight(self, reader: ir.Node, weight: ir.Value, *, axis: int) -> ir.Value:
        """Return a weight in int8 with one scale for each output unit, the indices of `axis`."""
        assert weight.const_value is not None
        values = weight.const_value.numpy()
        others = tuple(index for index in range(values.ndim) if index != axis)
        largest = np.abs(values).max(axis=others, keepdims=True).clip(min=EPSILON)
        scale = (largest / 127).astype(np.float32)
        rounded = np.rint(values / scale).clip(-127, 127).astype(np.int8)
        parts = {
            "int8": rounded,
            "scale": scale.ravel(),
            "zero": np.zeros(scale.size, dtype=np.int8),
        }
        inputs = [
            _constant(self._graph, f"{weight.name}.{key}", part) for key, part in parts.items()
        ]
        restored = ir.node("DequantizeLinear", inputs, attributes={"axis": axis})
        self._graph.insert_before(reader, restored)
        restored.outputs[0].type, restored.outputs[0].shape = weight.type, weight.shape
        return restored.outputs[0]

    def _zero(self) -> ir.Value:
        """Return the zero point of all activations."""
        return self._graph.initializers.get(ZERO) or _constant(
            self._graph, ZERO, np.array(0, dtype=np.int8)
        )


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Add a constant to a graph and return it."""
    tensor = ir.tensor(array, name=name)
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
    value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def save(model: ir.Model, file: Path) -> None:
    """Write a graph, with its large tensors beside it as `NAME.onnx.data`.

    The metadata of torch.onnx are left out but for SCOPES, because its stack traces hold paths of
    this machine.
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
