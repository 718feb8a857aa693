"""`python -m app.deploy.runtime`: what `infer.sh` writes, and frame after frame."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from app.deploy.runtime.camera import LINES, Speed
from app.deploy.runtime.cli import main
from app.deploy.runtime.manifest import read_manifest
from app.evaluation.tracks import read_films
from app.inference.settings import SAVES
from tests.deploy.tiny import expected_score, write_folder, write_manifest
from tests.helpers import PATIENCE, REPOSITORY, Result, until
from tests.inference.film_files import squares

COLORS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Run `python -m app.deploy.runtime WORDS` in this process."""

    def call(*words: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Result(int(stop.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A red, a green and a blue one."""
    (tmp_path / "in").mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (40, 20), color).save(tmp_path / "in" / f"{name}.png")
    return tmp_path / "in"


def test_a_folder_of_images(run, folder: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (folder, "--input", images, "--output", out, "--prompt", "green", "--prompt", "red")
    done = run(*words, "--save", ",".join(SAVES))
    assert done.code == 0, done.err
    assert "fp32 by onnxruntime" in done.out
    assert "3 of 3 images, 2 objects" in done.out
    results = json.loads((out / "predictions.json").read_text())
    found = {(result["file_name"], result["prompt"]): result for result in results}
    assert found.keys() == {("a.png", "red"), ("b.png", "green")}
    red = found["a.png", "red"]
    assert red["score"] == pytest.approx(expected_score(np.array(COLORS["a"]), "red"))
    assert red["bbox"] == [10, 5, 20, 10]
    assert red["segmentation"]["size"] == [20, 40]
    for name in ("a.png", "labels/a.txt", "instances/a.png", "semantic/a.png", "data.yaml"):
        assert (out / name).is_file(), name
    assert len(list((out / "geojson").iterdir())) == 3
    with (out / "predictions.csv").open() as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == ["red", "green"]


def test_it_goes_on_where_it_stopped(run, folder: Path, images: Path, tmp_path: Path) -> None:
    words = (folder, "--input", images, "--output-dir", tmp_path / "out")
    assert run(*words).code == 0
    assert "3 of 3 images were done before" in run(*words).out
    other = run(*words, "--threshold", "0.1")
    assert other.code == 2
    assert "threshold was 0.6, now 0.1" in other.err
    assert run(*words, "--threshold", "0.1", "--overwrite").code == 0


def test_a_bad_image_costs_only_itself(run, folder: Path, images: Path, tmp_path: Path) -> None:
    (images / "bad.png").write_bytes(b"nothing")
    done = run(folder, "--input", images, "--output", tmp_path / "out", "--save", "coco")
    assert done.code == 3
    assert "bad.png: cannot be read as an image" in done.out
    assert "3 of 4 images" in done.out


def test_problems_are_said_at_once(run, folder: Path, images: Path, tmp_path: Path) -> None:
    done = run(
        folder, "--input", images, "--output", tmp_path / "out", "--prompt", "rde", "--save", "x"
    )
    assert done.code == 2
    assert "'rde': is not in the vocabulary" in done.err
    assert "--save x: there is overlay" in done.err
    assert not (tmp_path / "out").exists()
    done = run(folder, "--frames", 3)
    assert done.code == 2
    for flag in ("--input", "--output", "--frames"):
        assert f"error: {flag}: " in done.err
    done = run(folder, "--input", "camera:front", "--output", tmp_path / "out", "--prompt", "red")
    assert "a camera is camera:0" in done.err
    assert run(tmp_path, "--input", images, "--output", tmp_path / "out").code == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--threshold", "1.5"), ("--threshold", "x"), ("--max-detections", "0")),
        *(("--tile", "8"), ("--overlap", "1"), ("--precision", "fp8"), ("--backend", "onyx")),
    ],
)
def test_values_out_of_range(run, folder: Path, flag: str, value: str) -> None:
    done = run(folder, flag, value)
    assert done.code == 2
    assert f"argument {flag}: " in done.err


def test_the_device_is_compared_with_the_exporter(run, folder: Path, tmp_path: Path) -> None:
    assert "outputs are those of the exporter" in run(folder, "--check").out
    other = write_folder(tmp_path / "other")
    with np.load(other / "golden.npz") as content:
        golden = dict(content)
    np.savez(other / "golden.npz", **{**golden, "fpn1": -golden["fpn1"]})
    write_manifest(other, read_manifest(other))
    done = run(other, "--check")
    assert done.code == 2
    assert "  fpn1: cosine -1 (at least 0.9999)" in done.err


# --- frame after frame ---------------------------------------------------------------------------


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LINES).read_text().splitlines()]


def test_images_are_answered_as_they_arrive(folder: Path, images: Path, tmp_path: Path) -> None:
    """In a process of its own, which Ctrl-C ends."""
    out = tmp_path / "out"
    process = _start(folder, images, out, "--prompt", "red", "--save", "coco,overlay")
    try:
        until(lambda: (out / LINES).is_file() and len(_lines(out)) == 3, "three answers")
        (images / "bad.png").write_bytes(b"nothing")
        Image.new("RGB", (40, 20), (255, 0, 0)).save(images / "late.png")
        until(lambda: len(_lines(out)) == 4, "a fourth answer")
    finally:
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, errors
    assert "Traceback" not in errors
    assert "4 frames, " in said
    assert "bad.png: cannot be read as an image" in said
    lines = {line["image"]: line for line in _lines(out)}
    assert [len(lines[f"{name}.png"]["found"]) for name in ("a", "b", "c", "late")] == [1, 0, 0, 1]
    assert lines["late.png"]["found"][0]["prompt"] == "red"
    assert (out / "late.png.png").is_file()


def _start(folder: Path, images: Path, out: Path, *words: object) -> subprocess.Popen[str]:
    """The loop over a folder, in a process of its own."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "app.deploy.runtime", folder, "--loop", "--input", images),
            *("--output", out, *words),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_camera(run, folder: Path, tmp_path: Path) -> None:
    """A film in its place, to its end, and for a few frames."""
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 5, (40, 20))
    for color in COLORS.values():
        writer.write(np.full((20, 40, 3), color[::-1], dtype=np.uint8))
    writer.release()
    out = tmp_path / "out"
    words = (folder, "--input", f"camera:{film}", "--loop", "--prompt", "red", "--prompt", "blue")
    done = run(*words, "--output", out)
    assert done.code == 0, done.err
    assert "3 frames, " in done.out
    assert [[f["prompt"] for f in line["found"]] for line in _lines(out)] == [["red"], [], ["blue"]]
    assert "1 frames, " in run(*words, "--frames", 1).out
    assert "is not empty. Replace it with --overwrite" in run(*words, "--output", out).err
    assert run(*words, "--output", out, "--overwrite", "--frames", 2).code == 0
    assert len(_lines(out)) == 2
    assert (
        "csv: is written when all is done"
        in run(*words, "--output", tmp_path / "csv", "--save", "csv").err
    )


def test_sources_that_are_not_there(run, folder: Path, tmp_path, monkeypatch) -> None:
    loop = (folder, "--loop", "--prompt", "red", "--input")
    assert "OpenCV finds no such camera" in run(*loop, f"camera:{tmp_path}/no.avi").err
    assert "--loop takes a folder, or camera:0" in run(*loop, tmp_path / "no").err
    monkeypatch.setitem(sys.modules, "cv2", None)
    done = run(*loop, "camera:0")
    assert done.code == 2
    assert "pip install opencv-python-headless" in done.err


def test_a_stop_by_the_system(folder: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(folder, images, out)
    try:
        until(lambda: (out / LINES).is_file() and len(_lines(out)) == 3, "three answers")
    finally:
        process.terminate()
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert "3 frames, " in said


def test_figures_of_frames() -> None:
    speed = Speed()
    assert str(speed) == "0 frames"
    for model in (0.010, 0.010, 0.070):
        speed.add(0.05, {"pre": 0.004, "model": model, "post": 0.002})
    said = "3 frames, 20.0 a second; ms, mean (median): pre 4.0 (4.0), model 30.0 (10.0), post 2.0"
    assert str(speed).startswith(said)


def test_films_are_followed(run, folder: Path, tmp_path: Path) -> None:
    """As infer.sh follows them, without torch."""
    frames = [[("red", 8 + 2 * n, 20), ("green", 120 - 2 * n, 60)] for n in range(8)]
    film = squares(tmp_path / "film.mp4", frames)
    words = (folder, "--input", film, "--prompt", "red", "--prompt", "green", "--threshold", 0.2)
    done = run(*words, "--output", tmp_path / "out", "--save", "coco,mot,video", "--every", 2)
    assert done.code == 0, done.err
    read = read_films(tmp_path / "out" / "tracks.json")
    assert len(read.films[1]) == 4
    with av.open(str(tmp_path / "out" / "tracks.mp4")) as file:
        assert len(list(file.decode(video=0))) == 4
    done = run(*words, "--output", tmp_path / "x", "--from", "soon")
    assert done.code == 2
    assert "--from soon: give seconds" in done.err
