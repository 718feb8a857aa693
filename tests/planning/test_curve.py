"""The learning curve's command: ordinary runs, what they came to, and what more would bring."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from app.evaluation.learning_curve import fit
from tests.helpers import MICRO, Command, metrics

WORDS = ("--checkpoint", "none", "evaluation.pictures=0", *MICRO, "training.epochs=1")


@pytest.mark.slow
def test_a_curve(command: Command, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "curve"
    sizes = ("--sizes", "1,4", "--seeds", 2)
    words = ("curve", "--dataset-dir", shapes, *sizes, "--output-dir", out, *WORDS)
    plan = command(*words, "--plan")
    assert plan.code == 0, plan.err
    assert "4 runs" in plan.out
    assert not out.exists()
    done = command(*words)
    assert done.code == 0, done.err
    with (out / "curve.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    cells = [(int(row["images"]), int(row["seed"])) for row in rows]
    assert cells == [(1, 0), (1, 1), (4, 0), (4, 1)]
    values = []
    for row, (size, seed) in zip(rows, cells, strict=True):
        folder = out / f"images{size}-seed{seed}"
        assert float(row["segm/AP"]) == metrics(folder)["segm/AP"]
        values.append(float(row["segm/AP"]))
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["data"]["train"]["images"] == size
        assert f"--limit {size}" in row["again"]
    gain, spread = fit([size for size, _ in cells], values).gain(4, 20)
    assert f"20 more labels: {gain:+.2f} ± {spread:.2f} mask AP (95 %)" in done.out
    assert json.loads((out / "curve.json").read_text())["foretold"]["gain"] == gain
    assert "20 more labels" in (out / "curve.html").read_text()
    again = command(*words)
    assert again.code == 0
    assert "run 1 of 4" not in again.out


def test_what_is_no_curve_is_refused(command: Command, shapes: Path, tmp_path: Path) -> None:
    words = ("curve", "--dataset-dir", shapes, "--output-dir", tmp_path / "curve", *WORDS)
    for sizes, problem in {
        "1,x": "must be numbers of images",
        "0,3": "must be numbers of images",
        "1,9": "there are 4 images to train on",
        "3": "a curve takes two numbers",
    }.items():
        done = command(*words, "--sizes", sizes)
        assert done.code == 2
        assert problem in done.err
    assert not (tmp_path / "curve").exists()
