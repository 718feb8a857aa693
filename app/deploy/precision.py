"""A graph in float32 → the same in float16, bfloat16 or int8, its types written into it.

Only what costs time is narrowed: matrix products and convolutions, with their weights. What lies
between them stays in float32, so that no sum, norm or softmax leaves the range of a half.
"""

from __future__ import annotations

import logging
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
    half = TYPES[precision]
    rounded: dict[tuple[ir.Value, bool], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type not in NARROWED[precision]:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT:
                continue
            if value.const_value is not None:
                narrowed = _constant(model.graph, value, half, emulated, rounded)
            else:
                narrowed = _cast_before(model.graph, node, value, half, emulated, rounded)
            node.replace_input_with(index, narrowed)
        _cast_after(model.graph, node, half, emulated)
    _drop_unused(model.graph)
    save(model, file)


def _constant(
    graph: ir.Graph,
    value: ir.Value,
    half: ir.DataType,
    emulated: bool,
    rounded: dict[tuple[ir.Value, bool], ir.Value],
) -> ir.Value:
    """A weight in half precision; made once for all that read it."""
    key = (value, emulated)
    if key not in rounded:
        assert value.const_value is not None
        array = value.const_value.numpy().astype(half.numpy())
        if emulated:
            array = array.astype(np.float32)
        name = f"{value.name}.{'rounded' if emulated else 'half'}"
        tensor = ir.Tensor(array, dtype=ir.DataType.FLOAT if emulated else half, name=name)
        new = ir.Value(
            name=name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(new)
        rounded[key] = new
    return rounded[key]


def _cast_before(
    graph: ir.Graph,
    node: ir.Node,
    value: ir.Value,
    half: ir.DataType,
    emulated: bool,
    rounded: dict[tuple[ir.Value, bool], ir.Value],
) -> ir.Value:
    """The value in half precision; cast once, where it is first read."""
    key = (value, emulated)
    if key not in rounded:
        last = value
        for kind in (half, ir.DataType.FLOAT) if emulated else (half,):
            cast = _cast(last, kind)
            graph.insert_before(node, cast)
            last = cast.outputs[0]
        rounded[key] = last
    return rounded[key]


def _cast_after(graph: ir.Graph, node: ir.Node, half: ir.DataType, emulated: bool) -> None:
    result = node.outputs[0]
    users = list(result.uses())
    is_output = result in graph.outputs
    last = result
    after = node
    for kind in (half, ir.DataType.FLOAT) if emulated else (ir.DataType.FLOAT,):
        cast = _cast(last, kind)
        graph.insert_after(after, cast)
        last, after = cast.outputs[0], cast
    if not emulated:
        result.dtype = half
    for user, index in users:
        user.replace_input_with(index, last)
    if is_output:
        name = result.name
        result.name = f"{name}.half"
        last.name = name
        for index, output in enumerate(graph.outputs):
            if output is result:
                graph.outputs[index] = last


def _cast(value: ir.Value, kind: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": kind})
    node.outputs[0].dtype = kind
    node.outputs[0].shape = value.shape
    return node


def _drop_unused(graph: ir.Graph) -> None:
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def quantise(source: Path, file: Path, images: Iterable[NDArray[np.float32]]) -> None:
    """Write the image graph with its trunk's MLPs in int8, by explicit Q/DQ pairs.

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
        if node.op_type == "MatMul" and ".mlp.fc" in node.metadata_props.get(SCOPES, "")
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
