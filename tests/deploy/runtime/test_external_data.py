"""Where an ONNX file keeps its weights, told without the onnx package that wrote it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.deploy.runtime.external_data import locations
from app.errors import UserError
from tests.deploy.tiny import ground_graph


def _outside(name: str, place: str) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.ones(4, dtype=np.float32), name)
    onnx.external_data_helper.set_external_data(tensor, location=place, offset=0, length=16)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def test_a_graph_that_holds_all_its_weights(tmp_path: Path) -> None:
    onnx.save(ground_graph(), tmp_path / "model.onnx")
    assert locations(tmp_path / "model.onnx") == set()


def test_weights_beside_the_graph(tmp_path: Path) -> None:
    onnx.save(
        ground_graph(),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="weights.data",
        size_threshold=0,
    )
    assert locations(tmp_path / "model.onnx") == {"weights.data"}


def test_weights_wherever_a_tensor_can_be(tmp_path: Path) -> None:
    """In initializers, in constants, and in the branches of a condition."""
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["x"], value=_outside("inner", "../inner"))],
        "branch",
        [],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [_outside("other", "/other")],
    )
    nodes = [helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)]
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph(nodes, "outer", [condition], [y], [_outside("weights", "a.data")])
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert locations(tmp_path / "model.onnx") == {"a.data", "../inner", "/other"}


@pytest.mark.parametrize("length", [0, 1, 40, 200])
def test_a_file_that_is_cut_short(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.onnx").write_bytes(ground_graph().SerializeToString()[:length])
    with pytest.raises(UserError, match=r"model\.onnx: is no ONNX file, or is cut short"):
        locations(tmp_path / "model.onnx")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        locations(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="is no ONNX file"):
        locations(tmp_path / "model.onnx")
