"""`python -m app evaluate | report | compare`, from the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from app.datasets.synthetic.shapes import make_shapes
from app.errors import UserError
from app.evaluation import record
from app.evaluation.compare import compare
from app.evaluation.record import Record
from app.model.bundled import bundled_nano
from tests.evaluation.examples import BOX, found, truth
from tests.evaluation.test_metrics import NAMES, _oracle
from tests.helpers import SHARED, TINY, Command

BESIDE = (80, 60, 20, 20)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A truth whose images are not there, and results."""
    document = truth((1, 1, BOX), (2, 2, BESIDE)).to_json()
    for image in document["images"]:
        image["file_name"] = image["file_name"].strip("/")
    results = [found(1, 1, BOX, 0.9), found(2, 1, BESIDE, 0.8)]
    (tmp_path / "truth.json").write_text(json.dumps(document))
    (tmp_path / "found.json").write_text(json.dumps(results))
    return tmp_path / "truth.json", tmp_path / "found.json"


def _words(files: tuple[Path, Path], output: Path) -> tuple[Any, ...]:
    return ("evaluate", "--truth", files[0], "--predictions", files[1], "--output-dir", output)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_published_example(command: Command, tmp_path: Path, iou_type: str) -> None:
    """Through the files and our reading of them, equal to pycocotools."""
    folder = SHARED / "coco_val2014_100"
    if not folder.is_dir():
        pytest.skip("../shared/datasets/coco_val2014_100 is not on this machine")
    files = (
        folder / "instances_val2014_100.json",
        folder / f"instances_val2014_fake{iou_type}100_results.json",
    )
    done = command(*_words(files, tmp_path / "out"))
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = _oracle(json.loads(files[0].read_text()), json.loads(files[1].read_text()), iou_type)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert {f"{iou_type}/{name}" for name in NAMES} <= set(figures)


def test_results_from_elsewhere(command: Command, files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert command(*_words(files, output)).code == 0
    figures = json.loads((output / "metrics.json").read_text())
    assert figures["segm/AP50"] == pytest.approx(0.5)
    assert figures["off_prompt/firing"] == pytest.approx(1 / 3)
    with (output / "metrics_by_class.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["class"], row["objects"]) for row in rows] == [("a", "1"), ("b", "1")]
    assert [float(row["segm/AP"]) for row in rows] == pytest.approx([1.0, 0.0])
    assert (output / "report.html").is_file()
    refused = command(*_words(files, output))
    assert (refused.code, "--overwrite" in refused.err) == (2, True)
    assert command(*_words(files, output), "--overwrite").code == 0


def test_an_earlier_evaluation_is_replaced(command: Command, files, tmp_path: Path) -> None:
    """Whatever the files are called: it is the later results that the report shows."""
    output, later = tmp_path / "out", tmp_path / "later.json"
    assert command(*_words(files, output)).code == 0
    results = json.loads(files[1].read_text())
    later.write_text(json.dumps(results[:1]))
    beside = output / "predictions" / "notes_truth.json"
    beside.write_text("of someone else")
    for name in ("later.json", "found.json", "later_truth.json", "found.json", "later.json"):
        renamed = tmp_path / name
        renamed.write_text(json.dumps(results[: 2 if name == "found.json" else 1]))
        assert command(*_words((files[0], renamed), output), "--overwrite").code == 0
        read = record.read(output)
        assert (read.split, len(read.results)) == (
            renamed.stem,
            len(json.loads(renamed.read_text())),
        )
        assert f"split “{renamed.stem}”" in (output / "report.html").read_text()
    left = {file.name for file in (output / "predictions").iterdir()}
    assert left == {"later.json", "later_truth.json", "notes_truth.json"}


def _change(**values: object) -> Callable[[list[dict]], None]:
    return lambda results: results[0].update(values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_change(image_id=99), "[0].image_id is 99: the truth lists no such image"),
        (_change(category_id="a"), "[0].category_id is 'a'"),
        (_change(score=float("nan")), "[0].score is nan"),
        (_change(bbox=[1, 2, 3]), "[0].bbox is [1, 2, 3]"),
        (_change(bbox=None, segmentation=None), "one of them must be there"),
        (_change(segmentation={"size": [1, 1], "counts": "0"}), "the image's size"),
        (_change(segmentation={"size": [100, 120], "counts": "zz"}), "[0].segmentation"),
    ],
)
def test_bad_results(command: Command, files, tmp_path: Path, change, said: str) -> None:
    results = json.loads(files[1].read_text())
    change(results)
    files[1].write_text(json.dumps(results))
    done = command(*_words(files, tmp_path / "out"))
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_bad_words(command: Command, files, tmp_path: Path) -> None:
    for words, said in (
        (("--truth", files[0]), "give both of them"),
        (("--truth", "nowhere", "--predictions", files[1]), "--truth nowhere: no such file"),
        (("--truth", files[0], "--predictions", "nowhere"), "--predictions nowhere: no such file"),
        (("--truth", files[0], "--predictions", files[1], "--checkpoint", "x"), "nothing reads it"),
        (("--truth", files[0], "--predictions", files[0]), "must be a JSON list"),
    ):
        done = command("evaluate", *words, "--output-dir", tmp_path / "out")
        assert (done.code, said in done.err) == (2, True), done.err
    done = command("report", tmp_path / "nowhere")
    assert (done.code, "holds no evaluation" in done.err) == (2, True)


def test_a_box_that_is_missing_is_its_masks(command: Command, files, tmp_path: Path) -> None:
    results = json.loads(files[1].read_text())
    for result in results:
        del result["bbox"]
    files[1].write_text(json.dumps(results))
    assert command(*_words(files, tmp_path / "out")).code == 0
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures["bbox/AP50"] == pytest.approx(0.5)


def test_weights_on_a_split(command: Command, tiny_run: Path, shapes: Path, tmp_path: Path) -> None:
    """The figures of the training."""
    words = ("evaluate", "--checkpoint", tiny_run / "weights/best", "--dataset-dir", shapes)
    fast = ("evaluation.pictures=0", *TINY)
    assert command(*words, "--output-dir", tmp_path / "valid", *fast).code == 0
    figures = json.loads((tmp_path / "valid" / "metrics.json").read_text())
    trained = json.loads((tiny_run / "metrics.json").read_text())
    assert figures == {name: trained[name] for name in figures}
    assert command(*words, "--split", "train", "--output-dir", tmp_path / "train", *fast).code == 0
    assert (tmp_path / "train" / "predictions" / "train.json").is_file()


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of shapes; what is drawn for testing is in no other split."""
    folder = tmp_path_factory.mktemp("splits")
    make_shapes(folder / "set", train=2, valid=2, fog=0, width=160, height=120, seed=1)
    make_shapes(folder / "more", train=3, valid=0, fog=0, width=160, height=120, seed=2)
    (folder / "more" / "train").rename(folder / "set" / "test")
    return folder / "set"


@pytest.mark.parametrize("words", [("evaluate",), ("train", "--eval-only")])
def test_the_test_split_alone_is_scored(
    command: Command, three_splits: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Of its own images and labels, as pycocotools scores the predictions; not of another's."""
    found = {}
    for split in ("test", "valid"):
        done = command(
            *(*words, "--checkpoint", bundled_nano(), "--dataset-dir", three_splits),
            *("--split", split, "--output-dir", tmp_path / split, "evaluation.pictures=0"),
        )
        assert done.code == 0, done.err
        figures = json.loads((tmp_path / split / "metrics.json").read_text())
        results = json.loads((tmp_path / split / "predictions" / f"{split}.json").read_text())
        document = json.loads((three_splits / split / "_annotations.coco.json").read_text())
        assert {r["image_id"] for r in results} == {image["id"] for image in document["images"]}
        for iou_type in ("bbox", "segm"):
            expected = _oracle(document, results, iou_type)
            assert expected[f"{iou_type}/AP"] > 0.1
            ours = {name: figures[name] for name in expected}
            assert ours == pytest.approx(expected, abs=1e-6)
        found[split] = figures
    assert found["test"]["segm/AP"] != pytest.approx(found["valid"]["segm/AP"], abs=1e-3)


@pytest.mark.parametrize("words", [("evaluate",), ("train", "--eval-only")])
def test_a_split_that_is_not_there(command: Command, shapes: Path, tmp_path: Path, words) -> None:
    """Refused before anything is written, with what there is."""
    done = command(
        *(*words, "--checkpoint", bundled_nano(), "--dataset-dir", shapes, "--split", "test"),
        *("--output-dir", tmp_path / "out"),
    )
    assert done.code == 2
    assert "has no test split; there are train and valid" in done.err
    assert not (tmp_path / "out").exists()


def _run(folder: Path, results: list[dict], *labels: Any) -> Path:
    record.write(folder, Record("valid", truth(*labels), results))
    return folder


def test_a_run_against_itself_and_a_better_one(command: Command, tmp_path: Path) -> None:
    labels = [(i, 1, BOX) for i in (1, 2, 3)] + [(i, 2, BESIDE) for i in (1, 2, 3)]
    right = [found(i, c, box, 0.9) for i, c, box in labels]
    one = _run(tmp_path / "one", [r for r in right if r["category_id"] == 1], *labels)
    two = _run(tmp_path / "two", right, *labels)
    same = compare(one, one, resamplings=50)
    assert all(line.difference == 0 and not line.is_sure for line in same.lines)
    lines = {line.name: line for line in compare(one, two, resamplings=50).lines}
    assert (lines["segm/AP"].one, lines["segm/AP"].other) == (pytest.approx(0.5), pytest.approx(1))
    assert lines["segm/AP"].is_sure
    assert lines["segm/AP"].interval == (pytest.approx(0.5), pytest.approx(0.5))
    assert lines["segm/AP/a"].interval == (0.0, 0.0)
    missed = lines["segm/AP/b"]
    assert (missed.one, missed.other) == (0, pytest.approx(1))
    assert missed.interval == (pytest.approx(1), pytest.approx(1))
    for limit in (1, 10, 100):
        recall = lines[f"bbox/AR_{limit}"]
        assert (recall.one, recall.other) == (pytest.approx(0.5), pytest.approx(1))
    assert lines["segm/pmF1"].one == pytest.approx(2 / 3)  # 2 x 3 hits / (3 found + 6 there)
    assert lines["segm/pmF1"].interval == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    for folder, rate in ((one, 1), (two, 2)):
        (folder / "config_resolved.yaml").write_text(f"output_dir: {folder}\noptim: {{lr: {rate}}}")
        (folder / "metrics.json").write_text(json.dumps({"bbox/cgF1": rate / 10}))
    done = command("compare", one, two)
    assert done.code == 0, done.err
    assert "+0.500" in done.out
    lines = done.out.splitlines()
    assert lines[:2] == [f"first: {one}", f"second: {two}"]
    assert lines[-2:] == [
        "settings that differ, of the first and of the second:",
        "  optim.lr: 1, 2",
    ]
    assert "intervals: paired, of 3 images; * leaves out 0" in lines
    assert any(line.startswith("│ box AP ") for line in lines)
    assert "bbox/" not in done.out
    (cg_f1,) = [line for line in lines if "box cgF1" in line]
    assert "0.200" in cg_f1
    same = command("compare", one, one)
    assert "intervals: paired, of 3 images" in same.out.splitlines()
    assert same.out.splitlines()[-1] == "settings: the same in both"


def test_intervals_of_what_is_counted_by_images(tmp_path: Path) -> None:
    """One of three images fires: Student's interval of a mean is wider than the bootstrap's."""
    labels = [(i, 1, BOX) for i in (1, 2, 3)]
    right = [found(i, 1, BOX, 0.9) for i in (1, 2, 3)]
    one = _run(tmp_path / "one", right, *labels)
    two = _run(tmp_path / "two", [*right, found(1, 2, BESIDE, 0.9)], *labels)
    lines = {line.name: line for line in compare(one, two).lines}
    firing = lines["off_prompt/classes"]
    assert (firing.one, firing.other) == (0.0, pytest.approx(1 / 3))
    error = scipy.stats.sem([0, 0, 1])
    assert firing.interval == pytest.approx(scipy.stats.t.interval(0.95, 2, 1 / 3, error))
    assert firing.interval[0] < 0
    assert firing.interval[1] > 1
    assert (lines["segm/IL_MCC"].one, lines["segm/cgF1"].one) == (1.0, 1.0)
    assert lines["segm/cgF1"].other < 1
    assert not lines["segm/cgF1"].is_sure


def test_a_run_that_found_nothing(command: Command, tmp_path: Path) -> None:
    labels = [(i, 1, BOX) for i in (1, 2, 3)]
    empty = _run(tmp_path / "empty", [], *labels)
    one = _run(tmp_path / "one", [found(i, 1, BOX, 0.9) for i in (1, 2, 3)], *labels)
    lines = {line.name: line for line in compare(empty, one, resamplings=50).lines}
    for name in ("bbox/AP", "segm/AP", "segm/AR_100", "segm/AP/a", "segm/pmF1"):
        assert (lines[name].one, lines[name].other) == (0, pytest.approx(1)), name
        assert lines[name].is_sure
    assert "segm/AP/b" not in lines  # there is none to find
    assert all(line.one == line.other == 0 for line in compare(empty, empty).lines)
    done = command("compare", one, empty)
    assert done.code == 0, done.err
    assert "-1.000" in done.out


def test_one_image_with_objects_shows_nothing(tmp_path: Path) -> None:
    """Alone, or beside one that has none: no difference has bounds that leave out 0."""
    for others in ([], [(2, 1, BESIDE, True)]):
        labels = [(1, 1, BOX), *others]
        empty = _run(tmp_path / f"empty-{len(others)}", [], *labels)
        one = _run(tmp_path / f"one-{len(others)}", [found(1, 1, BOX, 0.9)], *labels)
        lines = {line.name: line for line in compare(empty, one).lines}
        for name in ("bbox/AP", "segm/AP", "segm/AP50", "segm/AR_100", "segm/AP/a"):
            assert lines[name].difference == pytest.approx(1)
            assert not lines[name].is_sure


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = _run(tmp_path / "one", [found(1, 1, BOX, 0.9)], (1, 1, BOX))
    other = _run(tmp_path / "other", [found(1, 1, BOX, 0.9)], (1, 1, BESIDE))
    with pytest.raises(UserError, match="different images or labels"):
        compare(one, other)
    with pytest.raises(UserError, match="holds no evaluation"):
        compare(one, tmp_path)
