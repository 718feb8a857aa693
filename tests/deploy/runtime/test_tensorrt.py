"""The TensorRT backend on a stand-in for TensorRT and CUDA: see `tensorrt_stand_in.py`.

The graphs are tiny and made here; what the backend answers is compared with numpy's own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.deploy.runtime.cuda import available_memory
from app.deploy.runtime.engines import source_hash, workspace_limit
from app.deploy.runtime.golden import sample
from app.deploy.runtime.manifest import FILE, Manifest, Tolerance, read_manifest
from app.deploy.runtime.square import to_pixels
from app.deploy.runtime.tensorrt import TensorRTBackend, ladder
from app.errors import UserError
from app.files import hash_file, write_json
from tests.deploy.runtime.tensorrt_stand_in import Error, StandIn

R, D, T, K, L, Q = 8, 4, 1, 2, 3, 5  # resolution, width, features a side, prompts, tokens, queries
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
SHAPES = {
    "image": {
        "pixels": [1, 3, R, R],
        "fpn0": [1, D, 4 * T, 4 * T],
        "fpn1": [1, D, 2 * T, 2 * T],
        "fpn2": [1, D, T, T],
        "position": [1, D, T, T],
    },
    "ground": {
        **{"fpn0": [1, D, 4 * T, 4 * T], "fpn1": [1, D, 2 * T, 2 * T], "fpn2": [1, D, T, T]},
        **{"position": [1, D, T, T], "text": [K, L, D], "text_mask": [K, L]},
        **{"scores": [K, Q], "presence": [K], "boxes": [K, Q, 4], "masks": [K, Q, 4 * T, 4 * T]},
    },
    "text": {"tokens": [1, L], "text": [1, L, D], "text_mask": [1, L]},
}
TOLERANCES = {
    precision: Tolerance(cosine=0.99, scores=0.02, boxes=0.02, mask_iou=0.9)
    for precision in ("fp32", "bf16", "fp16", "int8")
}
rng = np.random.default_rng(5)
MIX = rng.standard_normal((D, 3)).astype(np.float32)
QUERIES = rng.standard_normal((D, Q)).astype(np.float32)
CORNERS = rng.standard_normal((D, 4)).astype(np.float32)
POSITION = rng.standard_normal((1, D, T, T)).astype(np.float32)
WORDS = rng.standard_normal((9, D)).astype(np.float32)
PIXELS = rng.integers(0, 256, (3, R, R), dtype=np.uint8)
TEXT = rng.standard_normal((K, L, D)).astype(np.float32)
MASK = np.array([[False, False, True], [False, True, True]])


# --- graphs, and the same in numpy ---------------------------------------------------------------


def save(
    graph: str, nodes: list[Any], inputs: Mapping[str, int], outputs: Mapping[str, int], file: Path,
    weights: Mapping[str, Any], *, data: str | None = None,
) -> None:  # fmt: skip
    def values(of: Mapping[str, int]) -> list[Any]:
        return [helper.make_tensor_value_info(n, t, SHAPES[graph][n]) for n, t in of.items()]

    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    made = helper.make_graph(nodes, graph, values(inputs), values(outputs), initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save_model(
        model, file, save_as_external_data=data is not None, location=data, size_threshold=0
    )


def save_image(file: Path, mix: np.ndarray = MIX, data: str | None = None) -> None:
    node = helper.make_node
    nodes = [
        node("AveragePool", ["pixels"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["small", "mix"], ["fpn0"]),
        node("AveragePool", ["fpn0"], ["fpn1"], kernel_shape=[2, 2], strides=[2, 2]),
        node("AveragePool", ["fpn1"], ["fpn2"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Identity", ["where"], ["position"]),
    ]
    outputs = dict.fromkeys(("fpn0", "fpn1", "fpn2", "position"), FLOAT)
    weights = {"mix": mix[:, :, None, None], "where": POSITION}
    save("image", nodes, {"pixels": FLOAT}, outputs, file, weights, data=data)


def numpy_image(pixels: np.ndarray, mix: np.ndarray = MIX) -> dict[str, np.ndarray]:
    def halve(x: np.ndarray) -> np.ndarray:
        _, c, h, w = x.shape
        return x.reshape(1, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))

    fpn0 = np.einsum("dc,bchw->bdhw", mix, halve(pixels))
    fpn1 = halve(fpn0)
    return {"fpn0": fpn0, "fpn1": fpn1, "fpn2": halve(fpn1), "position": POSITION}


def save_ground(file: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Not", ["text_mask"], ["there"]),
        node("Cast", ["there"], ["weight"], to=FLOAT),
        node("Unsqueeze", ["weight", "last"], ["weights"]),
        node("Mul", ["text", "weights"], ["words"]),
        node("ReduceMean", ["words"], ["prompt"], axes=[1], keepdims=0),  # (K, D)
        node("Add", ["fpn2", "position"], ["seen"]),
        node("ReduceMean", ["seen"], ["mean"], axes=[2, 3], keepdims=0),  # (1, D)
        node("Mul", ["prompt", "mean"], ["both"]),
        node("MatMul", ["both", "queries"], ["logits"]),
        node("Sigmoid", ["logits"], ["scores"]),
        node("ReduceMax", ["scores"], ["presence"], axes=[1], keepdims=0),
        node("Unsqueeze", ["scores", "last"], ["score"]),
        node("MatMul", ["both", "corners"], ["corner"]),
        node("Unsqueeze", ["corner", "first"], ["each"]),  # (K, 1, 4)
        node("Mul", ["score", "each"], ["raw"]),
        node("Sigmoid", ["raw"], ["boxes"]),
        node("ReduceSum", ["fpn0", "first"], ["map"], keepdims=0),  # (1, 4t, 4t)
        node("Unsqueeze", ["score", "last"], ["pixel"]),
        node("Mul", ["pixel", "map"], ["masks"]),
    ]
    text = {"text": FLOAT, "text_mask": BOOL}
    inputs = {**dict.fromkeys(("fpn0", "fpn1", "fpn2", "position"), FLOAT), **text}
    outputs = dict.fromkeys(("scores", "presence", "boxes", "masks"), FLOAT)
    weights = {
        "queries": QUERIES,
        "corners": CORNERS,
        "last": np.array([-1]),
        "first": np.array([1]),
    }
    save("ground", nodes, inputs, outputs, file, weights)


def numpy_ground(
    features: Mapping[str, np.ndarray], text: np.ndarray = TEXT, mask: np.ndarray = MASK
) -> dict[str, np.ndarray]:
    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    seen = (features["fpn2"] + features["position"]).mean(axis=(2, 3))
    both = (text * ~mask[..., None]).mean(axis=1) * seen
    scores = sigmoid(both @ QUERIES)
    boxes = sigmoid(scores[..., None] * (both @ CORNERS)[:, None])
    masks = scores[..., None, None] * features["fpn0"].sum(axis=1)
    return {"scores": scores, "presence": scores.max(axis=1), "boxes": boxes, "masks": masks}


def save_text(file: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["words", "tokens"], ["text"]),
        helper.make_node("Equal", ["tokens", "padding"], ["text_mask"]),
    ]
    weights = {"words": WORDS, "padding": np.zeros(1, np.int64)}
    save("text", nodes, {"tokens": INT64}, {"text": FLOAT, "text_mask": BOOL}, file, weights)


def describe(folder: Path, graphs: Mapping[str, Mapping[str, str]]) -> Manifest:
    """The manifest of what lies there."""
    names = [f.name for f in folder.iterdir() if f.is_file() and f.name != FILE]
    files = {
        n: {"bytes": (folder / n).stat().st_size, "sha256": hash_file(folder / n)} for n in names
    }
    manifest = Manifest(
        size="nano",
        resolution=R,
        prompts=None,
        classes=("a", "b"),
        prompts_a_pass=K,
        context_length=L,
        masks=True,
        top=None,
        threshold=0.5,
        opset=17,
        graphs=graphs,
        files=files,
        shapes=SHAPES,
        tolerances=TOLERANCES,
    )
    write_json(folder / FILE, manifest.to_json())
    return read_manifest(folder)


def make_folder(folder: Path, mixes: Mapping[str, np.ndarray]) -> Manifest:
    """An exported folder; `mixes`: precision → the trunk's weights in it."""
    folder.mkdir(exist_ok=True)
    for precision, mix in mixes.items():
        save_image(folder / f"image.{precision}.onnx", mix)
    save_ground(folder / "ground.onnx")
    save_text(folder / "text.onnx")
    features = numpy_image(to_pixels(PIXELS))
    found = {**features, **numpy_ground(features)}
    golden: dict[str, Any] = {
        name: sample(value.astype(np.float32)) for name, value in found.items()
    }
    np.savez(folder / "golden.npz", pixels=PIXELS, text=TEXT, text_mask=MASK, **golden)
    images = {precision: f"image.{precision}.onnx" for precision in mixes}
    others = {"ground": {"fp32": "ground.onnx"}, "text": {"fp32": "text.onnx"}}
    return describe(folder, {"image": images, **others})


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn().install(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """In fp16 a little off, as halves are, and in fp32."""
    make_folder(tmp_path / "model", {"fp16": MIX * np.float32(1.0005), "fp32": MIX})
    return tmp_path / "model"


def load(folder: Path, precision: str | None = None, **more: Any) -> TensorRTBackend:
    return TensorRTBackend(folder, read_manifest(folder), precision, **more)


def said(caplog: pytest.LogCaptureFixture) -> str:
    text = caplog.text
    caplog.clear()
    return text


def builds(device: StandIn) -> list[str]:
    """The graphs that were built since this was asked last."""
    names = [name for (name,) in device.called("parse")]
    device.calls.clear()
    return names


# --- what it answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("integrated", [True, False])
def test_it_answers_what_numpy_does(
    monkeypatch: pytest.MonkeyPatch, folder: Path, integrated: bool
) -> None:
    device = StandIn(integrated=integrated).install(monkeypatch)
    backend = load(folder, "fp32")
    other = rng.uniform(-1, 1, (1, 3, R, R)).astype(np.float32)
    first, second = backend.image(to_pixels(PIXELS)), backend.image(other)
    for features, pixels in (
        (first, to_pixels(PIXELS)),
        (second, other),
        (first, to_pixels(PIXELS)),
    ):
        found = backend.ground(features, TEXT, MASK)
        expected = numpy_ground(numpy_image(pixels))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    tokens = np.array([[4, 7, 0]])
    text, mask = backend.text(tokens)
    np.testing.assert_array_equal(text, WORDS[tokens])
    np.testing.assert_array_equal(mask, [[False, False, True]])
    copied = [name for name, _ in device.cuda_calls if name == "cudaMemcpyAsync"]
    assert backend.precision == "fp32"
    assert bool(copied[4:]) != integrated, "a Jetson copies but the golden features"


def test_results_are_the_callers_own(device: StandIn, folder: Path) -> None:
    backend = load(folder, "fp32")
    features = backend.image(to_pixels(PIXELS))
    before = backend.ground(features, TEXT, MASK)
    kept = {name: value.copy() for name, value in before.items()}
    backend.ground(features, -TEXT, ~MASK)
    for name, value in before.items():
        np.testing.assert_array_equal(value, kept[name])


def test_memory_is_used_again_and_given_back(device: StandIn, folder: Path) -> None:
    backend = load(folder)
    for _ in range(3):
        backend.ground(backend.image(to_pixels(PIXELS)), TEXT, MASK)
    held = len(device.memory)
    pair = [backend.image(to_pixels(PIXELS)) for _ in range(2)]
    assert len(device.memory) == held + 4, "the second image's features have a place of their own"
    del pair, backend
    assert not device.memory


def test_a_jetson_shares_its_memory_and_another_gpu_does_not(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    for integrated in (True, False):
        device = StandIn(integrated=integrated).install(monkeypatch)
        backend = load(folder, "fp32")
        flags = {arguments[1] for name, arguments in device.cuda_calls if name == "cudaHostAlloc"}
        assert flags == {2 if integrated else 0}
        assert bool(device.mapped) == integrated
        del backend


# --- engines -------------------------------------------------------------------------------------


def test_engines_are_built_once_one_after_the_other(
    device: StandIn, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder)
    order = [name for name, *_ in device.calls if name in ("parse", "build")]
    assert order == ["parse", "build"] * 3
    assert builds(device) == ["image.fp16.onnx", "ground.onnx", "text.onnx"]
    engines = sorted(folder.glob("engines/*.engine"))
    assert [re.sub(r"[0-9a-f]{16}", "KEY", file.name) for file in engines] == [
        "ground.fp32.KEY.engine",
        "image.fp16.KEY.engine",
        "text.fp32.KEY.engine",
    ]
    note = json.loads(engines[1].with_suffix(".json").read_text())
    assert note["identity"]["tensorrt"] == "10.3.0"
    assert note["identity"]["gpu"] == "Orin (8.7)"
    assert note["identity"]["precision"] == "fp16"
    assert note["sha256"] == hash_file(engines[1])
    assert "building the engine of image.fp16.onnx for Orin (8.7) by TensorRT 10.3.0" in said(
        caplog
    )
    load(folder)
    assert builds(device) == []
    assert "building" not in said(caplog)


def test_engines_go_where_they_are_told_to(device: StandIn, folder: Path, tmp_path: Path) -> None:
    load(folder, cache=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").glob("*.engine"))) == 3
    assert not (folder / "engines").exists()


def test_what_an_earlier_build_measured_helps_the_next(
    device: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)
    assert [count for (count,) in device.called("timings")] == [0, 1, 2]
    newer = StandIn(version="10.16.0").install(monkeypatch)
    load(folder)
    assert [count for (count,) in newer.called("timings")] == [0, 1, 2], "another version's own"
    (timings,) = [
        file for file in folder.glob("engines/timing.*") if b"10.3.0" in file.read_bytes()
    ]
    timings.write_bytes(b"rubbish")
    for file in folder.glob("engines/*.engine"):
        file.unlink()
    device = StandIn().install(monkeypatch)
    load(folder)
    assert [count for (count,) in device.called("timings")] == [0, 1, 2], "rubbish is left"


@pytest.mark.parametrize(
    ("change", "here"),
    [
        ({"version": "10.16.0"}, "TensorRT 10.16.0, Orin (8.7)"),
        ({"name": "Thor", "capability": (11, 0)}, "TensorRT 10.3.0, Thor (11.0)"),
    ],
)
def test_a_foreign_engine_is_not_loaded(
    device: StandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    here: str,
) -> None:
    load(folder)
    said(caplog)
    other = StandIn(**change).install(monkeypatch)
    load(folder)
    assert builds(other) == ["image.fp16.onnx", "ground.onnx", "text.onnx"]
    text = said(caplog)
    assert "the fp16 engine of image there was made for TensorRT 10.3.0, Orin (8.7), ONNX" in text
    assert f"here is {here}" in text
    device.install(monkeypatch)
    builds(device)
    load(folder)
    assert builds(device) == [], "each finds its own again"


def test_a_renamed_foreign_engine_is_not_loaded(
    device: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder)
    mine = {file.name: file.read_bytes() for file in folder.glob("engines/image.*")}
    for file in folder.glob("engines/*"):
        file.unlink()
    newer = StandIn(version="10.16.0").install(monkeypatch)
    load(folder)
    for theirs, content in zip(sorted(folder.glob("engines/image.*")), sorted(mine), strict=True):
        theirs.write_bytes(mine[content])
    builds(newer), said(caplog)
    load(folder)
    assert builds(newer) == ["image.fp16.onnx"]
    assert re.search(r"made for TensorRT 10\.3\.0.*here is TensorRT 10\.16\.0", said(caplog))


def test_a_stale_engine_is_not_loaded(
    device: StandIn, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder)
    old = read_manifest(folder).files["image.fp16.onnx"]["sha256"]
    builds(device), said(caplog)
    make_folder(folder, {"fp16": MIX * np.float32(1.0004), "fp32": MIX})
    load(folder)
    assert builds(device) == ["image.fp16.onnx"]
    assert read_manifest(folder).files["image.fp16.onnx"]["sha256"] != old
    assert said(caplog).count("was made for TensorRT 10.3.0, Orin (8.7), ONNX") == 1


def test_new_weights_outside_of_an_old_graph_make_a_new_engine(
    device: StandIn, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    found = []
    for mix in (MIX, MIX * np.float32(1.0001)):
        make_folder(folder, {"fp32": MIX})
        save_image(folder / "image.fp32.onnx", mix, data="image.fp32.onnx.data")
        manifest = describe(folder, read_manifest(folder).graphs)
        backend = TensorRTBackend(folder, manifest)
        found.append(backend.ground(backend.image(to_pixels(PIXELS)), TEXT, MASK)["scores"])
        (folder / "image.fp32.onnx.data").unlink()
    assert builds(device).count("image.fp32.onnx") == 2
    assert np.abs(found[0] - found[1]).max() > 1e-7
    other = {**manifest.files, "image.fp32.onnx.data": {"bytes": 1, "sha256": "00"}}
    for graph, same in (("image.fp32.onnx", False), ("ground.onnx", True)):
        save_image(folder / "image.fp32.onnx", MIX, data="image.fp32.onnx.data")
        before = source_hash(folder, manifest, graph)
        assert (before == source_hash(folder, replace(manifest, files=other), graph)) == same


def test_weights_that_the_manifest_does_not_name_are_not_read(
    device: StandIn, folder: Path
) -> None:
    save_image(folder / "image.fp32.onnx", MIX, data="elsewhere.data")
    (folder / "elsewhere.data").rename(folder.parent / "elsewhere.data")
    manifest = describe(folder, read_manifest(folder).graphs)
    with pytest.raises(UserError, match=r"the manifest does not name its \['elsewhere\.data'\]"):
        TensorRTBackend(folder, manifest, "fp32")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def swap_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_the_note(file: Path) -> None:
    file.with_suffix(".json").unlink()


def break_the_note(file: Path) -> None:
    file.with_suffix(".json").write_text("{")


def list_in_the_note(file: Path) -> None:
    file.with_suffix(".json").write_text('{"identity": [1]}')


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "is missing or cut short, not"),
        (Path.unlink, "is missing or cut short, not"),
        (swap_a_bit, "is changed, its SHA-256 is not its note's"),
        (lose_the_note, "has no note of what it was made for"),
        (break_the_note, "has no note of what it was made for, or a broken one"),
        (list_in_the_note, "was made for an unknown device"),
    ],
)
def test_a_harmed_engine_is_built_anew(
    device: StandIn, folder: Path, caplog: pytest.LogCaptureFixture, harm: Any, message: str
) -> None:
    load(folder)
    builds(device), said(caplog)
    (engine,) = folder.glob("engines/image.*.engine")
    harm(engine)
    load(folder)
    assert builds(device) == ["image.fp16.onnx"]
    assert message in said(caplog)
    load(folder)
    assert builds(device) == []


def test_what_tensorrt_refuses_is_built_anew_once(
    device: StandIn, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By its note it is ours, and yet: what a driver's update does."""
    load(folder)
    builds(device), said(caplog)
    (engine,) = folder.glob("engines/image.*.engine")
    swap_a_bit(engine)
    note = engine.with_suffix(".json")
    content = engine.read_bytes().replace(b"stand-in engine", b"stand-in-engine")
    engine.write_bytes(content)
    write_json(note, {**json.loads(note.read_text()), "sha256": hash_file(engine)})
    load(folder)
    assert builds(device) == ["image.fp16.onnx"]
    assert "TensorRT refuses it" in said(caplog)


def test_a_killed_build_leaves_nothing(device: StandIn, folder: Path) -> None:
    device.builds = False
    with pytest.raises(UserError, match=r"GPU memory was not available.*SAM3_TRT_WORKSPACE below"):
        load(folder)
    assert not list(folder.glob("engines/*.engine"))
    assert not list(folder.glob("engines/*.json"))
    device.builds = True
    assert load(folder).precision == "fp16"


def test_a_changed_onnx_is_never_built(device: StandIn, folder: Path) -> None:
    save_image(folder / "image.fp16.onnx", MIX * 2)
    with pytest.raises(UserError, match=r"image\.fp16\.onnx: is changed"):
        load(folder)
    assert builds(device) == []


def test_an_onnx_that_cannot_be_read_is_named(device: StandIn, folder: Path) -> None:
    model = onnx.load(folder / "text.onnx")
    model.graph.node[0].op_type = "Nonsense"
    onnx.save_model(model, folder / "text.onnx")
    describe(folder, read_manifest(folder).graphs)
    with pytest.raises(UserError, match=r"text\.onnx: TensorRT 10\.3\.0 cannot read it: In node"):
        load(folder)
    cut(folder / "text.onnx")
    with pytest.raises(UserError, match=r"text\.onnx: is no ONNX file, or is cut short"):
        load(folder)


def test_another_resolution_is_refused(device: StandIn, folder: Path) -> None:
    manifest = read_manifest(folder)
    shapes = {**SHAPES, "image": {**SHAPES["image"], "pixels": [1, 3, 16, 16]}}
    with pytest.raises(UserError, match=r"other inputs and outputs.*'pixels': \(1, 3, 16, 16\)"):
        TensorRTBackend(folder, replace(manifest, shapes=shapes), "fp32")


def test_a_file_in_the_place_of_the_folder(device: StandIn, folder: Path) -> None:
    (folder / "engines").touch()
    with pytest.raises(UserError, match="engines are kept there, and it cannot be written to"):
        load(folder)


# --- precision -----------------------------------------------------------------------------------


def test_what_misses_the_golden_outputs_gives_way_to_the_next_safer(
    device: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    make_folder(folder, {"fp16": MIX * 0, "bf16": -MIX, "fp32": MIX})
    backend = load(folder)
    assert backend.precision == "fp32"
    assert builds(device) == [
        *("image.fp16.onnx", "ground.onnx", "text.onnx", "image.bf16.onnx", "image.fp32.onnx")
    ]
    text = said(caplog)
    assert text.index("fp16 differs from the exporter's outputs") < text.index(
        "bf16 is used instead"
    )
    assert text.index("bf16 differs from the exporter's outputs") < text.index(
        "fp32 is used instead"
    )
    found = backend.ground(backend.image(to_pixels(PIXELS)), TEXT, MASK)
    expected = numpy_ground(numpy_image(to_pixels(PIXELS)))
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-5)
    assert [file.name.split(".")[1] for file in folder.glob("engines/image.*.engine")] == ["fp32"]
    assert load(folder).precision == "fp32"
    assert builds(device) == [], "what missed is not built again"
    assert "fp16 differs from the exporter's outputs" in said(caplog)


def test_float32_is_not_rounded_to_tf32(device: StandIn, folder: Path) -> None:
    load(folder)
    order = [(name, *more) for name, *more in device.calls if name in ("parse", "clear_flag")]
    assert order == [
        ("parse", "image.fp16.onnx"),
        *(("parse", "ground.onnx"), ("clear_flag", "tf32")),
        *(("parse", "text.onnx"), ("clear_flag", "tf32")),
    ]


def test_where_nothing_gives_the_golden_outputs_it_is_said(device: StandIn, tmp_path: Path) -> None:
    make_folder(tmp_path / "model", {"fp16": MIX * 0, "fp32": -MIX})
    with pytest.raises(UserError, match="no precision here gives the exporter's outputs; fp32: "):
        load(tmp_path / "model")


def test_an_engine_built_anew_is_compared_anew(device: StandIn, folder: Path) -> None:
    load(folder)
    (verdict,) = folder.glob("engines/checked.fp16.*.json")
    assert json.loads(verdict.read_text())["misses"] == []
    before = verdict.read_text().replace('"image": "', '"image": "0')
    verdict.write_text(before)
    load(folder)
    assert verdict.read_text() != before
    verdict.write_text("[]")
    load(folder)
    assert json.loads(verdict.read_text())["misses"] == []


def test_without_golden_outputs_nothing_is_run(device: StandIn, folder: Path) -> None:
    (folder / "golden.npz").unlink()
    manifest = describe(folder, read_manifest(folder).graphs)
    with pytest.raises(UserError, match=r"holds no golden\.npz"):
        TensorRTBackend(folder, manifest)
    assert builds(device) == []


def manifest_of(**graphs: str) -> Manifest:
    """With these precisions, separated by spaces."""
    named = {g: {p: f"{g}.{p}.onnx" for p in words.split()} for g, words in graphs.items()}
    return Manifest(
        *("nano", R, None, (), K, L, True, None, 0.5, 17),
        graphs=named,
        files={},
        shapes={},
        tolerances={},
    )


def test_the_ladder_leads_to_ever_safer_precisions() -> None:
    manifest = manifest_of(image="fp32 bf16 fp16 int8", ground="fp32 fp16")
    assert ladder(manifest) == {
        "fp16": {"image": "fp16", "ground": "fp16"},
        "bf16": {"image": "bf16", "ground": "fp32"},
        "fp32": {"image": "fp32", "ground": "fp32"},
    }
    assert list(ladder(manifest, "int8")) == ["int8", "fp16", "bf16", "fp32"]
    assert list(ladder(manifest, "fp32")) == ["fp32"]
    assert list(ladder(manifest, bf16=False)) == ["fp16", "fp32"]
    assert list(ladder(manifest_of(image="fp32", ground="fp32"))) == ["fp32"]


def test_a_gpu_without_bf16_is_not_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = StandIn(name="Xavier", capability=(7, 2)).install(monkeypatch)
    make_folder(tmp_path / "model", {"fp16": MIX * 0, "bf16": MIX, "fp32": MIX})
    assert load(tmp_path / "model").precision == "fp32"
    assert "image.bf16.onnx" not in builds(device)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp8", "precision fp8: must be one of fp32, bf16, fp16, int8"),
        ("bf16", "neither it nor a safer one"),
    ],
)
def test_a_precision_that_there_is_not(precision: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ladder(manifest_of(image="fp16", ground="fp32"), precision)


# --- the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "asked", "limit"),
    [
        (6 << 30, "", 3 << 29),
        (80 << 30, "", 2 << 30),
        (1 << 20, "", 256 << 20),
        (6 << 30, "300", 300 << 20),
    ],
)
def test_workspace(monkeypatch: pytest.MonkeyPatch, free: int, asked: str, limit: int) -> None:
    monkeypatch.setenv("SAM3_TRT_WORKSPACE", asked)
    assert workspace_limit(free) == limit


@pytest.mark.parametrize("asked", ["0", "-1", "2G", "1e3", "9" * 20])
def test_workspace_that_is_none(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("SAM3_TRT_WORKSPACE", asked)
    with pytest.raises(UserError, match="must be a whole number of MiB"):
        workspace_limit(1 << 33)


def test_the_builder_is_told_the_workspace(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    device = StandIn(integrated=False, free=4 << 30).install(monkeypatch)
    load(folder)
    assert device.called("workspace") == [[1 << 30]] * 3


def test_memory_that_linux_can_give(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal: 7990000 kB\nMemFree: 100 kB\nMemAvailable: 2048 kB\n"
    )
    assert available_memory(tmp_path / "meminfo") == 2 << 20
    assert available_memory(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("cudaGetDeviceProperties", Error.cudaErrorNoDevice, "no GPU that this CUDA can use"),
        ("cudaStreamCreate", Error.cudaErrorInsufficientDriver, "--runtime nvidia"),
        ("cudaGetDeviceProperties", RuntimeError("Failed to dlopen libcuda.so.1"), "no GPU that"),
        ("cudaMalloc", Error.cudaErrorMemoryAllocation, "the GPU's memory is used up"),
        ("cudaHostAlloc", Error.cudaErrorMemoryAllocation, "the GPU's memory is used up"),
    ],
)
def test_what_cuda_reports_is_explained(
    device: StandIn, folder: Path, function: str, error: Error | RuntimeError, message: str
) -> None:
    device.fails = {function: error}
    with pytest.raises(UserError, match=message):
        load(folder)


def test_what_cuda_cannot_report_is_no_users_mistake(device: StandIn, folder: Path) -> None:
    device.fails = {"cudaStreamSynchronize": Error.cudaErrorInvalidValue}
    with pytest.raises(RuntimeError, match="cudaStreamSynchronize: cudaErrorInvalidValue"):
        load(folder)


@pytest.mark.parametrize("version", ["8.6.1", "9.0"])
def test_an_old_tensorrt_is_refused(
    monkeypatch: pytest.MonkeyPatch, folder: Path, version: str
) -> None:
    StandIn(version=version).install(monkeypatch)
    with pytest.raises(UserError, match=f"TensorRT {version}: must be 10 or newer"):
        load(folder)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("tensorrt", "TensorRT cannot be used here"),
        ("cuda.bindings.runtime", "'cuda-python' is missing"),
    ],
)
def test_a_missing_library_is_named(
    device: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", None)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "--backend onnxruntime" in str(caught.value)


def test_the_older_name_of_cuda_python_is_known(
    device: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.cudart", sys.modules["cuda.bindings.runtime"])
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert load(folder).precision == "fp16"


# --- the stand-in --------------------------------------------------------------------------------


@pytest.mark.parametrize("integrated", [True, False])
def test_the_stand_in_has_no_cuda_of_its_own(
    monkeypatch: pytest.MonkeyPatch, folder: Path, integrated: bool
) -> None:
    """Each function that was called is in the real `cuda-python`, with as many arguments."""
    real = pytest.importorskip("cuda.bindings.runtime")
    device = StandIn(integrated=integrated).install(monkeypatch)
    load(folder)
    for name, arguments in {(name, len(arguments)) for name, arguments in device.cuda_calls}:
        signature = getattr(real, name).__doc__.splitlines()[0]
        taken = [word for word in signature.partition("(")[2].rstrip(")").split(",") if word]
        assert len(taken) == arguments, signature
    assert {"name", "major", "minor", "integrated"} <= set(dir(real.cudaDeviceProp()))
    assert real.cudaHostAllocMapped == 2
    assert real.cudaHostAllocDefault == 0
    for kind in ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"):
        assert getattr(real.cudaMemcpyKind, kind) == getattr(
            sys.modules["cuda.bindings.runtime"].cudaMemcpyKind, kind
        )
    for error in Error:
        assert getattr(real.cudaError_t, error.name) == error


@pytest.fixture(autouse=True)
def hear_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app")
    logging.getLogger("app").propagate = True
