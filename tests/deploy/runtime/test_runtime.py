"""An exported folder without torch: the predictor's answers, and a clear word for every fault."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from app.datasets.images import open_image
from app.deploy.export import export
from app.deploy.runtime.manifest import FILE, read_manifest
from app.deploy.runtime.onnx_backend import choose_precisions
from app.deploy.runtime.runtime import Runtime
from app.deploy.wanted import Wanted
from app.errors import UserError
from app.inference.predictor import Predictor
from app.model.bundled import NANO
from tests.deploy.tiny import (
    BOXES,
    PROMPTS,
    expected_score,
    image_graph,
    write_folder,
    write_manifest,
)
from tests.helpers import REPOSITORY, once

WORDS = ("circle", "red thing", "blue triangle", "ellipse", "dog")
A_PASS = 2
SCENE = REPOSITORY / "examples" / "scene.png"
# Whatever is installed is refused but what a device has: numpy, Pillow, ONNX Runtime and its own.
ALONE = """
import json, sys
from pathlib import Path
from tests.deploy.runtime.device_imports import allow_only

ALLOWED = ("numpy", "PIL", "onnxruntime", "flatbuffers", "google", "packaging", "coloredlogs")

allow_only(ALLOWED)
from app.datasets.images import open_image
from app.deploy.runtime import Runtime

runtime = Runtime.load(sys.argv[1])
found = runtime.predict(open_image(Path(sys.argv[2])), threshold=0.1, nms=0.9)
for name in ("torch", "torchvision", "sam3", "pycocotools", "cv2", "yaml", "pydantic", "rich"):
    assert name not in sys.modules, name
print(json.dumps([found.boxes_xyxy.tolist(), found.scores.tolist(), found.masks]))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano in fp32 for five prompts, two a pass."""
    trace = logging.getLogger("torch.__trace")
    trace.propagate = False  # torch.onnx notes each of its steps for whoever listens
    wanted = Wanted(prompts=WORDS, prompts_per_pass=A_PASS)
    folder = once(
        tmp_path_factory, "exported-fp32", lambda out: export(NANO, out, wanted, measure_on=1)
    )
    trace.propagate = True
    return folder


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load(NANO, device="cpu", precision="fp32")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


# --- beside the predictor ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.05},
        {"threshold": 0.0, "max_detections": 20},
        {"threshold": 0.02, "nms": 0.5, "tile": 200, "overlap": 0.3},
    ],
)
def test_drawn_images_are_answered_as_the_predictor_does(
    exported: Path, predictor: Predictor, shapes: Path, options: dict
) -> None:
    runtime = Runtime.load(exported, backend="onnxruntime")
    files = [SCENE, *sorted((shapes / "train" / "images").iterdir())]
    images = [open_image(file) for file in files]
    ours = runtime.predict_batch(images, WORDS, **options)
    assert len(ours[0]) > 3
    for image, found in zip(images, ours, strict=True):
        truth = predictor.predict(image, WORDS, **options)
        assert len(found) == len(truth)
        assert found.prompts == truth.prompts
        assert (found.width, found.height) == image.size
        np.testing.assert_array_equal(found.prompt_ids, truth.prompt_ids)
        np.testing.assert_allclose(found.scores, truth.scores, atol=1e-4)
        scale = max(image.size)
        np.testing.assert_allclose(found.boxes_xyxy / scale, truth.boxes_xyxy / scale, atol=1e-4)
        one, other = found.bool_masks(), truth.bool_masks()
        either = (one | other).sum((1, 2))
        np.testing.assert_array_less((one != other).sum((1, 2)), 0.01 * either + 1)


def test_classes_and_threshold_are_the_folders(exported: Path, predictor: Predictor) -> None:
    runtime = Runtime.load(exported, backend="onnxruntime")
    image = open_image(SCENE)
    found = runtime.predict(image)
    assert found.prompts == runtime.manifest.classes
    truth = predictor.predict(image, found.prompts)
    assert len(found) == len(truth) > 0
    np.testing.assert_allclose(found.scores, truth.scores, atol=1e-4)


def test_it_needs_numpy_pillow_and_onnxruntime_alone(exported: Path, predictor: Predictor) -> None:
    picture = SCENE
    done = subprocess.run(
        [sys.executable, "-c", ALONE, exported, picture],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    boxes, scores, masks = json.loads(done.stdout)
    classes = read_manifest(exported).classes
    truth = predictor.predict(open_image(picture), classes, threshold=0.1, nms=0.9)
    assert len(scores) == len(truth) > 1
    np.testing.assert_allclose(scores, truth.scores, atol=1e-4)
    np.testing.assert_allclose(boxes, truth.boxes_xyxy, atol=0.1)
    assert [mask["size"] for mask in masks] == [mask["size"] for mask in truth.masks or []]


# --- answers that numpy knows --------------------------------------------------------------------


def test_a_pass_is_filled_up_and_what_fills_it_is_not_answered(tiny: Path) -> None:
    """Three prompts, two a pass; then one."""
    runtime = Runtime.load(tiny, backend="onnxruntime")
    color = np.array([200, 90, 30])
    image = Image.new("RGB", (20, 10), tuple(color.tolist()))
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[1:2]):
        found = runtime.predict(image, prompts, threshold=0.0)
        assert len(found) == 2 * len(prompts)
        for index, prompt in enumerate(prompts):
            mine = found.select(np.flatnonzero(found.prompt_ids == index))
            score = expected_score(color, prompt)
            np.testing.assert_allclose(mine.scores, [score, score / 2], rtol=1e-5)
            x1, y1 = BOXES[:, 0] - BOXES[:, 2] / 2, BOXES[:, 1] - BOXES[:, 3] / 2
            np.testing.assert_allclose(mine.boxes_xyxy[:, 0], 20 * x1)
            np.testing.assert_allclose(mine.boxes_xyxy[:, 1], 10 * y1)
            filled = color.mean() > 127.5
            assert mine.bool_masks().all(axis=(1, 2)).tolist() == [filled, filled]


def test_thresholds_and_most_detections(tiny: Path) -> None:
    runtime = Runtime.load(tiny, backend="onnxruntime")
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    assert runtime.predict(image).scores.tolist() == pytest.approx(
        [expected_score(np.array([255, 0, 0]), "red")]  # above the folder's 0.6
    )
    assert len(runtime.predict(image, PROMPTS, threshold=0.0, max_detections=4)) == 4
    assert runtime.seconds["model"] > 0


def test_prompts_that_are_not_there_are_named_with_those_that_are(tiny: Path) -> None:
    runtime = Runtime.load(tiny, backend="onnxruntime")
    image = Image.new("RGB", (16, 16))
    with pytest.raises(UserError) as caught:
        runtime.predict(image, ["red", "grene", "dog", "visual"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["'grene'", "'dog'"]
    assert "red, green, blue. Did you mean 'green'?" in caught.value.problems[0]
    with pytest.raises(UserError, match=r"'visual'.*must be among red, green, blue"):
        runtime.predict(image, ["visual"])
    with pytest.raises(UserError, match="a prompt of no words"):
        runtime.predict(image, [" "])


# --- which precision -----------------------------------------------------------------------------


def test_each_graph_takes_the_precision_or_the_next_safer_one(tiny: Path) -> None:
    manifest = read_manifest(tiny)
    every = {p: f"image.{p}.onnx" for p in ("fp32", "bf16", "fp16", "int8")}
    graphs = {"image": every, "ground": {"fp32": "ground.onnx", "fp16": "ground.fp16.onnx"}}
    manifest = type(manifest)(**{**vars(manifest), "graphs": graphs})
    choose = choose_precisions
    assert choose(manifest) == {"image": "int8", "ground": "fp32"}
    assert choose(manifest, on_gpu=True) == {"image": "fp16", "ground": "fp16"}
    assert choose(manifest, "fp16") == {"image": "fp16", "ground": "fp16"}
    assert choose(manifest, "int8", on_gpu=True) == {"image": "int8", "ground": "fp16"}
    assert choose(manifest, "fp32") == {"image": "fp32", "ground": "fp32"}
    for wrong in ("bf16", "fp64"):
        with pytest.raises(UserError, match=f"--precision {wrong}: .* fp32, fp16, int8"):
            choose(manifest, wrong)
    graphs["ground"] = {"fp16": "ground.fp16.onnx"}
    with pytest.raises(UserError, match="has of the ground graph only fp16"):
        choose(manifest, "fp32")


def test_a_cuda_that_cannot_be_loaded_leaves_the_cpu(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The package lists what it was built with; a session says what it has."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    expected = Runtime.load(tiny, backend="onnxruntime")
    every = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    monkeypatch.setattr(logging.getLogger("app"), "propagate", True)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        runtime = Runtime.load(tiny, backend="onnxruntime")
    assert "cannot load CUDA here" in caplog.text
    scene = open_image(SCENE)
    found, same = (each.predict(scene, threshold=0.0) for each in (runtime, expected))
    assert np.array_equal(found.scores, same.scores)


# --- faults --------------------------------------------------------------------------------------


def _refused(folder: Path, said: str, **options: str) -> None:
    with pytest.raises(UserError, match=said):
        Runtime.load(folder, backend="onnxruntime", **options)


@pytest.mark.parametrize("name", ["image.onnx", "ground.onnx", "text.npz"])
def test_a_changed_file_is_refused(tiny: Path, name: str) -> None:
    content = bytearray((tiny / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tiny / name).write_bytes(content)
    _refused(tiny, f"{name}: is changed: its SHA-256 is not the manifest's")
    (tiny / name).write_bytes(content[:100])
    _refused(tiny, f"{name}: is cut short or changed: 100 bytes")
    (tiny / name).unlink()
    _refused(tiny, f"{name}: is missing")


def test_a_graph_that_was_cut_short_before_it_was_described(tiny: Path) -> None:
    content = (tiny / "image.onnx").read_bytes()
    (tiny / "image.onnx").write_bytes(content[: len(content) // 2])
    write_manifest(tiny, read_manifest(tiny))
    _refused(tiny, "image.onnx: is no ONNX file, or is cut short")


def test_a_graph_that_onnx_runtime_cannot_load(tiny: Path) -> None:
    model = image_graph()
    model.graph.node[0].op_type = "Nonsense"
    (tiny / "image.onnx").write_bytes(model.SerializeToString())
    write_manifest(tiny, read_manifest(tiny))
    _refused(tiny, "image.onnx: ONNX Runtime .* cannot load it .*Nonsense")


def test_another_resolution_is_refused(tiny: Path) -> None:
    onnx.save(image_graph(side=16), tiny / "image.onnx")
    write_manifest(tiny, read_manifest(tiny))
    _refused(tiny, r"image.onnx: has other inputs and outputs than the manifest: .*16, 16\)")
    write_manifest(tiny, read_manifest(tiny), resolution=16)
    _refused(tiny, "has other inputs and outputs")
    onnx.save(image_graph(), tiny / "image.onnx")
    write_manifest(tiny, read_manifest(tiny))
    _refused(tiny, "the image graph takes 8 pixels, and the manifest says 16")


@pytest.mark.parametrize("place", ["../weights", "/etc/hostname", "elsewhere/weights"])
def test_a_manifest_that_leaves_the_folder(tiny: Path, place: str) -> None:
    content = json.loads((tiny / FILE).read_text())
    content["files"][place] = {"bytes": 1, "sha256": "0"}
    (tiny / FILE).write_text(json.dumps(content))
    _refused(tiny, "leaves the folder")


@pytest.mark.parametrize("place", ["../secret", "unnamed.data"])
def test_weights_outside_of_what_the_manifest_names(tiny: Path, place: str) -> None:
    """Our own check names them; ONNX Runtime alone would refuse the one that leaves the folder."""
    model = image_graph()
    weights = onnx.numpy_helper.from_array(np.zeros(4, dtype=np.float32), "unused")
    onnx.external_data_helper.set_external_data(weights, location=place, offset=0, length=16)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer.append(weights)
    nothing = onnx.helper.make_node("Identity", ["unused"], ["also_unused"])
    model.graph.node.append(nothing)
    (tiny / "image.onnx").write_bytes(model.SerializeToString())
    (tiny / place).write_bytes(bytes(16))
    write_manifest(tiny, read_manifest(tiny))
    if place == "../secret":
        with pytest.raises(Exception, match=r"escapes|outside|path"):
            onnxruntime.InferenceSession(
                str(tiny / "image.onnx"), providers=["CPUExecutionProvider"]
            )
    else:
        content = json.loads((tiny / FILE).read_text())
        del content["files"][place]
        (tiny / FILE).write_text(json.dumps(content))
    _refused(tiny, f"keeps weights in '{place}', which the manifest does not name")


def test_weights_beside_the_graph_are_proved_as_well(tiny: Path) -> None:
    model = onnx.load(tiny / "ground.onnx")
    onnx.save(
        model, tiny / "ground.onnx", save_as_external_data=True, location="w", size_threshold=200
    )
    write_manifest(tiny, read_manifest(tiny))
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    assert len(Runtime.load(tiny, backend="onnxruntime").predict(image)) == 1
    content = bytearray((tiny / "w").read_bytes())
    content[-1] ^= 64
    (tiny / "w").write_bytes(content)
    _refused(tiny, "w: is changed")


def test_no_backend_is_installed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match=r"pip install onnxruntime .*docs/jetson\.md"):
        Runtime.load(tiny)
    with pytest.raises(UserError, match=r"ONNX Runtime cannot be used here .*pip install"):
        Runtime.load(tiny, backend="onnxruntime")
    with pytest.raises(UserError, match="TensorRT cannot be used here"):
        Runtime.load(tiny, backend="tensorrt")
    with pytest.raises(UserError, match=r"--backend onnxrt: .* Did you mean 'onnxruntime'"):
        Runtime.load(tiny, backend="onnxrt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resolution": "128"}, "resolution: '128' is none of 1 to"),
        ({"resolution": 10**9}, "resolution: 1000000000 is none of 1 to"),
        ({"prompts_a_pass": 0}, "prompts_a_pass: 0 is none"),
        ({"context_length": True}, "context_length: True is none"),
        ({"top": 1.5}, "top: 1.5 is none"),
        ({"threshold": "x"}, "threshold: 'x' is none of 0 to 1"),
        ({"classes": [3]}, "classes: is no list"),
        ({"prompts": ["x"] * 60_000}, "prompts: is no list of at most 50000"),
        ({"files": {"a.onnx": {"bytes": "1", "sha256": "x"}}}, "bytes or sha256 are none"),
        ({"shapes": {"image": {"pixels": ["x"]}}}, "shapes: pixels"),
        ({"graphs": {"image": {"fp32": 3}}}, "graphs: a name is no text"),
        ({"graphs": []}, "a key is wrong or missing"),
        ({"tolerances": {"fp32": {"cosine": "x"}}}, "a key is wrong or missing"),
    ],
)
def test_a_manifest_of_other_values(tiny: Path, change: dict[str, object], said: str) -> None:
    content = json.loads((tiny / "manifest.json").read_text())
    (tiny / "manifest.json").write_text(json.dumps(content | change))
    _refused(tiny, said)


def test_a_manifest_nested_without_an_end(tiny: Path) -> None:
    (tiny / "manifest.json").write_text("[" * 100_000)
    _refused(tiny, "nested too deeply")


def test_a_link_in_the_folder_is_not_followed(tiny: Path, tmp_path: Path) -> None:
    (tiny / "image.onnx").rename(tmp_path / "image.onnx")
    (tiny / "image.onnx").symlink_to(tmp_path / "image.onnx")
    _refused(tiny, r"image\.onnx: is missing, or a link")


def test_no_folder(tmp_path: Path) -> None:
    _refused(tmp_path, r"holds no manifest\.json")


# --- golden answers ------------------------------------------------------------------------------


def test_a_device_is_compared_with_what_the_exporter_kept(tiny: Path, exported: Path) -> None:
    assert Runtime.load(tiny, backend="onnxruntime").check() == []
    assert Runtime.load(exported, backend="onnxruntime").check() == []
    with np.load(tiny / "golden.npz") as content:
        golden = dict(content)
    golden["scores"] = golden["scores"] + 0.01
    np.savez(tiny / "golden.npz", **golden)
    write_manifest(tiny, read_manifest(tiny))
    misses = Runtime.load(tiny, backend="onnxruntime").check()
    assert len(misses) == 1
    assert misses[0].startswith("scores: differ by 0.0")


def test_nothing_to_compare_with(tiny: Path, tmp_path: Path) -> None:
    (tiny / "golden.npz").write_bytes(b"PK")
    write_manifest(tiny, read_manifest(tiny))
    runtime = Runtime.load(tiny, backend="onnxruntime")
    with pytest.raises(UserError, match=r"golden\.npz: cannot be read"):
        runtime.check()
    shutil.copytree(tiny, tmp_path / "other")
    (tmp_path / "other" / "golden.npz").unlink()
    write_manifest(tmp_path / "other", read_manifest(tiny))
    with pytest.raises(UserError, match=r"names no golden\.npz"):
        Runtime.load(tmp_path / "other", backend="onnxruntime").check()
