"""The image for a Jetson, as far as another machine can prove it: no GPU, and so no TensorRT.

Built on the tests' own base and run by ONNX Runtime, on photographs, with nano. What TensorRT would
do is tested on a stand-in in deploy/test_tensorrt.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.container import engine as engines
from tests.container.conftest import CALLER, CANARY, JETSON_IMAGE, Caller
from tests.container.test_container import holding, images, owners
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.system
PHOTOGRAPHS = 3
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # each of them may get some of these tests
# nano knows no potholes: what it takes for some is compared, not judged
ASKED = ["--prompt", "pothole", "--threshold", "0", "--max-detections", "5"]


def python(caller: Caller, program: str, user: int = CALLER) -> str:
    """What a program prints in the image."""
    options = ("--rm", "--network", "none", "--user", f"{user}:{user}", "--entrypoint")
    words = ("/opt/venv/bin/python", JETSON_IMAGE, "-IBc", program)
    return caller.engine("run", *options, *words)


def host(*words: object) -> None:
    """A command of the app, on this machine."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def photographs(jetson: Caller) -> Path:
    folder = jetson.folder.parent / f"phötographs{WORKER}"
    folder.mkdir()
    files = images(jetson.dataset).iterdir()
    for path in sorted(path for path in files if path.suffix in (".jpg", ".png"))[:PHOTOGRAPHS]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def exported(jetson: Caller, photographs: Path) -> Path:
    """nano for one prompt, in a folder that is the caller's."""
    folder = jetson.folder / f"exported{WORKER}"
    prompts = ("--prompt", "pothole", "--images", photographs, "--measure-on", "1")
    host("-m", "app", "export", REPOSITORY / "app/assets/nano", "--output", folder, *prompts)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, CALLER, CALLER)
    return folder


def test_the_image_says_what_it_is_and_runs_as_nobody_special(jetson: Caller) -> None:
    config = json.loads(jetson.engine("image", "inspect", JETSON_IMAGE))[0]["Config"]
    assert config["User"] == "1000:video"
    assert config["Entrypoint"][-2:] == ["-m", "app.deploy.runtime"]
    assert config["Labels"]["org.opencontainers.image.title"] == "sam3-finetuning-jetson"
    assert "--loop" in jetson.engine("run", "--rm", "--network", "none", JETSON_IMAGE)


def test_the_image_holds_the_runtime_and_neither_torch_nor_a_secret(jetson: Caller) -> None:
    program = """
import importlib.metadata as metadata, importlib.util as util, pathlib
print(*sorted(path.name for path in pathlib.Path("/opt/sam3-finetuning").iterdir()))
print(*(name for name in ("torch", "torchvision", "sam3", "transformers") if util.find_spec(name)))
print(metadata.version("numpy"), metadata.version("cuda-bindings"))
pathlib.Path.home().joinpath("probe").touch()
"""
    tops, without, versions = python(jetson, program).splitlines()
    assert tops.split() == ["LICENSE", "app", "requirements-jetson.lock"]
    assert without == ""
    lock = (REPOSITORY / "requirements-jetson.lock").read_text()
    numpy, cuda = versions.split()
    assert f"numpy=={numpy} " in lock
    assert f"cuda-bindings=={cuda} " in lock
    kept = json.loads(jetson.engine("image", "inspect", JETSON_IMAGE))[0]["GraphDriver"]["Data"]
    layers = [*kept["LowerDir"].split(":"), kept["UpperDir"]]
    assert holding("class TensorRTBackend", layers)
    assert not holding(CANARY, layers)


def test_a_base_without_tensorrt_is_refused(jetson: Caller) -> None:
    words = ("--jetson", "--base-image", engines.BASE_IMAGE, "--tag", "sam3-test-refused")
    printed = jetson("build.sh", *words, code=1)
    assert "tensorrt: the base image has no such package" in printed


def test_it_finds_what_the_host_finds(jetson: Caller, exported: Path, photographs: Path) -> None:
    shadow = jetson.folder / "app"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("raise SystemExit('the wrong app')\n")
    asked = [exported, "--input", photographs, *ASKED]
    printed = jetson("infer.sh", "--jetson", *asked, "--output", "found jetson")
    assert f"runtime: docker (SAM3_RUNTIME=docker, image {JETSON_IMAGE})" in printed
    found = jetson.folder / "found jetson"
    assert owners(found) == {(CALLER, CALLER)}
    assert len(list(found.glob("*.png"))) == PHOTOGRAPHS
    host("-m", "app.deploy.runtime", *asked, "--output", jetson.folder.parent / "found host")
    mine, theirs = (
        json.loads((folder / "predictions.json").read_text())
        for folder in (found, jetson.folder.parent / "found host")
    )
    assert len(mine) == len(theirs) == 5 * PHOTOGRAPHS
    for one, other in zip(mine, theirs, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.5)


def test_what_the_exporter_kept_is_found_again(jetson: Caller, exported: Path) -> None:
    said = jetson("infer.sh", "--jetson", exported, "--check")
    assert "outputs are those of the exporter" in said


def test_without_tensorrt_it_is_said_what_to_do(jetson: Caller, exported: Path) -> None:
    words = ("infer.sh", "--jetson", exported, "--check", "--backend", "tensorrt")
    printed = jetson(*words, code=2)
    assert "TensorRT cannot be used here" in printed
    assert "--backend onnxruntime" in printed
    assert "Traceback" not in printed
