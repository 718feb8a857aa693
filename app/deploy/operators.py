"""The operators that an exported graph may hold: those that TensorRT's parser takes.

From onnx/onnx-tensorrt, docs/operators.md: of release 10.0 (opsets 9 to 20), which 10.3 shares, and
10.15 (opsets 9 to 24), which 10.16 shares. An operator that only one of them takes is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import onnx

from app.errors import UserError

OPSET = 18
OPSETS = {"10.3": range(9, 21), "10.16": range(9, 25)}  # version of TensorRT → opsets it takes
# Supported with FP32, FP16 and BF16 alike, or with integers where those are shapes and indices.
ALLOWED = frozenset(
    re.findall(
        r"\w+",
        """
        Abs Add Cast Clip Concat Constant Conv ConvTranspose Cos DequantizeLinear Div Equal Erf
        Exp Expand Flatten Gather GatherElements Gemm Identity InstanceNormalization
        LayerNormalization Log MatMul Max MaxPool Min Mul Neg Not Pad Pow QuantizeLinear ReduceMax
        ReduceMean ReduceSum Relu Reshape Resize Sigmoid Sign Sin Slice Softmax Split Sqrt Squeeze
        Sub Tile TopK Transpose Unsqueeze Where
        """,
    )
)
DATA = {
    getattr(onnx.TensorProto, name)
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "BOOL")
}


def check_operators(file: Path) -> None:
    """Raise UserError where a graph holds anything that TensorRT does not take; name each."""
    model = onnx.load(file, load_external_data=False)
    problems = [f"{file.name}: {problem}" for problem in _problems(model, file.parent)]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


def _problems(model: onnx.ModelProto, folder: Path) -> Iterator[str]:
    """Yield what TensorRT does not take.

    Args:
        folder: of the graph's external data.
    """
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            yield f"operators of the domain '{opset.domain}'"
        elif not all(opset.version in opsets for opsets in OPSETS.values()):
            yield f"opset {opset.version}"
    if model.functions:
        yield f"functions: {', '.join(function.name for function in model.functions)}"
    for node in model.graph.node:
        if node.op_type not in ALLOWED:
            yield f"the operator {node.op_type}"
        if node.op_type == "LayerNormalization" and len(node.output) > 1:
            yield "LayerNormalization with more than its first output"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not _symmetric(
            node, model, folder
        ):
            yield f"{node.op_type} with a zero point that is not 0"
    kinds = {part.data_type for part in model.graph.initializer} - DATA
    yield from (f"a constant of {onnx.TensorProto.DataType.Name(kind)}" for kind in sorted(kinds))


def _symmetric(node: onnx.NodeProto, model: onnx.ModelProto, folder: Path) -> bool:
    """Return whether the zero points of a quantisation are 0, as TensorRT requires."""
    if len(node.input) < 3:
        return True
    points = {part.name: part for part in model.graph.initializer}
    return not onnx.numpy_helper.to_array(points[node.input[2]], str(folder)).any()
