"""infer.sh's work: files in, overlays and one predictions.json out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in put"
    folder.mkdir()
    for name, size in (("b.jpg", (60, 40)), ("a.png", (40, 60)), ("ä.JPG", (50, 50))):
        Image.effect_noise(size, 90).convert("RGB").save(folder / name)
    (folder / "notes.txt").touch()
    return folder


def test_a_folder_gives_overlays_and_one_json(command, tiny_run, images, tmp_path) -> None:
    out = tmp_path / "out"
    words = ("--checkpoint", tiny_run / "weights/best", "--input", images, "--output-dir", out)
    done = command("infer", *words, "--prompt", "circle", "--prompt", "dog", "--threshold", 0)
    assert done.code == 0, done.err
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.png", "predictions.json", "ä.png"]
    sizes = {"a.png": (40, 60), "b.jpg": (60, 40), "ä.JPG": (50, 50)}
    results = json.loads((out / "predictions.json").read_text())
    assert {r["file_name"] for r in results} == set(sizes)
    assert {r["prompt"]: r["category_id"] for r in results} == {"circle": 1, "dog": 2}
    for result in results:
        width, height = sizes[result["file_name"]]
        assert mask_utils.decode(result["segmentation"]).shape == (height, width)
        x, y, w, h = result["bbox"]
        assert 0 <= x <= x + w <= width + 1e-3
        assert 0 <= y <= y + h <= height + 1e-3
    assert Image.open(out / "b.png").size == (60, 40)

    before = {p.name: p.read_bytes() for p in out.iterdir()}
    again = command("infer", *words, "--prompt", "cat")
    assert again.code == 2
    assert "--overwrite" in again.err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert command("infer", *words, "--prompt", "cat", "--overwrite").code == 0


def test_a_box_prompt_changes_what_is_found(command, tiny_run, images, tmp_path) -> None:
    found = []
    for name, words in (("w", []), ("b", ["--box", "5,5,20,20"])):
        done = command(
            *("infer", "--checkpoint", tiny_run / "weights/best", "--input", images / "b.jpg"),
            *("--output-dir", tmp_path / name, "--prompt", "circle", "--threshold", 0, *words),
        )
        assert done.code == 0, done.err
        found.append(json.loads((tmp_path / name / "predictions.json").read_text()))
    scores = [[r["score"] for r in results] for results in found]
    assert not np.allclose(*scores, atol=1e-4)


def test_one_bad_image_costs_only_itself(command, tiny_run, images, tmp_path) -> None:
    (images / "cut.jpg").write_bytes((images / "b.jpg").read_bytes()[:400])
    words = ("--checkpoint", tiny_run / "weights/best", "--input", images, "--prompt", "circle")
    done = command("infer", *words, "--output-dir", tmp_path / "out")
    assert done.code == 3
    assert "cut.jpg: cannot be read as an image" in done.out
    assert "3 of 4 images" in done.out
    assert (tmp_path / "out" / "predictions.json").is_file()


def test_random_weights_and_limits(command, images, tmp_path) -> None:
    words = ("--checkpoint", "none", "--input", images / "a.png", "--prompt", "x")
    flags = ("--resolution", 64, "--threshold", 0, "--max-detections", 3, "--device", "cpu")
    done = command("infer", *words, *flags, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", " "], "no words"),
        ([], "Nothing to find"),
        (["--prompt", "x", "--box", "1,2,3"], "four numbers"),
        (["--prompt", "x", "--box", "1,2,-3,4"], "above 0"),
        (["--prompt", "x", "--checkpoint", "nowhere"], "no such checkpoint"),
        (["--prompt", "x", "--model", "sam3"], "size 'nano', not 'sam3'"),
        (["--prompt", "x", "--device", "tpu"], "auto, cpu or cuda"),
        (["--prompt", "x", "--precision", "fp8"], "auto, fp32 or bf16"),
        (["--prompt", "x", "--resolution", "100"], "96 or 104"),
        (["--prompt", "x", "--threshold", "2"], "--threshold"),
        (["--prompt", "x", "--treshold", "0.3"], "No such option"),
    ],
)
def test_bad_input(command, tiny_run, images, tmp_path, words, said) -> None:
    first = ["--checkpoint", tiny_run / "weights/best", "--input", images]
    done = command("infer", *first, "--output-dir", tmp_path / "out", *words)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
