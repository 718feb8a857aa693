"""infer.sh's work: files in, overlays and one predictions.json out."""

from __future__ import annotations

import csv
import fcntl
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools import mask as mask_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app.datasets.synthetic.shapes import make_shapes
from app.inference import folder as folder_module
from app.inference.outputs import PER_IMAGE
from app.inference.settings import SAVES
from app.inference.tables import TABLES
from app.model import weights
from tests.helpers import PATIENCE, PEAK, REPOSITORY, until


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _results(folder: Path) -> list[dict]:
    return json.loads((folder / "predictions.json").read_text())


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
    assert _visible(out) == ["a.png", "b.png", "predictions.json", "ä.png"]
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
    assert "--prompt was circle,dog, now cat" in again.err
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


def test_images_of_one_name_are_told_apart(command, tiny_run, tmp_path) -> None:
    """By their paths from what --input names, in every output."""
    for cam in ("cam1", "cam2"):
        (tmp_path / "in" / cam).mkdir(parents=True)
        Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "in" / cam / "0000.jpg")
    out = tmp_path / "out"
    done = command(
        *("infer", "--checkpoint", tiny_run / "weights/best", "--input", tmp_path / "in/**/*.jpg"),
        *("--prompt", "circle", "--threshold", 0, "--max-detections", 2, "--output-dir", out),
        *("--save", "coco,csv,yolo,overlay,cutouts,geojson"),
    )
    assert done.code == 0, done.err
    names = ["cam1/0000.jpg"] * 2 + ["cam2/0000.jpg"] * 2
    assert [(r["file_name"], r["image_id"]) for r in _results(out)] == list(
        zip(names, [1, 1, 2, 2], strict=True)
    )
    with (out / "predictions.csv").open(newline="") as file:
        rows = [(row["file_name"], row["image_id"]) for row in csv.DictReader(file)]
    assert rows == list(zip(names, "1122", strict=True))
    for cam in ("cam1", "cam2"):
        for file in (f"labels/{cam}/0000.txt", f"{cam}/0000.png", f"geojson/{cam}/0000.geojson"):
            assert (out / file).is_file()
        assert (out / "cutouts" / cam / "0000").is_dir()


def test_two_results_of_one_name_are_refused(command, tiny_run, tmp_path) -> None:
    (tmp_path / "in" / "semantic").mkdir(parents=True)
    for name in ("a.png", "semantic/a.png"):
        Image.new("RGB", (60, 40)).save(tmp_path / "in" / name)
    done = command(
        *("infer", "--checkpoint", tiny_run / "weights/best", "--input", tmp_path / "in/**/*.png"),
        *("--save", "overlay,semantic", "--output-dir", tmp_path / "out"),
    )
    assert done.code == 2
    assert "two images would both leave semantic/a.png" in done.err


def test_a_second_run_into_the_folder_of_the_images(command, tiny_run, tmp_path) -> None:
    """Takes no picture for an image that the first has drawn."""
    (tmp_path / "in").mkdir()
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "in" / "a.jpg")
    words = ("infer", "--checkpoint", tiny_run / "weights/best", "--input", tmp_path / "in")
    words = (*words, "--prompt", "circle", "--output-dir", tmp_path / "in")
    assert command(*words).code == 0
    assert (tmp_path / "in" / "a.png").is_file()
    again = command(*words)
    assert again.code == 0, again.err
    assert "1 of 1 image was done before" in again.out
    assert "of an earlier prediction (a.png, …)" in again.out


def test_where_nothing_is_found_the_best_score_is_told(command, tiny_run, images, tmp_path) -> None:
    words = ("infer", "--checkpoint", tiny_run / "weights/best", "--input", images)
    words = (*words, "--prompt", "circle", "--output-dir", tmp_path / "out")
    done = command(*words, "--threshold", 1)
    assert done.code == 0
    assert "3 of 3 images, 0 objects" in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("nothing scores above")]
    shown = re.search(
        r"threshold of 1; the highest score is .* (--threshold \S+ --overwrite)", line
    )
    again = command(*words, *shown[1].split())
    assert again.code == 0, again.err
    assert "3 of 3 images, 0 objects" not in again.out


def test_weights_that_score_nothing_find_nothing(command, tiny_run, images, tmp_path) -> None:
    """A score that is no number fits neither the journal nor a sentence."""
    whole = tiny_run / "weights" / "best" / "model.safetensors"
    state = load_file(whole)
    state["dot_prod_scoring.hs_proj.bias"].fill_(float("nan"))
    with safe_open(whole, "pt") as opened:
        save_file(state, tmp_path / "nan.safetensors", metadata=opened.metadata())
    done = command(
        *("infer", "--checkpoint", tmp_path / "nan.safetensors", "--input", images),
        *("--prompt", "circle", "--output-dir", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    assert "3 of 3 images, 0 objects" in done.out
    assert "nan" not in done.out.replace(str(tmp_path), "")


def test_what_limits_the_results_is_said(command, tiny_run, images, tmp_path) -> None:
    pages = [Image.new("L", (40, 30), shade) for shade in (10, 200)]
    pages[0].save(images / "scan.tif", save_all=True, append_images=pages[1:])
    done = command(
        *("infer", "--checkpoint", tiny_run / "weights/best", "--input", images),
        *("--prompt", "circle, dog", "--prompt", "cat", "--output-dir", tmp_path / "out"),
        *("--threshold", 0, "--max-detections", 1),
    )
    assert done.code == 0, done.err
    for line in (
        "--prompt 'circle, dog' is one prompt; for several: --prompt 'circle' --prompt 'dog'",
        "2 prompts share --max-detections 1 an image; raise it to find what each names",
        "4 images with as many objects as --max-detections 1 allows: what scores lower is left out",
        "1 image with further pages, which are not read: scan.tif has 2; give each page as a file "
        "of its own",
    ):
        assert line in done.out.splitlines()


@pytest.mark.parametrize("mistake", ["missing", "film", "taken", "unwritable", "labelled"])
def test_mistakes_that_need_no_weights_are_told_before_torch_is_imported(
    tmp_path: Path, images: Path, mistake: str
) -> None:
    command, source, out = "infer", images, tmp_path / "out"
    if mistake == "missing":
        source = tmp_path / "list.txt"
        source.write_text("gone.png\n")
    elif mistake == "film":
        source = tmp_path / "a.mp4"
        source.touch()
    elif mistake == "taken":
        out.mkdir()
        (out / "predictions.json").touch()
    elif mistake == "labelled":
        command = "label"
        out.mkdir()
    else:
        out.touch()
        out = out / "below"
    words = [command, "--checkpoint", REPOSITORY / "app/assets/nano", "--prompt", "circle"]
    words += ["--input", source, "--output-dir", out]
    script = "import sys\nfrom app.__main__ import main\ntry: main()\n" + (
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.splitlines()[-1] == "2 False", done.stderr
    assert done.stderr.startswith("error: ")


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
        (["--negative-box", "1,2,3,4", "--checkpoint", "none"], "Nothing to find"),
        (["--prompt", "x", "--box", "1,2,3"], "four numbers"),
        (["--prompt", "x", "--negative-box", "1,2,3"], "--negative-box 1,2,3: give four numbers"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: no such file"),
        (["--prompt", "x", "--save", "cvs"], "Did you mean 'csv'?"),
        (["--prompt", "x", "--tile", "64", "--box", "1,2,3,4"], "a box lies in one tile"),
        (["--prompt", "x", "--input", "list.txt"], "no such file, folder or glob"),
        (["--prompt", "x", "--box", "1,2,-3,4"], "above 0"),
        (["--prompt", "x", "--checkpoint", "nowhere"], "no such checkpoint"),
        (["--prompt", "x", "--model", "sam3"], "size 'nano', not 'sam3'"),
        (["--prompt", "x", "--device", "tpu"], "auto, cpu or cuda"),
        (["--prompt", "x", "--precision", "fp8"], "auto, fp32, bf16 or fp16"),
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


def test_all_problems_are_said_at_once(command, tiny_run, images, tmp_path) -> None:
    words = ("--checkpoint", tiny_run / "weights/best", "--input", images, "--prompt", "?")
    wrong = ("--box", "1", "--negative-box", "1,1,0,1", "--save", "coco,mp4", "--prompts", "none")
    done = command("infer", *words, *wrong, "--output-dir", tmp_path / "out")
    assert done.code == 2
    assert len(done.err.splitlines()) == 5


def test_without_prompts_the_classes_of_the_weights_are_asked_for(
    command, tiny_run, images, tmp_path
) -> None:
    done = command(
        *("infer", "--checkpoint", tiny_run / "weights/best", "--input", images / "a.png"),
        *("--output-dir", tmp_path / "out", "--threshold", 0),
    )
    assert done.code == 0, done.err
    assert "prompts: circle, rectangle, triangle (the classes of these weights)" in done.out
    assert {r["prompt"] for r in _results(tmp_path / "out")} <= {"circle", "rectangle", "triangle"}


def test_a_prompt_that_may_be_mistyped_is_told_and_asked_for(
    command, tiny_run, images, tmp_path
) -> None:
    """The model takes any words, so that it is a note."""
    words = ("--prompt", "circel", "--prompt", "dog", "--prompt", "triangle", "--threshold", 0)
    done = command(
        *("infer", "--checkpoint", tiny_run / "weights/best", "--input", images / "a.png"),
        *(*words, "--output-dir", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    said = [line for line in done.out.splitlines() if "Did you mean" in line]
    assert said == [
        "note: 'circel' is no class of these weights, which find any words. Did you mean 'circle'?"
    ]
    assert "circel" in {result["prompt"] for result in _results(tmp_path / "out")}


def test_a_negative_box_and_a_prompt_file(command, tiny_run, images, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("circle\ndog\n")
    first = ("infer", "--checkpoint", tiny_run / "weights/best", "--input", images / "b.jpg")
    flags = ("--prompts", tmp_path / "prompts.txt", "--threshold", 0, "--box", "5,5,20,20")
    scores = []
    for name, words in (("one", ()), ("two", ("--negative-box", "30,5,20,20"))):
        done = command(*first, *flags, *words, "--output-dir", tmp_path / name)
        assert done.code == 0, done.err
        assert {r["prompt"] for r in _results(tmp_path / name)} == {"circle", "dog"}
        scores.append([r["score"] for r in _results(tmp_path / name)])
    assert not np.allclose(*scores, atol=1e-5)


@pytest.fixture
def words(tiny_run: Path, images: Path, tmp_path: Path) -> list[object]:
    """Of a prediction that finds five objects an image."""
    return [
        *("infer", "--checkpoint", tiny_run / "weights/best", "--input", images),
        *("--output-dir", tmp_path / "out", "--prompt", "circle", "--prompt", "dog"),
        *("--threshold", 0, "--max-detections", 5, "--save", "coco,csv,geojson"),
    ]


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "geojson").iterdir()}


def test_a_stopped_run_goes_on_where_it_stopped(command, words, images, tmp_path) -> None:
    out = tmp_path / "out"
    assert command(*words).code == 0
    whole, first = _results(out), _times(out)

    lines = (out / ".predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    (out / ".predictions.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])  # as a kill does
    (out / "predictions.json").unlink()
    done = command(*words)
    assert done.code == 0, done.err
    assert "1 of 3 images were done before" in done.out
    assert _results(out) == whole
    assert [name for name, time in _times(out).items() if time == first[name]] == ["a.geojson"]

    (out / ".predictions.jsonl").write_bytes(b"".join(lines[:2]))  # killed in its first batch
    assert command(*words).code == 0
    assert _results(out) == whole

    Image.new("RGB", (30, 30)).save(images / "0.png")  # one is added, one changes
    Image.new("RGB", (30, 30)).save(images / "b.jpg")
    done = command(*words)
    assert "2 of 4 images were done before" in done.out
    results = _results(out)
    assert [(r["file_name"], r["image_id"]) for r in results[::5]] == [
        *(("0.png", 1), ("a.png", 2), ("b.jpg", 3), ("ä.JPG", 4)),
    ]
    assert results[5:10] == [r | {"image_id": 2} for r in whole[:5]]
    assert results[10:15] != [r | {"image_id": 3} for r in whole[5:10]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--threshold", "0.3"], "--threshold was 0.0, now 0.3"),
        (["--save", "yolo"], "--save was geojson,coco,csv, now yolo,geojson,coco,csv"),
        (
            ["--nms", "0.7", "--tile", "64"],
            "--nms was not given, now 0.7; --tile was not given, now 64",
        ),
    ],
)
def test_other_settings_are_refused_unless_overwritten(
    command, words, tmp_path, changes, said
) -> None:
    assert command(*words).code == 0
    before = _times(tmp_path / "out")
    done = command(*words, *changes)
    assert done.code == 2
    assert said in done.err
    assert _times(tmp_path / "out") == before
    again = command(*words, *changes, "--overwrite")
    assert again.code == 0, again.err
    assert "done before" not in again.out


def test_what_others_wrote_is_not_overwritten(command, words, images, tmp_path) -> None:
    theirs = tmp_path / "out" / "geojson" / "b.geojson"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    done = command(*words)
    assert done.code == 2
    assert "holds geojson/b.geojson already" in done.err
    assert theirs.read_text() == "mine"
    assert command(*words, "--overwrite").code == 0
    assert theirs.read_text() != "mine"

    before = (images / "a.png").read_bytes()
    onto = command(*words, "--save", "overlay", "--output-dir", images, "--overwrite")
    assert onto.code == 2
    assert "a.png is an input image" in onto.err
    assert (images / "a.png").read_bytes() == before


def _bytes(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_images_are_refused_unless_overwritten(
    command, words, images, tmp_path, monkeypatch
) -> None:
    """Of another folder, and of one that has the same relative path elsewhere."""
    for place in ("here", "there"):
        (tmp_path / place / "in").mkdir(parents=True)
        Image.effect_noise((50, 40), 90).save(tmp_path / place / "in" / "b.png")
    monkeypatch.chdir(tmp_path / "here")
    assert command(*words, "--input", "in").code == 0
    before = _bytes(tmp_path / "out")
    for place, source in (("here", images), ("there", "in")):
        monkeypatch.chdir(tmp_path / place)
        done = command(*words, "--input", source)
        assert done.code == 2
        assert f"holds results of {tmp_path}/here/in/b.png, not of these images" in done.err
        assert "--overwrite, or name another folder" in done.err
        assert _bytes(tmp_path / "out") == before
    assert command(*words, "--overwrite").code == 0
    assert {r["file_name"] for r in _results(tmp_path / "out")} == {"a.png", "b.jpg", "ä.JPG"}


def test_a_file_that_no_run_made_is_in_the_way_of_a_new_image(
    command, words, images, tmp_path
) -> None:
    assert command(*words).code == 0
    Image.new("RGB", (30, 30)).save(images / "new.png")
    theirs = tmp_path / "out" / "geojson" / "new.geojson"
    theirs.write_text("mine")
    before = _bytes(tmp_path / "out")
    done = command(*words)
    assert done.code == 2
    assert done.err.count("already") == 1
    assert "holds geojson/new.geojson already" in done.err
    assert _bytes(tmp_path / "out") == before
    theirs.unlink()
    done = command(*words)
    assert done.code == 0, done.err
    assert "3 of 4 images were done before" in done.out


@pytest.fixture
def seeing(tmp_path: Path) -> list[object]:
    """Of a prediction that finds circles, in masks that overlap, in the images of `set`."""
    make_shapes(tmp_path / "set", train=3, valid=0, fog=0, width=120, height=80)
    (folder,) = {path.parent for path in (tmp_path / "set").rglob("*.png")}
    folder.rename(tmp_path / "seen")
    return [
        *("infer", "--checkpoint", REPOSITORY / "app" / "assets" / "nano", "--threshold", 0),
        *("--input", tmp_path / "seen", "--output-dir", tmp_path / "out", "--max-detections", 5),
        *("--prompt", "circle", "--prompt", "rectangle"),
    ]


def test_all_kinds_of_output_at_once(command, seeing, tmp_path) -> None:
    out = tmp_path / "out"
    kinds = "overlay,coco,yolo,instances,semantic,cutouts,geojson,csv"
    assert set(kinds.split(",")) == set(SAVES)
    done = command(*seeing, "--save", kinds)
    assert done.code == 0, done.err
    names = [path.stem for path in (tmp_path / "seen").glob("*.png")]
    files = {output.path.format(name) for output in PER_IMAGE.values() for name in names}
    files |= {path for path, _ in TABLES.values()}
    files -= {f"cutouts/{name}" for name in names}
    written = {str(path.relative_to(out)) for path in _bytes(out)} - {".predictions.jsonl"}
    cutouts = {path for path in written if path.startswith("cutouts/")}
    assert len(names) == 3
    assert written - cutouts == files
    for name in names:
        found = [r for r in _results(out) if r["file_name"] == f"{name}.png"]
        masks = [mask_utils.decode(r["segmentation"]).astype(bool) for r in found]
        assert len(found) == 5
        assert np.any(masks)
        features = json.loads((out / f"geojson/{name}.geojson").read_text())["features"]
        assert [f["properties"]["score"] for f in features] == [r["score"] for r in found]
        lines = (out / f"labels/{name}.txt").read_text().splitlines()
        assert [int(line.split()[0]) + 1 for line in lines] == [r["category_id"] for r in found]
        for kind in ("instances", "semantic"):
            painted = np.array(Image.open(out / f"{kind}/{name}.png"))
            assert np.array_equal(painted > 0, np.any(masks, axis=0))
        assert sum(Path(path).parent.name == name for path in cutouts) == sum(map(np.any, masks))


def test_a_turned_photograph_is_seen_upright(command, seeing, tmp_path) -> None:
    first, *others = sorted((tmp_path / "seen").iterdir())
    for path in others:
        path.unlink()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera lay on its side: turn it by 90 degrees
    stored = Image.open(first).convert("RGB").transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "seen" / "turned.png", exif=exif)
    stored.save(tmp_path / "seen" / "stored.png")
    done = command(*seeing, "--save", "coco,overlay")
    assert done.code == 0, done.err
    found: dict[str, list[object]] = {}
    for result in _results(tmp_path / "out"):
        seen = result["bbox"], result["segmentation"]
        found.setdefault(result["file_name"], []).append(seen)
    assert [mask["size"] for _, mask in found["turned.png"]] == [[80, 120]] * 5
    assert found["turned.png"] == found[first.name]
    assert found["turned.png"] != found["stored.png"]
    assert Image.open(tmp_path / "out" / "turned.png").size == (120, 80)


def test_a_folder_that_cannot_be_written(command, words, tmp_path) -> None:
    (tmp_path / "file").touch()
    done = command(*words, "--output-dir", tmp_path / "file")
    assert done.code == 2
    assert "cannot be written" in done.err


def test_two_runs_do_not_share_a_folder(command, words, tmp_path) -> None:
    assert command(*words).code == 0
    with (tmp_path / "out" / ".predictions.jsonl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = command(*words)
    assert done.code == 2
    assert "another run is at work here" in done.err


def test_batches_find_the_same(command, words, images, tmp_path) -> None:
    (images / "cut.png").write_bytes(b"\x89PNG")
    assert command(*words).code == 3
    done = command(*words, "--output-dir", tmp_path / "batched", "--batch-size", 3)
    assert done.code == 3
    assert done.out.count("failed: ") == 1
    for one, other in zip(_results(tmp_path / "out"), _results(tmp_path / "batched"), strict=True):
        assert one["file_name"] == other["file_name"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_a_box_outside_one_image_costs_only_that(command, words, images, tmp_path) -> None:
    Image.new("RGB", (200, 200)).save(images / "large.png")
    done = command(*words, "--box", "150,150,20,20", "--batch-size", 4)
    assert done.code == 3
    assert done.out.count("covers nothing of an image") == 3
    assert "a.png: --box 150,150,20,20" in done.out
    assert {r["file_name"] for r in _results(tmp_path / "out")} == {"large.png"}


@pytest.mark.system
def test_several_processes_share_the_images(command, words, images, tmp_path) -> None:
    (images / "cut.png").write_bytes(b"\x89PNG")
    assert command(*words, "--device", "cpu").code == 3
    shared = ("--output-dir", tmp_path / "shared", "--num-gpus", 2, "--device", "cpu")
    done = command(*words, *shared)
    assert done.code == 3, done.err
    assert "3 of 4 images, 15 objects" in done.out
    assert "cut.png: cannot be read" in done.out
    assert _results(tmp_path / "shared") == _results(tmp_path / "out")
    nowhere = command(*words, *shared, "--overwrite", "--checkpoint", "none", "--resolution", 100)
    assert nowhere.code == 2
    assert "96 or 104" in nowhere.err


def test_more_processes_than_gpus(command, words, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    done = command(*words, "--num-gpus", 2)
    assert done.code == 2
    assert "--num-gpus 2: this machine has 1" in done.err


def test_tiles_of_a_large_image(command, words, tmp_path) -> None:
    """In one tile that is as large as the image the same is found; in several, more."""
    Image.effect_noise((150, 100), 90).convert("RGB").save(tmp_path / "large.png")
    asked = [*words, "--input", tmp_path / "large.png"]
    found = {}
    for name, flags in {"out": (), "1": ("--tile", 150), "6": ("--tile", 64)}.items():
        done = command(*asked, *flags, "--output-dir", tmp_path / name)
        assert done.code == 0, done.err
        found[name] = _results(tmp_path / name)
        for result in found[name]:
            assert result["segmentation"]["size"] == [100, 150]
    assert found["1"] == found["out"]
    assert max(r["bbox"][0] for r in found["6"]) > 64


def test_suppression_leaves_one_of_each(command, seeing, tmp_path) -> None:
    few = command(*seeing, "--nms", 0, "--output-dir", tmp_path / "few")
    assert few.code == 0, few.err
    assert command(*seeing, "--nms", 1).code == 0
    overlapping: dict[str, list[bool]] = {"out": [], "few": []}
    for folder in (tmp_path / "out", tmp_path / "few"):
        for name in {r["file_name"] for r in _results(folder)}:
            masks = [r["segmentation"] for r in _results(folder) if r["file_name"] == name]
            overlaps = mask_utils.iou(masks, masks, [0] * len(masks))
            overlapping[folder.name].append(bool((np.triu(overlaps, 1) > 0).any()))
    assert any(overlapping["out"])
    assert not any(overlapping["few"])


def test_sigterm_ends_a_run_as_an_exit_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, folder_module.ended_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_thousand_images_take_no_more_memory_than_the_first(tmp_path: Path) -> None:
    """Stopped after the first hundred, it goes on from there, with the same peak as until there."""
    shown = tmp_path / "shown.png"  # 90 kB each, if it were kept, and as much again of masks
    Image.effect_noise((200, 150), 90).convert("RGB").save(shown)
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for index in range(1000):
        (images / f"{index:04d}.png").symlink_to(shown)
    words = [
        *(sys.executable, "-c", PEAK, sys.executable, "-m", "app", "infer", "--save", "coco"),
        *("--checkpoint", REPOSITORY / "app" / "assets" / "nano", "--resolution", 64),
        *("--input", images, "--output-dir", out, "--prompt", "circle", "--batch-size", 8),
        *("--threshold", 0, "--max-detections", 5, "--device", "cpu"),
    ]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            list(map(str, words)), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )

    def journal() -> list[str]:
        file = out / ".predictions.jsonl"
        return file.read_text().splitlines() if file.is_file() else []

    stopped = start()
    until(lambda: len(journal()) > 100, "a hundred images")
    (process,) = psutil.Process(stopped.pid).children()
    process.terminate()
    said, _ = stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode == 143
    first, done = int(said.split()[-1]), journal()
    assert 100 < len(done) < 500

    rest = start()
    said, _ = rest.communicate(timeout=PATIENCE)
    assert rest.returncode == 0
    assert f"{len(done) - 2} of 1000 images were done before" in said
    assert journal()[: len(done)] == done  # settings, files, and an image a line
    found = Counter(result["file_name"] for result in _results(out))
    assert found == {f"{index:04d}.png": 5 for index in range(1000)}
    assert int(said.split()[-1]) < first + 30e6


def test_the_weights_own_threshold(command, tiny_run: Path, images: Path, tmp_path: Path) -> None:
    """Used where none is given, said, and 0.5 for weights without one."""
    state = load_file(tiny_run / "weights" / "best" / "model.safetensors")
    header = weights.read_header(tiny_run / "weights" / "best")
    assert header is not None
    found = {}
    for name, threshold, words in (
        ("own", 0.0, ()),
        ("none", None, ()),
        ("given", 0.0, ("--threshold", 1)),
    ):
        content = header.model_copy(update={"threshold": threshold}).model_dump_json()
        file = tmp_path / f"{name}.safetensors"
        save_file(state, file, metadata={"sam3-finetuning": content})
        done = command(
            *("infer", "--checkpoint", file, "--input", images / "a.png", "--prompt", "circle"),
            *("--output-dir", tmp_path / name, *words),
        )
        assert done.code == 0, done.err
        said = [line for line in done.out.splitlines() if line.startswith("threshold: ")]
        results = json.loads((tmp_path / name / "predictions.json").read_text())
        found[name] = said, len(results), min([r["score"] for r in results], default=1.0)
    said = ["threshold: 0.000, the best on the validation images (--threshold decides by hand)"]
    assert found["own"][:2] == (said, header.model.num_queries)
    assert found["none"][0] == ["threshold: 0.5 (--threshold decides by hand)"]
    assert found["none"][2] > 0.5
    assert found["given"][:2] == ([], 0)
