"""A run's folder that was spoiled ends in a message, not in a traceback, whatever reads it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.evaluation import record
from app.evaluation.run_files import read_rows, read_run
from tests.helpers import Command, Result, metrics_rows

RESULTS, TRUTH = "predictions/valid.json", "predictions/valid_truth.json"
FILES = ("metrics.csv", "metrics.json", "config_resolved.yaml", "environment.json", RESULTS, TRUTH)
UNSENT = ("checkpoints", "tensorboard", "weights", "plots", "*.html")  # which need not be copied


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run that a test may spoil."""
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns(*UNSENT))


def _commands(command: Command, run: Path, sound: Path) -> dict[str, Result]:
    """What each command says that reads a run; `track` sends nothing."""
    return {
        "report": command("report", run),
        "compare": command("compare", sound, run),
        "track": command("track", run, "--mlflow=none"),
    }


def _refused(done: Result, file: Path) -> None:
    assert done.code == 2, done.out + done.err
    lines = done.err.splitlines()
    assert str(file) in lines[0]
    assert all(line.startswith(("error: ", "  ")) for line in lines)


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
    """What would be another if a file were written, or made."""
    return {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")}


def _to_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _to_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(__file__)


def _to_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _cut(file: Path) -> None:
    """Cut within the last value."""
    content, is_table = file.read_text(), file.suffix == ".csv"
    file.write_text(content[: content.rindex("," if is_table else ":") + 1] + "[")


SPOILS: dict[str, Callable[[Path], object]] = {
    "cut off": _cut,
    "a list": lambda file: file.write_text("[1, [2]]\n[1]"),
    "a number": lambda file: file.write_text("7\n7"),
    "no UTF-8": lambda file: file.write_bytes(b"\xff\xfe\x00{"),
    "nested": lambda file: file.write_text("[" * 100_000 + ",\n" + "]" * 100_000),
    "huge": lambda file: os.truncate(file, 5 << 30),
    "a folder": _to_folder,
    "a link": _to_link,
    "a pipe": _to_pipe,
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", FILES)
def test_a_spoiled_file_is_told(
    command: Command, run: Path, tiny_run: Path, name: str, spoil: str
) -> None:
    SPOILS[spoil](run / name)
    before = _state(run.parent)
    said = _commands(command, run, tiny_run)
    for reader, done in said.items():
        # predictions are sent as they are
        if reader != "track" or name not in (RESULTS, TRUTH) or spoil in ("a link", "a pipe"):
            _refused(done, run / name)
    assert _state(run.parent) == before


@pytest.mark.parametrize("name", ["train.log", "plots", "predictions", "weights/best"])
def test_no_link_is_sent(command: Command, run: Path, name: str) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    if (run / name).exists():
        (run / name).rename(run / "aside")
    (run / name).symlink_to(run.parent)
    _refused(command("track", run, "--mlflow=none"), run / name)
    (run / name).unlink()
    (run / "plots").mkdir(exist_ok=True)
    (run / "plots" / "a.png").symlink_to("/etc/hostname")
    _refused(command("track", run, "--mlflow=none"), run / "plots" / "a.png")


def _change(file: Path, change: Callable[[Any], object]) -> None:
    is_yaml = file.suffix == ".yaml"
    content = yaml.safe_load(file.read_text()) if is_yaml else json.loads(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content) if is_yaml else json.dumps(content))


def _set(*path: Any) -> Callable[[Any], object]:
    """Return what sets the value at the end of a path of keys."""
    *way, key, value = path

    def change(content: Any) -> None:
        for step in way:
            content = content[step]
        content[key] = value

    return change


A_MASK = {"size": [64, 96], "counts": "????"}
BROKEN: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a figure that is none": ("metrics.json", _set("bbox/AP", float("nan"))),
    "a figure as text": ("metrics.json", _set("calibration/threshold", "0.5")),
    "a number of many digits": ("metrics.json", _set("epochs", 10**30)),
    "a model that is a list": ("config_resolved.yaml", _set("model", [1])),
    "a size that is a mapping": ("config_resolved.yaml", _set("model", "name", {"a": 1})),
    "a source that is a list": ("config_resolved.yaml", _set("dataset", "dir", ["a"])),
    "hashes that are none": ("environment.json", _set("data", {"train": {"images": "4"}})),
    "packages that are a list": ("environment.json", _set("packages", ["torch"])),
    "a command that is text": ("environment.json", _set("command", "train")),
    "no images": (TRUTH, _set("images", [])),
    "no classes": (TRUTH, _set("categories", [])),
    "annotations that are an object": (TRUTH, _set("annotations", {})),
    "a width as text": (TRUTH, _set("images", 0, "width", "96")),
    "an enormous side": (TRUTH, _set("images", 0, "height", 10**9)),
    "two images of one id": (TRUTH, _set("images", 0, "id", 2)),
    "an image that is not there": (TRUTH, _set("annotations", 0, "image_id", 99)),
    "a class that is not there": (TRUTH, _set("annotations", 0, "category_id", 99)),
    "a box that is none": (TRUTH, _set("annotations", 0, "bbox", [1, 2, 3])),
    "a box of no number": (TRUTH, _set("annotations", 0, "bbox", [1, 2, 3, float("nan")])),
    "a box inside out": (TRUTH, _set("annotations", 0, "bbox", [1, 2, 3, -4])),
    "a damaged mask": (TRUTH, _set("annotations", 0, "segmentation", A_MASK)),
    "levels that are none": (TRUTH, _set("images", 0, "levels", [0, float("inf")])),
    "a name that is none": (TRUTH, _set("categories", 0, "name", None)),
    "half a character": (TRUTH, _set("categories", 0, "name", "\ud800")),
    "a result of no class": (RESULTS, _set(0, "category_id", 99)),
    "a score of no number": (RESULTS, _set(0, "score", float("nan"))),
    "a result that is none": (RESULTS, _set(0, 7)),
    "a result's damaged mask": (RESULTS, _set(0, "segmentation", A_MASK)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_value_that_is_none_is_told(
    command: Command, run: Path, tiny_run: Path, kind: str
) -> None:
    name, change = BROKEN[kind]
    _change(run / name, change)
    before = _state(run.parent)
    said = _commands(command, run, tiny_run)
    for reader in ("report", "compare", *([] if "predictions" in name else ["track"])):
        _refused(said[reader], run / name)
    assert _state(run.parent) == before


@pytest.mark.parametrize("table", ["loss\n1", "epoch,loss\n1,x", "epoch\n1,2", "epoch,a\n1,nan"])
def test_a_table_with_what_is_no_number_is_told(
    command: Command, run: Path, tiny_run: Path, table: str
) -> None:
    (run / "metrics.csv").write_text(table)
    for done in _commands(command, run, tiny_run).values():
        _refused(done, run / "metrics.csv")


def test_every_problem_is_told_at_once(command: Command, run: Path, tiny_run: Path) -> None:
    for name in FILES[:4]:
        (run / name).write_text("7")
    done = command("report", run)
    assert done.code == 2
    assert [name for name in FILES[:4] if name not in done.err] == ["metrics.csv"]  # a header
    (run / "metrics.csv").write_text("7\n7")
    assert all(name in command("report", run).err for name in FILES[:4])


def test_what_only_cannot_be_drawn_is_passed_over(command: Command, run: Path) -> None:
    """Images that are gone, names that are none, boxes far outside: each costs its picture."""
    _change(run / TRUTH, _set("images", 0, "file_name", "a\0.png"))
    _change(run / TRUTH, _set("images", 1, "file_name", "\udcff.png"))  # a name of bytes
    _change(run / RESULTS, _set(0, "bbox", [-1e11, 1e11, 1e11, 0]))
    done = command("report", run)
    assert done.code == 0, done.err
    assert (run / "report.html").is_file()


def test_a_box_far_outside_is_drawn(command: Command, run: Path) -> None:
    _change(run / RESULTS, lambda results: [r.update(bbox=[0, 0, 1e11, 1e11]) for r in results])
    _change(run / RESULTS, lambda results: [r.pop("segmentation") for r in results])
    _change(run / "metrics.json", _set("calibration/threshold", 0.0))
    assert command("report", run).code == 0


def test_what_a_tracker_needs(command: Command, run: Path) -> None:
    _change(run / "metrics.json", lambda figures: figures.pop("epochs"))
    _refused(command("track", run, "--mlflow=none"), run / "metrics.json")
    _change(run / "config_resolved.yaml", _set("evaluation", "metric", "bbox/APP"))
    done = command("track", run, "--mlflow=none")
    assert "evaluation.metric=bbox/APP: validation gives no such figure" in done.err


def test_a_sound_run_is_read_as_it_was_written(tiny_run: Path) -> None:
    files = read_run(tiny_run)
    assert files.figures == json.loads((tiny_run / "metrics.json").read_text())
    written = [{k: float(v) for k, v in row.items() if v} for row in metrics_rows(tiny_run)]
    assert files.rows == written
    assert files.settings.model is not None
    assert files.settings.model.name == "nano"
    assert files.all_settings == yaml.safe_load((tiny_run / "config_resolved.yaml").read_text())
    environment = json.loads((tiny_run / "environment.json").read_text())
    assert files.environment.command == environment["command"]
    assert files.environment.data["valid"].sha256 == environment["data"]["valid"]["sha256"]
    read = record.read(tiny_run)
    assert read.truth.to_json() == json.loads((tiny_run / TRUTH).read_text())
    assert read.results == json.loads((tiny_run / RESULTS).read_text())


def test_a_loss_that_grew_without_bound_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,train/loss\n1,6.2e32\n")
    assert read_rows(tmp_path) == [{"epoch": 1, "train/loss": 6.2e32}]
