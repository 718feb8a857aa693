"""Graphs: the same answers as the predictor's, operators that TensorRT takes, all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from pycocotools import mask as mask_utils

from app.compression.cut import store_vocabulary
from app.datasets.images import open_image
from app.deploy import export as module
from app.deploy.export import export, keep_precisions
from app.deploy.graphs import FEATURES
from app.deploy.operators import ALLOWED, check_operators
from app.deploy.parity import compare, graph_outputs, measure, model_outputs
from app.deploy.runtime import cli as run
from app.deploy.runtime.manifest import FILE, read_manifest
from app.deploy.runtime.onnx_backend import DISABLED_OPTIMIZERS
from app.deploy.runtime.runtime import Runtime
from app.deploy.wanted import Wanted
from app.errors import UserError
from app.files import write_json
from app.inference.predictor import Predictor
from app.model import weights
from app.model.bundled import NANO
from tests.helpers import REPOSITORY, Command, finish, once

PROMPTS = ("circle", "rectangle", "triangle")
SCENE = REPOSITORY / "examples" / "scene.png"


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """torch.onnx notes each of its steps for whoever listens; pytest does, and it takes minutes."""
    trace = logging.getLogger("torch.__trace")
    trace.propagate = False
    yield
    trace.propagate = True


def _words(precisions: str, shapes: Path) -> tuple[object, ...]:
    return (
        *("export", NANO, "--tensorrt", "10.3", "--target", "orin-nano"),
        *("--precision", precisions, "--images", shapes / "train" / "images"),
        *(word for prompt in PROMPTS for word in ("--prompt", prompt)),
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """nano for three prompts, in fp32 and int8, by the command."""
    words = _words("int8", shapes)
    return once(tmp_path_factory, "exported", lambda folder: finish(*words, "--output", folder))


@pytest.fixture(scope="module")
def every_precision(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The same in every precision, each with its figures on a dataset."""
    words = (*_words("fp16,bf16,int8", shapes), "--dataset-dir", shapes)
    return once(tmp_path_factory, "exported-all", lambda folder: finish(*words, "--output", folder))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load(NANO, device="cpu", precision="fp32")


def test_twenty_photographs_are_answered_as_the_predictor_does(
    exported: Path, predictor: Predictor, potholes: Path
) -> None:
    runtime = Runtime.load(exported, backend="onnxruntime", precision="fp32")
    files = sorted(potholes.rglob("*.jpg"))[:20]
    assert len(files) == 20
    for file in files:
        image = open_image(file)
        truth = model_outputs(predictor, image, PROMPTS)
        found = graph_outputs(runtime, image, PROMPTS)
        for name in ("scores", "boxes"):
            np.testing.assert_allclose(found[name], truth[name], atol=1e-4)
        np.testing.assert_allclose(found["masks"], truth["masks"], atol=1e-3)  # logits, to ±20
        for name in (*FEATURES, "presence"):
            np.testing.assert_allclose(found[name], truth[name], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [336, 672, 1008])
def test_each_resolution(tmp_path: Path, command: Command, resolution: int) -> None:
    """Of a photograph's size; compared with the predictor by the export itself, and here."""
    out = tmp_path / "out"
    words = ("--resolution", resolution, "--images", SCENE, "--prompt", "circle")
    done = command("export", NANO, "--output", out, *words)
    assert done.code == 0, done.err
    manifest = read_manifest(out)
    assert manifest.resolution == resolution
    assert manifest.shapes["image"]["pixels"] == [1, 3, resolution, resolution]
    assert manifest.parity["fp32"]["scores"] < 1e-4
    predictor = Predictor.load(NANO, device="cpu", precision="fp32", resolution=resolution)
    one = predictor.predict(open_image(SCENE), ["circle"], threshold=0.1)
    other = Runtime.load(out, backend="onnxruntime").predict(
        open_image(SCENE), ["circle"], threshold=0.1
    )
    np.testing.assert_allclose(other.scores, one.scores, atol=1e-4)
    np.testing.assert_allclose(other.boxes_xyxy, one.boxes_xyxy, atol=0.1)  # pixels


def test_commands_find_the_same(exported: Path, tmp_path: Path, command: Command) -> None:
    """`app infer` by torch and `app.deploy.runtime` by ONNX Runtime, to the files they write."""
    words = ["--input", str(SCENE), "--save", "coco,yolo", "--threshold", "0.3"]
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    mine, theirs = tmp_path / "deployed", tmp_path / "inferred"
    precise = ["--precision", "fp32"]
    done = command("infer", "--checkpoint", NANO, *words, *asked, *precise, "--output-dir", theirs)
    assert done.code == 0, done.err
    options = run.make_parser().parse_args([str(exported), *words, *precise, "--output", str(mine)])
    assert run.run(options) == 0
    files = {path.relative_to(theirs) for path in theirs.rglob("*.txt")}
    assert files == {path.relative_to(mine) for path in mine.rglob("*.txt")}
    found, expected = (
        json.loads((folder / "predictions.json").read_text()) for folder in (mine, theirs)
    )
    assert len(found) == len(expected) > 2
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert (one["file_name"], one["prompt"]) == (other["file_name"], other["prompt"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.1)
        overlap = mask_utils.iou([one["segmentation"]], [other["segmentation"]], [0])
        assert overlap[0][0] > 0.999


def test_each_output_counts(predictor: Predictor) -> None:
    truth = model_outputs(predictor, open_image(SCENE), PROMPTS)
    same = compare(truth, truth)
    assert (same.scores, same.boxes, same.mask_iou) == (0, 0, 1)
    assert same.cosine == pytest.approx(1)
    for name in FEATURES:
        assert compare(truth, {**truth, name: -truth[name]}).cosine == pytest.approx(-1)
    for name in ("scores", "presence"):
        moved = compare(truth, {**truth, name: truth[name] + np.float32(0.25)})
        assert moved.scores == pytest.approx(0.25, abs=1e-6)
    moved = compare(truth, {**truth, "boxes": truth["boxes"] - np.float32(0.5)})
    assert moved.boxes == pytest.approx(0.5)
    assert compare(truth, {**truth, "masks": -truth["masks"]}).mask_iou < 0.1


@pytest.mark.slow
def test_every_precision_says_how_near_it_is(every_precision: Path, predictor: Predictor) -> None:
    manifest = read_manifest(every_precision)
    assert list(manifest.parity) == ["fp32", "bf16", "fp16", "int8"]
    cosines = {name: row["cosine"] for name, row in manifest.parity.items()}
    assert cosines["fp32"] > cosines["fp16"] > cosines["bf16"] > 0.999
    assert 0.99 < cosines["int8"] < cosines["fp16"]
    for row in manifest.parity.values():
        assert row["images"] == 4
        assert row["objects"] > 0
        assert row["mask_iou"] > 0.97
        assert row["segm/AP"] > 0.9 * row["model/segm/AP"] > 0
    row = manifest.parity["fp32"]
    assert row["segm/AP"] == pytest.approx(row["model/segm/AP"], abs=1e-6)
    # the figures are those of the graphs that are there: int8 runs on a CPU as it stands
    image = open_image(SCENE)
    runtime = Runtime.load(every_precision, backend="onnxruntime", precision="int8")
    truth = model_outputs(predictor, image, PROMPTS)
    difference = compare(truth, graph_outputs(runtime, image, PROMPTS), above=0.4)
    assert 0.99 < difference.cosine < 0.99999


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_halves_are_written_into_the_graph(every_precision: Path, precision: str) -> None:
    exported = every_precision
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    narrowed = 0
    for name in ("image", "ground"):
        file = exported / f"{name}.{precision}.onnx"
        onnx.checker.check_model(str(file), full_check=True)  # types agree on every edge
        graph = onnx.load(file).graph
        ends = [*graph.input, *graph.output]
        assert {end.type.tensor_type.elem_type for end in ends} <= {
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.BOOL,
        }
        weights_of = {part.name: part for part in graph.initializer}
        large = [p for p in weights_of.values() if np.prod(p.dims) > 4096 and len(p.dims) == 2]
        assert large
        products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
        for node in products:
            for given in node.input:
                if given in weights_of:
                    assert weights_of[given].data_type == kind, node.name
                    narrowed += 1
    assert narrowed > 40
    whole = (exported / "image.onnx.data").stat().st_size
    assert (exported / f"image.{precision}.onnx.data").stat().st_size < 0.85 * whole


def test_a_half_cast_back_is_the_product_of_rounded_numbers(tmp_path: Path) -> None:
    """What the parity of a half is measured with: no CPU kernel has it, numpy has the rounding."""
    from app.deploy.precision import narrow

    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 2])
    numbers = np.random.default_rng(0)
    weight = numbers.normal(size=(3, 2)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [x],
        [y],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    file = tmp_path / "product.onnx"
    onnx.save(model, file)
    given = numbers.normal(size=(2, 3)).astype(np.float32)
    for precision, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        rough = tmp_path / "rough.onnx"
        narrow(file, rough, precision, emulated=True)
        (found,) = onnxruntime.InferenceSession(str(rough)).run(None, {"x": given})
        one, other = (torch.from_numpy(part).to(kind).float() for part in (given, weight))
        np.testing.assert_array_equal(found, (one @ other).to(kind).float().numpy())
        assert np.abs(found - given @ weight).max() > 1e-5


BLOCKS = 4  # of nano's trunk, each with fc1, fc2, qkv and proj
LAYERS = 2  # of DETR's encoder, each with linear1 and linear2
NECK, MASKS = 6, 3  # convolutions; in the neck each size has a 1x1, and a 3x3 that reads it


def test_products_and_convolutions_are_quantised_as_tensorrt_takes_them(exported: Path) -> None:
    """Rounded is what goes into each product, and what goes into and out of each convolution."""
    trunk = [(128, 512), (512, 128), (128, 384), (128, 128)] * BLOCKS
    doubling = [(128, 4 * 64), (64, 4 * 32), (128, 4 * 64)]  # two to the finest level
    encoder = [(64, 256), (256, 64)] * LAYERS
    kernels = [(64, 32, 1, 1), (64, 64, 1, 1), (64, 128, 1, 1), *[(64, 64, 3, 3)] * 3]
    for name, shapes, rounded in (
        ("image", [*trunk, *doubling, *kernels], len(trunk) + len(doubling) + 3 * 3),
        (
            "ground",
            [*encoder, (64, 64, 1, 1), *[(64, 64, 3, 3)] * 2],
            len(encoder) + 2 * MASKS,
        ),
    ):
        graph = onnx.load(exported / f"{name}.int8.onnx").graph
        kinds = [node.op_type for node in graph.node]
        assert kinds.count("QuantizeLinear") == rounded
        assert kinds.count("DequantizeLinear") == rounded + len(shapes)
        int8 = [tuple(p.dims) for p in graph.initializer if p.data_type == onnx.TensorProto.INT8]
        assert sorted(dims for dims in int8 if len(dims) > 1) == sorted(shapes)


def test_onnx_runtime_multiplies_int8_as_int8(exported: Path, tmp_path: Path) -> None:
    """It did so in float32, and slower than without int8, where it joins biases first."""
    kinds = []
    for name in ("image", "ground"):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(
            str(exported / f"{name}.int8.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=DISABLED_OPTIMIZERS,
        )
        graph = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph
        kinds += [node.op_type for node in graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 4 * BLOCKS + 3 + 2 * LAYERS
    assert kinds.count("QLinearConv") == NECK + MASKS


@pytest.mark.parametrize(
    ("folder", "graphs"),
    [("exported", 4), pytest.param("every_precision", 8, marks=pytest.mark.slow)],
)
def test_every_graph_keeps_to_the_operators_of_tensorrt(
    folder: str, graphs: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    files = sorted(request.getfixturevalue(folder).glob("*.onnx"))
    assert len(files) == graphs
    for file in files:
        check_operators(file)
        found = onnx.load(file, load_external_data=False)
        assert {node.op_type for node in found.graph.node} <= ALLOWED
        assert not found.functions
        assert [(o.domain, o.version) for o in found.opset_import] == [("", 18)]
        assert b"site-packages" not in file.read_bytes()  # nothing of this machine
    node = found.graph.node.add()
    node.op_type, node.name = "NonZero", "bad"
    onnx.save(found, tmp_path / "bad.onnx")
    with pytest.raises(UserError, match="the operator NonZero"):
        check_operators(tmp_path / "bad.onnx")


def test_the_manifest_describes_what_is_there(exported: Path) -> None:
    manifest = read_manifest(exported)
    there = {file.name for file in exported.iterdir()}
    assert there == {FILE, *manifest.files}
    assert manifest.shapes["image"] == {
        "pixels": [1, 3, 128, 128],
        "fpn0": [1, 64, 64, 64],
        "fpn1": [1, 64, 32, 32],
        "fpn2": [1, 64, 16, 16],
        "position": [1, 64, 16, 16],
    }
    ground = manifest.shapes["ground"]
    assert ground["text"] == [3, 32, 64]
    assert ground["scores"] == [3, 16]
    assert ground["masks"] == [3, 16, 64, 64]
    assert manifest.prompts == manifest.classes == PROMPTS
    assert manifest.target == {"tensorrt": "10.3", "target": "orin-nano"}
    file = NANO / "model.safetensors"
    assert manifest.source["weights"] == file.name
    assert manifest.source["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest.source["pin"].startswith("84cc43b")
    header = weights.describe(NANO)
    assert manifest.threshold == header.threshold
    text = np.load(exported / "text.npz")
    assert text["features"].shape == (3, 32, 64)
    golden = np.load(exported / "golden.npz")
    assert golden["pixels"].shape == (3, 128, 128)
    assert golden["scores"].size == 48


@pytest.mark.slow
def test_any_words_and_masks_of_the_best_queries_alone(
    predictor: Predictor, tmp_path: Path
) -> None:
    export(NANO, tmp_path / "open", Wanted(prompts=None, top=4))
    runtime = Runtime.load(tmp_path / "open", backend="onnxruntime")
    image = open_image(SCENE)
    for word in ("a big green circle", "Red  THING &amp; blue", "kreis über straße"):
        one = runtime.predict(image, [word], threshold=0.0)
        other = predictor.predict(image, [word], threshold=0.0, max_detections=4)
        assert len(one) == len(other) == 4
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=0.05)  # pixels
    found = graph_outputs(runtime, image, ["circle"])
    truth = model_outputs(predictor, image, ["circle"])
    assert found["masks"].shape == (1, 4, 64, 64)
    best = np.argsort(-truth["scores"][0])[:4]
    np.testing.assert_allclose(found["scores"][0], truth["scores"][0, best], atol=1e-5)
    np.testing.assert_allclose(found["masks"][0], truth["masks"][0, best], atol=1e-3)
    difference = compare(truth, found, top=4)
    assert difference.objects == 4
    assert difference.scores < 1e-5


@pytest.mark.slow
def test_stored_words_and_boxes_alone_are_exported(tmp_path: Path) -> None:
    model, header = weights.load(NANO)
    model, size = store_vocabulary(model, header.model, PROMPTS)
    model.segmentation_head = None
    size = size.model_copy(update={"segmentation": False})
    header = header.model_copy(update={"model": size, "prompts": list(PROMPTS)})
    weights.save(model, tmp_path / "stored", header)
    manifest = export(tmp_path / "stored", tmp_path / "out")
    assert manifest.prompts == PROMPTS
    assert not manifest.masks
    found = Runtime.load(tmp_path / "out", backend="onnxruntime").predict(open_image(SCENE))
    assert found.masks is None
    assert len(found)
    with pytest.raises(UserError, match="'dog': is not in the vocabulary"):
        export(tmp_path / "stored", tmp_path / "other", Wanted(prompts=("dog",)))


@pytest.mark.slow
def test_a_graph_beyond_its_tolerance_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = dataclasses.replace(module.TOLERANCES["bf16"], scores=1e-9)
    monkeypatch.setitem(module.TOLERANCES, "bf16", strict)
    with pytest.raises(UserError, match=r"bf16: scores .* \(at most 1e-09\)") as caught:
        export(NANO, tmp_path / "out", Wanted(("bf16",), ("zebra",)))
    assert "The model finds nothing on these" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_passes_is_kept_where_another_precision_misses(
    exported: Path, predictor: Predictor, tmp_path: Path, monkeypatch, caplog
) -> None:
    """By `measure` and what it leaves, on graphs that are there already."""
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    manifest = read_manifest(folder)
    strict = dataclasses.replace(manifest.tolerances["int8"], mask_iou=1.1)
    manifest = dataclasses.replace(manifest, tolerances={**manifest.tolerances, "int8": strict})
    pictures = [open_image(SCENE)]
    with pytest.raises(UserError, match=r"int8: mask_iou .* \(at least 1.1\)"):
        measure(predictor, folder, manifest, ["int8"], pictures, None, 100)
    parity = measure(predictor, folder, manifest, ["fp32", "int8"], pictures, None, 100)
    assert list(parity) == ["fp32"]
    assert "left out, because it is too far from the model: int8" in caplog.messages
    assert any("For int8: calibrate on more of your images" in m for m in caplog.messages)
    kept = keep_precisions(manifest, list(parity), folder)
    write_json(folder / FILE, kept.to_json())
    assert {file.name for file in folder.iterdir()} == {FILE, *kept.files}
    assert not list(folder.glob("*int8*"))
    assert Runtime.load(folder, backend="onnxruntime").backend.precision == "fp32"


def test_what_cannot_be_exported_is_said_at_once(command, tmp_path: Path) -> None:
    bare, header = weights.load(NANO)
    weights.save(bare, tmp_path / "bare", header.model_copy(update={"prompts": []}))
    out = tmp_path / "out"
    done = command(
        *("export", tmp_path / "bare", "--output", out, "--precision", "int9,int8"),
        *("--tensorrt", "8.6", "--top", "0"),
    )
    assert done.code == 2
    for said in (
        "--precision int9: give some of fp32, bf16, fp16, int8. Did you mean",
        "--precision int8: is calibrated on your images: give --images",
        "--tensorrt 8.6: graphs are made for 10.3 and 10.16",
        "--top 0: must be 1 or more",
        "Which prompts are to be answered?",
    ):
        assert said in done.err
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    done = command("export", NANO, "--output", out)
    assert done.code == 2
    assert "holds something other than an exported model" in done.err
    done = command("export", NANO, "--format", "onxx", "--output", out)
    assert "--format onxx: there is onnx, triton, hf, sam3. Did you mean 'onnx'" in done.err
    done = command("export", NANO, "--format", "hf", "--top", "3", "--output", tmp_path / "hf")
    assert "--top: nothing reads it beside --format hf" in done.err
