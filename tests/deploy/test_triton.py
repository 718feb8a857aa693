"""A model repository whose configurations Triton's schema takes, and whose graphs run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from app.deploy.export import Wanted
from app.deploy.runtime.manifest import read_manifest
from app.deploy.triton import export, write_repository
from app.errors import UserError
from app.model.bundled import NANO
from app.model.inspection import inspect
from tests.deploy.apart import run_apart
from tests.deploy.page import lines_of, run_documented
from tests.deploy.tiny import SHAPES, expected_score, write_folder
from tests.helpers import Command
from tests.loopback import Quiet, serve

STRING, INT32, INT64, MESSAGE, ENUM = 9, 5, 3, 11, 14
ONE, MANY = 1, 3
# Of model_config.proto (triton-inference-server/common), what is written here: name, number, type.
DATA_TYPES = {
    **{"TYPE_INVALID": 0, "TYPE_BOOL": 1, "TYPE_UINT8": 2, "TYPE_INT32": 8, "TYPE_INT64": 9},
    **{"TYPE_FP16": 10, "TYPE_FP32": 11, "TYPE_BF16": 14},
}
TENSOR = [("name", 1, STRING, ONE, ""), ("data_type", 2, ENUM, ONE, "DataType")]
FIELDS: dict[str, list[tuple[str, int, int, int, str]]] = {
    "ModelInput": [*TENSOR, ("dims", 4, INT64, MANY, "")],
    "ModelOutput": [*TENSOR, ("dims", 3, INT64, MANY, "")],
    "Pair": [("key", 1, STRING, ONE, ""), ("value", 2, STRING, ONE, "")],  # an entry of a map
    "Step": [
        ("model_name", 1, STRING, ONE, ""),
        ("model_version", 2, INT64, ONE, ""),
        ("input_map", 3, MESSAGE, MANY, "Pair"),
        ("output_map", 4, MESSAGE, MANY, "Pair"),
    ],
    "ModelEnsembling": [("step", 1, MESSAGE, MANY, "Step")],
    "ModelConfig": [
        ("name", 1, STRING, ONE, ""),
        ("platform", 2, STRING, ONE, ""),
        ("max_batch_size", 4, INT32, ONE, ""),
        ("input", 5, MESSAGE, MANY, "ModelInput"),
        ("output", 6, MESSAGE, MANY, "ModelOutput"),
        ("ensemble_scheduling", 15, MESSAGE, ONE, "ModelEnsembling"),
    ],
}


def _read(file: Path) -> Any:
    """Return a `config.pbtxt`, parsed by Triton's schema: an unknown field or type is an error."""
    schema = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="t", syntax="proto3")
    kinds = schema.enum_type.add(name="DataType")
    for name, number in DATA_TYPES.items():
        kinds.value.add(name=name, number=number)
    for message, fields in FIELDS.items():
        made = schema.message_type.add(name=message)
        for name, number, kind, label, of in fields:
            field = made.field.add(name=name, number=number, type=kind, label=label)
            if of:
                field.type_name = f".t.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(schema)
    cls = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))
    return text_format.Parse(file.read_text(), cls())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triton")
    exported = write_folder(root / "onnx")
    write_repository(exported, read_manifest(exported), "fp32", root / "models")
    return root / "models"


def test_every_configuration_is_of_tritons_schema(repository: Path) -> None:
    models = sorted(path.name for path in repository.iterdir() if path.is_dir())
    assert models == ["sam3", "sam3_ground", "sam3_image"]
    for name in models:
        config = _read(repository / name / "config.pbtxt")
        assert (config.name, config.max_batch_size) == (name, 0)
        assert (repository / name / "1").is_dir()
        assert config.platform == ("ensemble" if name == "sam3" else "onnxruntime_onnx")
    image = _read(repository / "sam3_image" / "config.pbtxt")
    assert [(one.name, list(one.dims)) for one in image.input] == [
        ("pixels", SHAPES["image"]["pixels"])
    ]
    assert {one.name: list(one.dims) for one in image.output} == {
        name: shape for name, shape in SHAPES["image"].items() if name != "pixels"
    }
    ground = _read(repository / "sam3_ground" / "config.pbtxt")
    assert {one.name: one.data_type for one in ground.input}["text_mask"] == DATA_TYPES["TYPE_BOOL"]


def test_the_ensemble_is_the_two_graphs_in_one(repository: Path) -> None:
    """Run as its steps say, by ONNX Runtime, it answers from pixels and text alone."""
    config = _read(repository / "sam3" / "config.pbtxt")
    assert [one.name for one in config.input] == ["pixels", "text", "text_mask"]
    text = np.load(repository / "text.npz")
    tensors: dict[str, Any] = {
        "pixels": np.ones(list(config.input[0].dims), np.float32),
        "text": text["features"][:2],
        "text_mask": text["mask"][:2],
    }
    found = _served(repository, tensors)
    for one in config.output:
        assert list(found[one.name].shape) == list(one.dims)
    # the scores of "red" and "green" on white, which numpy knows as well
    assert np.allclose(found["scores"][:, 0], 0.5, atol=1e-6)


def _served(repository: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what the ensemble answers, its steps run one after the other."""
    config, tensors = _read(repository / "sam3" / "config.pbtxt"), dict(inputs)
    for step in config.ensemble_scheduling.step:
        session = onnxruntime.InferenceSession(repository / step.model_name / "1" / "model.onnx")
        given = {pair.key: tensors[pair.value] for pair in step.input_map}
        names = [pair.key for pair in step.output_map]
        found = dict(zip(names, session.run(names, given), strict=True))
        tensors |= {pair.value: found[pair.key] for pair in step.output_map}
    return {one.name: tensors[one.name] for one in config.output}


@pytest.fixture
def server(repository: Path) -> Iterator[str]:
    """A stand-in for Triton: what its protocol sends to `sam3` is run, and answered in JSON."""
    kinds = {"FP32": np.float32, "BOOL": np.bool_}

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            start = int(self.headers["Inference-Header-Content-Length"])
            tensors = {}
            for one in json.loads(body[:start])["inputs"]:
                end = start + one["parameters"]["binary_data_size"]
                flat = np.frombuffer(body[start:end], kinds[one["datatype"]])
                tensors[one["name"]], start = flat.reshape(one["shape"]), end
            is_asked = self.path == "/v2/models/sam3/infer"
            outputs = [
                {"name": k, "datatype": "FP32", "shape": v.shape, "data": v.flatten().tolist()}
                for k, v in (_served(repository, tensors) if is_asked else {}).items()
            ]
            answer = json.dumps({"model_name": "sam3", "outputs": outputs}).encode()
            self.send_response(200 if is_asked else 404)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    with serve(Handler) as address:
        yield address.removeprefix("http://")


@pytest.mark.system
def test_tritons_client_asks_and_reads(repository: Path, server: str, tmp_path: Path) -> None:
    """By the lines of docs/elsewhere.md: a green image, of whose prompts "red" is none."""
    pixels = (
        "import numpy as np\npixels = np.full([1, 3, 8, 8], -1, np.float32)\npixels[:, 1] = 1\n"
    )
    lines = lines_of("tritonclient", triton=repository).replace("localhost:8000", server)
    told = "\nprint(scores[:, 0].tolist(), boxes.shape)"
    answer = run_apart("triton", tmp_path, "-c", pixels + lines + told)
    expected = [expected_score(np.array([0, 255, 0]), name) for name in ("red", "green")]
    scores, shape = json.loads(answer.partition("]")[0] + "]"), answer.partition("]")[2].strip()
    assert np.allclose(scores, expected, atol=1e-5)
    assert shape == str(tuple(SHAPES["ground"]["boxes"]))


@pytest.mark.slow
def test_weights_leave_as_a_repository(
    tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the command of docs/elsewhere.md."""
    words = ["export", NANO, "--format", "triton", "--output", tmp_path / "models"]
    spared = ("--prompt", "circle", "--measure-on", 1)
    run_documented("export last --format triton", NANO, tmp_path / "models", *spared)
    assert "tritonserver --model-repository" in capfd.readouterr().out
    record = json.loads((tmp_path / "models" / "export.json").read_text())
    assert (record["size"], record["classes"]) == ("nano", ["circle"])
    config = _read(tmp_path / "models" / "sam3" / "config.pbtxt")
    assert list(config.input[0].dims) == [1, 3, 128, 128]
    done = command(*words)
    assert done.code == 2
    assert "holds an exported model" in done.err
    report = inspect(tmp_path / "models")
    assert report.kind == "a model repository of Triton's, exported from here"
    assert (report.facts["size"], report.facts["classes"]) == ("nano, 128 px", "circle")
    assert (report.loads, report.notes) == (["tritonserver"], [])
    graph = tmp_path / "models" / "sam3_ground" / "1" / "model.onnx"
    graph.unlink()
    assert inspect(tmp_path / "models").notes == [f"{graph}: is not there"]


def test_a_model_has_one_precision(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model of Triton's has one; export twice"):
        export(NANO, tmp_path / "other", Wanted(("fp32", "fp16")), overwrite=False)
    assert not (tmp_path / "other").exists()
