"""A sweep's YAML → cells: what is tried, what is refused, what may come to one that is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.errors import UserError
from app.sweeps.plan import (
    Cell,
    Plan,
    Range,
    SweepFile,
    load_plan,
    read_plan,
    save_plan,
    setting_name,
    to_request,
)
from app.sweeps.words import Words
from tests.helpers import REPOSITORY

BASE = Words(("training.epochs=1",), size="nano")


def plan_of(tmp_path: Path, content: Any, base: Words = BASE) -> Plan:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_plan(file, base, tmp_path / "out")


def test_a_grid_is_all_combinations(shapes: Path, tmp_path: Path) -> None:
    keys = {"optim.lr_scale": [0.1, 1], "method": ["head", "lora"], "lr": [0.001]}
    asked = {"keys": keys, "datasets": [str(shapes)], "seeds": [1, 2]}
    plan = plan_of(tmp_path, asked)
    cells = plan.cells()
    assert len(cells) == plan.units == 2 * 2 * 1 * 2
    assert len({cell.name for cell in cells}) == 8
    first = plan.words(cells[0])
    assert first == [
        *("training.epochs=1", "--model", "nano", "optim.lr_scale=0.1", "method=head"),
        *("--lr", "0.001", f"dataset.dir={shapes}", "seed=1"),
        f"output_dir={tmp_path}/out/runs/lr_scale=0.1,method=head,lr=0.001/{shapes.name}/seed-1",
    ]
    request = to_request(first)
    assert (request.size, request.lr, request.recipe) == ("nano", 0.001, None)


def test_random_draws_are_of_the_ranges_and_the_same_again(tmp_path: Path) -> None:
    keys = {
        "optim.lr_scale": {"from": 0.01, "to": 1, "log": True},
        "dataset.negatives": {"from": 0, "to": 4, "whole": True},
        "method": ["head", "lora"],
    }
    asked = {"search": "random", "trials": 40, "keys": keys}
    drawn = [cell.values for cell in plan_of(tmp_path, asked).cells()]
    assert len(drawn) == 40
    assert drawn == [cell.values for cell in plan_of(tmp_path, asked).cells()]
    rates = [float(str(values["optim.lr_scale"])) for values in drawn]
    assert all(0.01 <= rate <= 1 for rate in rates)
    assert 8 <= sum(rate < 0.1 for rate in rates) <= 32  # half of them, by the logarithm
    assert {values["dataset.negatives"] for values in drawn} <= {0, 1, 2, 3, 4}
    other = plan_of(tmp_path, asked | {"draw_seed": 1}).cells()
    assert drawn != [cell.values for cell in other]
    few = asked | {"keys": {"method": ["head", "lora"]}}
    assert len(plan_of(tmp_path, few).cells()) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (["a"], "must be keys and their values"),
        ({"kyes": {}}, "kyes"),
        ({"search": "random"}, "trials: is of random and optuna"),
        ({"trials": 3}, "trials: is of random and optuna"),
        ({"keys": {"optim.lr_scale": {"from": 1, "to": 2}}}, "a range is for random"),
        ({"search": "random", "trials": 2, "keys": {"x": {"from": 2, "to": 1}}}, "must be below"),
        ({"keys": {"method": []}}, "give one value"),
        ({"seeds": [1, 1]}, "one is there twice"),
        ({"seeds": []}, "seeds"),
        ({"pruner": "asha"}, "is of search: optuna"),
        ({"keys": {"output_dir": ["a"]}}, "the sweep itself sets it"),
        ({"overrides": ["dataset.dir=x"]}, "the sweep itself sets it"),
        ({"datasets": ["nowhere/at/all"]}, "no such folder"),
        ({"datasets": ["rf100vl"]}, "ROBOFLOW_API_KEY"),
        ({"keys": {"optim.lr_scal": [1]}}, "Did you mean 'optim.lr_scale'"),
        ({"keys": {"dataset.max_drop": [0.1, 7]}}, "dataset.max_drop.*7"),
    ],
)
def test_what_is_refused(content: Any, said: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        plan_of(tmp_path, content)
    assert not (tmp_path / "out").exists()


def test_every_value_is_checked_before_the_first_run(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"dataset.max_drop": [0.5, 7], "dataset.valid_fraction": [0.5, 8]}
    with pytest.raises(UserError) as raised:
        plan_of(tmp_path, {"keys": keys})
    assert ["max_drop" in raised.value.problems[0], "valid_fr" in raised.value.problems[1]] == [
        1,
        1,
    ]
    keys = {"dataset.max_drop": {"from": 0.5, "to": 7}}
    with pytest.raises(UserError, match="max_drop"):
        plan_of(tmp_path, {"keys": keys, "search": "random", "trials": 1})


def test_collections_and_names(shapes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("a", "b"):
        (tmp_path / "all" / name / "train").mkdir(parents=True)
        (tmp_path / "all" / name / "train" / "_annotations.coco.json").write_text("{}")
    (tmp_path / "all" / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    named = ["rf100vl:all", str(shapes), "hf:OWNER/NAME", "roboflow:W/P/3", "all/n*"]
    assert dict(plan_of(tmp_path, {"datasets": named}).sources) == {
        **{"a": "dataset.dir=all/a", "b": "dataset.dir=all/b"},
        **{shapes.name: f"dataset.dir={shapes}", "none": "dataset.dir=all/none"},
        **{"OWNER-NAME": "dataset.huggingface.name=OWNER/NAME", "W-P-3": "dataset.roboflow=W/P/3"},
    }
    with pytest.raises(UserError, match="give one of them"):
        plan_of(tmp_path, {"datasets": ["all/a"]}, Words((f"dataset.dir={shapes}",)))


def test_names_of_settings_differ_and_are_folders() -> None:
    assert setting_name({}) == "as-given"
    assert setting_name({"a.lr": 1, "b.lr": 2}) == "a.lr=1,b.lr=2"
    values = [{"k": "x/../y"}, {"k": "x-..-y"}, {"k": ["a", "b"]}, {"k": "n" * 500}]
    names = [setting_name(each) for each in values]
    assert len(set(names)) == 4
    assert not any("/" in name or len(name) > 100 for name in names)


def test_a_sweep_takes_further_values_and_no_other_words(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"keys": {"method": ["head"]}}
    save_plan(plan_of(tmp_path, asked))
    more = plan_of(tmp_path, {"keys": {"method": ["head", "lora"]}, "seeds": [0, 1]})
    save_plan(more)
    assert load_plan(tmp_path / "out").cells() == more.cells()
    with pytest.raises(UserError, match=r"other words \(base was .*epochs=1.*epochs=2"):
        save_plan(plan_of(tmp_path, asked, Words(("training.epochs=2",), size="nano")))
    assert load_plan(tmp_path / "out").cells() == more.cells()


@pytest.mark.parametrize("content", ["[]", "{}", '{"base": [1], "sources": {}}', "{"])
def test_a_folder_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError):
        load_plan(tmp_path)


def test_what_is_kept_is_what_was_asked(tmp_path: Path) -> None:
    file = SweepFile(search="random", trials=3, keys={"a": Range(low=1, high=2, log=True)})
    plan = Plan(tmp_path / "out", ("a=1",), file, {"data": ""})
    save_plan(plan)
    assert load_plan(tmp_path / "out") == plan
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["keys"]["a"]["from"] == 1
    assert plan.command(Cell("s", {"lr": 1}, "data", "", 5)).startswith("./train.sh a=1 --lr 1")


@pytest.mark.parametrize("name", ["rf100vl", "odinw13"])
def test_upstreams_benchmarks_are_sweeps_that_can_begin(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100 if name == "rf100vl" else 13):
        folder = tmp_path / "data" / name / f"set-{number}" / "train"
        folder.mkdir(parents=True)
        (folder / "_annotations.coco.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    plan = read_plan(REPOSITORY / "configs" / "sweep" / f"{name}.yaml", Words(), tmp_path / "out")
    assert plan.units == {"rf100vl": 100, "odinw13": 13 * 3}[name]
    assert (plan.file.split, plan.file.metric) == ("test", "bbox/AP")
