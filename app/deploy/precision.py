"""A graph in float32 → the same in float16, bfloat16 or int8, its types written into it.

Only what costs time is narrowed: matrix products and convolutions, with their weights. What lies
between them stays in float32, so that no sum, norm or softmax leaves the range of a half.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

PRODUCTS = ("MatMul", "Gemm")
NARROWED = {  # ONNX knows no convolutions in bfloat16 before opset 22, which TensorRT 10.3 lacks
    "fp16": (*PRODUCTS, "Conv", "ConvTranspose"),
    "bf16": PRODUCTS,
}
TRUNK = re.compile(r"\.mlp\.fc\d|\.attn\.(qkv|proj)\b")  # the products of a block with weights
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch.onnx notes which module a node comes from
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
        kind = ir.DataType.FLOAT if self._emulated else self._half
        name = f"{value.name}.half"
        tensor = ir.Tensor(array, dtype=kind, name=name)
        new = ir.Value(name=name, shape=value.shape, type=ir.TensorType(kind), const_value=tensor)
        self._graph.register_initializer(new)
        return new

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
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def quantise(source: Path, file: Path, images: Iterable[NDArray[np.float32]]) -> None:
    """Write the image graph with its trunk's MLPs and projections in int8, by explicit Q/DQ pairs.

    Weights are symmetric, one scale for each unit; activations symmetric, one scale for each
    product, so wide that what the images showed is not cut: as TensorRT takes them.

    Args:
        images: `pixels` of the user's own images, (1, 3, R, R).
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[NDArray[np.float32]] = iter(images)

        def get_next(self) -> Mapping[str, NDArray[np.float32]] | None:
            pixels = next(self.left, None)
            return None if pixels is None else {"pixels": pixels}

    model = ir.load(source)
    products = [
        node.name
        for node in model.graph
        if node.op_type == "MatMul" and TRUNK.search(node.metadata_props.get(SCOPES, ""))
    ]
    logging.getLogger().addFilter(_no_preprocessing_advice)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            written = Path(folder) / "int8.onnx"
            quantize_static(
                source,
                written,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=products,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],
                },
            )
            save(ir.load(written), file)
    finally:
        logging.getLogger().removeFilter(_no_preprocessing_advice)


def _no_preprocessing_advice(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()


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
