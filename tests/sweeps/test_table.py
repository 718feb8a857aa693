"""The table of a sweep: means, intervals and ranks by hand and by scipy, from what folders hold."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from scipy import stats

from app.sweeps import page, table
from app.sweeps.plan import Cell, Plan, SweepFile
from app.sweeps.run import ended_file, log_file

FOUND = {  # setting → dataset → AP by seed
    "lr=1": {"a": [0.5, 0.6, 0.7], "b": [0.2, 0.2, 0.2]},
    "lr=2": {"a": [0.4, 0.4, 0.4], "b": [0.3, 0.4, 0.5]},
    "lr=3": {"a": [0.1, 0.1], "b": [0.3, 0.4, 0.5]},
}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    file = SweepFile(keys={"lr": [1, 2, 3]}, seeds=[0, 1, 2], published={"paper, box AP": 0.616})
    made = Plan(tmp_path, (), file, {"a": "dataset.dir=a", "b": "dataset.dir=b"})
    for cell in made.cells():
        values = FOUND[cell.setting][cell.dataset]
        folder = made.run_folder(cell)
        if cell.seed < len(values):
            folder.mkdir(parents=True)
            found = {"bbox/AP": values[cell.seed], "seconds": 10.0, "peak_memory_gb": 1.5}
            (folder / "metrics.json").write_text(json.dumps(found))
            (folder / "metrics.csv").write_text("epoch,bbox/AP\n1,0.1\n2,0.2\n")
    return made


def failed(plan: Plan) -> Cell:
    cell = next(c for c in plan.cells() if c.name == "lr=3/a/seed-2")
    file = ended_file(plan, cell)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"code": 2, "reason": "no <such> thing\nand more"}))
    return cell


def test_means_intervals_and_ranks(plan: Plan) -> None:
    rows = {row.setting: row for row in table.rows(plan, table.outcomes(plan))}
    mean, half = rows["lr=1"].by_dataset["a"]
    assert mean == pytest.approx(0.6)
    low, high = stats.t.interval(0.95, 2, loc=0.6, scale=0.1 / math.sqrt(3))
    assert (mean - (half or 0), mean + (half or 0)) == pytest.approx((low, high))
    # On a: 1, 2, 3; on b: 3, and two that share the places 1 and 2.
    assert {name: row.rank for name, row in rows.items()} == {
        "lr=1": (1 + 3) / 2,
        "lr=2": (2 + 1.5) / 2,
        "lr=3": (3 + 1.5) / 2,
    }
    assert next(iter(rows)) == "lr=2"  # the best is first
    assert rows["lr=1"].mean == pytest.approx(0.4)
    assert (rows["lr=1"].seconds, rows["lr=1"].memory) == (10.0, 1.5)


def test_one_seed_has_no_interval() -> None:
    assert table.interval([0.25]) == (0.25, None)
    assert table.shown((0.25, None)) == "0.250"
    assert table.shown((0.25, 0.1)) == "0.250 ± 0.100"


def test_the_best_of_each_dataset(plan: Plan) -> None:
    best = table.best(plan, table.outcomes(plan))
    assert {dataset: each.cell.name for dataset, each in best.items()} == {
        "a": "lr=1/a/seed-2",
        "b": "lr=2/b/seed-2",
    }


def test_failures_are_rows_with_their_reason(plan: Plan) -> None:
    cell = failed(plan)
    found = table.outcomes(plan)
    states = [each.state for each in found]
    assert states.count(table.DONE) == 17
    assert states.count(table.FAILED) == 1
    table.write(plan, found)
    with (plan.folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    row = next(row for row in rows if row["state"] == "failed")
    assert (row["reason"], row["bbox/AP"], row["lr"]) == ("no <such> thing\nand more", "", "3")
    assert row["again"] == plan.command(cell)
    page.write(plan, found)
    text = (plan.folder / "sweep.html").read_text()
    assert "no &lt;such&gt; thing<br>and more" in text
    assert "paper, box AP" in text
    assert "<script" not in text


def test_a_cell_at_work_is_told_as_such(plan: Plan) -> None:
    import fcntl

    cell = next(c for c in plan.cells() if c.name == "lr=3/a/seed-2")
    file = log_file(plan, cell)
    file.parent.mkdir(parents=True)
    with file.open("ab") as held:
        fcntl.flock(held.fileno(), fcntl.LOCK_EX)
        assert [e.state for e in table.outcomes(plan) if e.cell == cell] == [table.RUNNING]
    assert [e.state for e in table.outcomes(plan) if e.cell == cell] == [table.LEFT]


def test_an_axis_holds_numbers_in_their_order() -> None:
    places, ticks = page.positions([3, 1, 2, 1])
    assert places.tolist() == [1, 0, 0.5, 0]
    assert ticks == {0: "1", 0.5: "2", 1: "3"}
    places, _ = page.positions(["b", "a", None])
    assert places.tolist() == [0, 0.5, 1]
