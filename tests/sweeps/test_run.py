"""Real sweeps of tiny runs: killed again and again, refused in part, told of while they run."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import MICRO, REPOSITORY, Command, at_work, same_weights, until

QUICK = [*MICRO, "training.device=cpu", "evaluation.pictures=0", "evaluation.off_prompts=0"]


def write(tmp_path: Path, content: dict[str, Any]) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def asked(shapes: Path, **more: Any) -> dict[str, Any]:
    return {
        "keys": {"optim.lr_scale": [0.5, 1]},
        "datasets": [str(shapes)],
        "overrides": [*QUICK, "checkpoint=none", "training.epochs=2"],
        **more,
    }


def start(file: Path, folder: Path, *more: object) -> subprocess.Popen[bytes]:
    """`python -m app sweep FILE`, in a group of its own that a kill reaches as a whole."""
    words = [sys.executable, "-m", "app", "sweep", file, "--output-dir", folder, *more]
    with (folder.parent / "said.txt").open("ab") as said:
        return subprocess.Popen(
            list(map(str, words)), cwd=REPOSITORY, stdout=said, stderr=said, start_new_session=True
        )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def kill_all(process: subprocess.Popen[bytes], folder: Path) -> None:
    """SIGKILL to the sweep and to the cells at work, whose sessions are their own."""
    process.kill()
    process.wait()
    for number in at_work(f"output_dir={folder}/"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    until(lambda: not at_work(f"output_dir={folder}/"), "their end")


@pytest.mark.slow
def test_killed_again_and_again_it_equals_an_unbroken_one(
    command: Command, shapes: Path, tmp_path: Path
) -> None:
    file = write(tmp_path, asked(shapes, keys={"optim.lr_scale": [1]}, seeds=[0, 1, 2]))
    whole = command("sweep", file, "--output-dir", tmp_path / "whole", "--jobs", 2)
    assert whole.code == 0, whole.err
    chance = random.Random(5)
    cut = tmp_path / "cut"
    cut.mkdir()
    for number in range(3):
        process = start(file, cut, "--jobs", "2")
        until(
            lambda process=process: any(at_work(f"output_dir={cut}/")) or process.poll() == 0,
            "a first cell",
        )
        time.sleep(4 + 6 * chance.random())
        if number == 1:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, 143)
        else:
            kill_all(process, cut)
    again = command("sweep", cut)
    assert again.code == 0, again.err
    kept = ("setting", "seed", "state", "segm/AP", "bbox/AP", "epochs")
    figures = [
        [{key: row[key] for key in kept} for row in rows(tmp_path / f)] for f in ("whole", "cut")
    ]
    assert figures[0] == figures[1]
    assert [row["state"] for row in rows(cut)] == ["done"] * 3
    for row in rows(cut):
        place = Path("runs", row["setting"], row["dataset"], f"seed-{row['seed']}")
        assert same_weights(tmp_path / "whole" / place, cut / place)
    # What is done is not done again.
    before = (cut / "runs").stat().st_mtime_ns, (cut / "logs").stat().st_mtime_ns
    assert "3 of 3 cells were done before" in command("sweep", cut).out
    assert before == ((cut / "runs").stat().st_mtime_ns, (cut / "logs").stat().st_mtime_ns)


@pytest.mark.slow
def test_a_cell_that_is_refused_or_diverges_costs_itself(
    command: Command, shapes: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    keys = {"optim.lr_scale": [1, 1e30]}
    names = [str(shapes), str(tmp_path / "broken")]
    file = write(tmp_path, asked(shapes, keys=keys, datasets=names))
    done = command("train", "--sweep", file, "--output-dir", tmp_path / "out")
    assert done.code == 3
    by_cell = {(row["setting"], row["dataset"]): row for row in rows(tmp_path / "out")}
    assert by_cell["lr_scale=1", shapes.name]["state"] == "done"
    for setting in ("lr_scale=1", "lr_scale=1e+30"):
        row = by_cell[setting, "broken"]
        assert row["state"] == "failed"
        assert "broken" in row["reason"]
    diverged = by_cell["lr_scale=1e+30", shapes.name]
    assert diverged["state"] == "failed"
    assert "finite" in diverged["reason"], diverged["reason"]
    assert f"failed: lr_scale=1e+30/{shapes.name}/seed-0: " in done.out

    # Again: it is not tried again, unless that is asked for.
    again = command("sweep", tmp_path / "out")
    assert again.code == 0
    assert "3 failed" in again.out
    assert command("sweep", tmp_path / "out", "--retry").code == 3
    status = command("sweep", "status", tmp_path / "out")
    assert "4 cells: 1 done, 3 failed, 0 at work, 0 left" in status.out


@pytest.mark.slow
def test_one_cell_alone_by_its_number(
    command: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an array does it, whose jobs share the folder and tell of nothing but their cell."""
    file, folder = write(tmp_path, asked(shapes)), tmp_path / "out"
    assert command("sweep", file, "--output-dir", folder, "--cell", "2").code == 2
    assert "takes that of SLURM_ARRAY" in command("sweep", folder, "--cell", "auto").err
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    done = command("sweep", folder, "--cell", "auto")
    assert done.code == 0, done.err
    assert "1 done, 0 failed, 0 at work, 1 left" in command("sweep", "status", folder).out
    assert not (folder / "sweep.html").exists()
    assert command("sweep", "table", folder).code == 0
    assert [row["state"] for row in rows(folder)] == ["left", "done"]


@pytest.mark.slow
def test_optuna_draws_goes_on_and_prunes(command: Command, shapes: Path, tmp_path: Path) -> None:
    keys = {"optim.lr_scale": {"from": 0.01, "to": 1, "log": True}, "training.ema": [None, 0.9]}
    content = asked(shapes, search="optuna", trials=3, pruner="asha", keys=keys)
    folder = tmp_path / "out"
    folder.mkdir()
    process = start(write(tmp_path, content), folder)
    until(lambda: (folder / "trials" / "000.json").is_file(), "a trial")
    until(lambda: (folder / "logs").exists(), "its cell")
    time.sleep(3)
    kill_all(process, folder)
    drawn = json.loads((folder / "trials" / "000.json").read_text())
    done = command("sweep", folder)
    assert done.code == 0, done.err
    assert json.loads((folder / "trials" / "000.json").read_text()) == drawn
    states = {row["setting"]: row["state"] for row in rows(folder)}
    assert set(states) == {"trial-000", "trial-001", "trial-002"}
    assert all(row["state"] == "done" or row["reason"].startswith("pruned") for row in rows(folder))
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    trials = optuna.load_study(study_name="sweep", storage=storage).trials
    assert len(trials) == 3
    assert all(trial.state.is_finished() for trial in trials)
    for trial in trials:
        row = next(r for r in rows(folder) if r["setting"] == f"trial-{trial.number:03}")
        if row["state"] == "done":
            assert trial.value == pytest.approx(float(row["segm/AP"]))


@pytest.mark.slow
def test_mlflow_has_the_runs_below_the_sweeps_own(
    command: Command, shapes: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    file = write(tmp_path, asked(shapes))
    words = ("train", "--sweep", file, "--output-dir", tmp_path / "out", f"--mlflow={uri}")
    for _ in range(2):  # again: no second parent
        done = command(*words)
        assert done.code == 0, done.err
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "sam3-finetuning"]

    def runs() -> list[Any]:
        return list(client.search_runs([experiment.experiment_id]))

    until(lambda: len(runs()) == 3 and all(r.info.status == "FINISHED" for r in runs()), "all sent")
    (parent,) = [run for run in runs() if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_name == "out"
    names = {run.info.run_name for run in runs() if run is not parent}
    children = [run for run in runs() if run.data.tags.get("mlflow.parentRunId")]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert f"lr_scale=0.5/{shapes.name}/seed-0" in names
    best = max(run.data.metrics["segm/AP"] for run in children)
    assert parent.data.metrics[f"best/{shapes.name}/segm/AP"] == pytest.approx(best)


@pytest.mark.slow
def test_runs_are_scored_on_the_test_split_where_it_counts(
    command: Command, shapes: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    shutil.copytree(shapes / "train", data / "test")
    file = write(tmp_path, asked(shapes, datasets=[str(data)], keys={"lr": [1e-4]}, split="test"))
    done = command("sweep", file, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    (row,) = rows(tmp_path / "out")
    run = tmp_path / "out" / "runs" / "lr=0.0001" / "data" / "seed-0"
    of_test = json.loads((run / "test" / "metrics.json").read_text())
    again = command(
        *("train", "--eval-only", "--dataset-dir", data, "--checkpoint", run / "weights" / "best"),
        *("evaluation.split=test", "--output-dir", tmp_path / "again", *QUICK),
    )
    assert again.code == 0, again.err
    expected = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert of_test["bbox/AP"] == expected["bbox/AP"] == float(row["bbox/AP"])
    assert float(row["seconds"]) == json.loads((run / "metrics.json").read_text())["seconds"]
