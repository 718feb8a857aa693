"""--cluster slurm: a real Slurm runs, requeues and cancels a run, and nothing of it is lost."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from app.datasets.synthetic.films import draw_film
from tests.helpers import MICRO, REPOSITORY, TINY, Command, Result, until
from tests.slurm import Slurm

EPOCHS = 60


def _words(shapes: Path, folder: Path, *more: object) -> list[str]:
    words = [
        *("train", "--dataset-dir", shapes, "--model", "nano", "--checkpoint", "none", *TINY),
        *("--epochs", EPOCHS, "--output-dir", folder, "training.device=cpu", *more),
        *(f"evaluation.every={EPOCHS}", f"training.save_every={EPOCHS}", "evaluation.pictures=0"),
    ]
    return list(map(str, words))


@pytest.fixture
def submit(
    slurm: Slurm, command: Command, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """`python -m app train WORDS --cluster slurm`, where jobs are submitted."""

    def run(*words: object) -> Result:
        with monkeypatch.context() as patch:
            patch.chdir(REPOSITORY)
            for name, value in slurm.environment.items():
                patch.setenv(name, value)
            return command(*words, "--cluster", "slurm", "cluster.cpus=1")

    return run


def _job(submitted: Result) -> str:
    assert submitted.code == 0, submitted.err
    return re.search(r"submitted: job (\d+)", submitted.out)[1]


def _epochs(folder: Path) -> int:
    file = folder / "metrics.csv"
    return len(list(csv.DictReader(file.open()))) if file.is_file() else 0


def _weights(folder: Path) -> bytes:
    return (folder / "weights" / "last" / "model.safetensors").read_bytes()


def _await_end(slurm: Slurm, job: str, folder: Path) -> None:
    """Wait for a job that must end well."""
    states = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
    until(lambda: slurm.field(job, "JobState") not in states, "the end of the job")
    said = "".join(file.read_text() for file in sorted((folder / "slurm").glob(f"{job}_*_log.*")))
    assert slurm.field(job, "JobState") == "COMPLETED", said


@pytest.mark.system
def test_a_job_goes_on_after_preemption_and_cancelling(
    slurm: Slurm,
    submit: Callable[..., Result],
    shapes: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    """Warned by USR2, then requeued by hand, then cancelled and resumed: the same weights."""
    folder = tmp_path / "out"
    job = _job(submit(*_words(shapes, folder)))
    until(lambda: _epochs(folder) >= 3, "three epochs")
    slurm("scancel", "--signal=USR2", job)
    until(lambda: slurm.field(job, "Restarts") == "1", "the job queued again by itself")
    log = folder / "train.log"
    until(lambda: log.read_text().count("resumed from") == 1, "the run going on")
    before = _epochs(folder)
    until(lambda: _epochs(folder) >= before + 3, "three more epochs")
    slurm("scontrol", "requeue", job)
    until(lambda: slurm.field(job, "Restarts") == "2", "the job requeued")
    until(lambda: log.read_text().count("resumed from") == 2, "the run going on again")
    slurm("scancel", job)
    until(lambda: slurm.field(job, "JobState") == "CANCELLED", "the job cancelled")
    until(lambda: log.read_text().count("stopped after") == 3, "the run saved")
    assert _epochs(folder) < EPOCHS
    other = submit(*_words(shapes, folder), "--resume", "--seed", 5)
    assert other.code == 2
    assert "seed: 0 then, 5 now" in other.err
    job = _job(submit(*_words(shapes, folder), "--resume"))
    _await_end(slurm, job, folder)
    assert log.read_text().count("resumed from") == 3
    whole = command(*_words(shapes, tmp_path / "whole"))
    assert whole.code == 0, whole.err
    assert _weights(folder) == _weights(tmp_path / "whole")


@pytest.mark.system
def test_two_nodes_train_one_run(slurm: Slurm, submit, shapes: Path, tmp_path: Path) -> None:
    """They find each other, as one run; on whose account, and how well, is said to Slurm."""
    folder = tmp_path / "out"
    asked = ("cluster.account=lab", "cluster.qos=short", "cluster.partition=main")
    job = _job(submit(*_words(shapes, folder, "--nodes", 2, "--epochs", 3, *asked)))
    assert slurm.field(job, "Account") == "lab"
    script = (folder / "slurm" / f"{job}_submission.sh").read_text()
    # Without a database of accounts, Slurm takes a QOS and does not say it.
    for line in ("--qos=short", "--account=lab", "--partition=main", "--nodes=2", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    _await_end(slurm, job, folder)
    assert slurm.field(job, "NumNodes") == "2"
    assert "2 processes" in (folder / "train.log").read_text()
    run = json.loads((folder / "checkpoints" / "update-00000003" / "run.json").read_text())
    assert run["fingerprint"]["processes"] == 2
    assert run["state"]["updates"] == 3  # of four images, two in each of the processes
    assert _epochs(folder) == 3
    words = _words(shapes, folder, "--epochs", 1)
    refused = submit(*words, "--resume")
    assert refused.code == 2
    assert "--num-gpus: 2 then, 1 now" in refused.err
    _await_end(slurm, _job(submit(*words, "--resume=weights")), folder)
    assert "the schedule starts anew" in (folder / "train.log").read_text()


@pytest.mark.system
def test_what_slurm_refuses(submit: Callable[..., Result], shapes: Path, tmp_path: Path) -> None:
    done = submit(*_words(shapes, tmp_path / "out", "cluster.partition=none"))
    assert done.code == 2
    assert "invalid partition" in done.err
    assert "Traceback" not in done.err


def test_without_slurm(shapes: Path, tmp_path: Path, command: Command, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command(*_words(shapes, tmp_path / "out"), "--cluster", "slurm")
    assert done.code == 2
    assert "no sbatch on this machine" in done.err
    nodes = command(*_words(shapes, tmp_path / "out"), "--nodes", 2)
    assert nodes.code == 2
    assert "--cluster slurm" in nodes.err


@pytest.mark.system
def test_an_array_of_a_sweep_outlives_requeues_and_a_node(
    slurm: Slurm, command: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight cells: one is requeued, a node goes away and comes back, and each is done once."""
    monkeypatch.chdir(REPOSITORY)
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    file, folder = tmp_path / "sweep.yaml", tmp_path / "out"
    content = {
        "keys": {"optim.lr_scale": [0.25, 0.5, 1, 2]},
        "datasets": [str(shapes)],
        "seeds": [0, 1],
        "overrides": [*MICRO, "checkpoint=none", "training.device=cpu", "training.epochs=8"],
        "cluster": {"cpus": 1, "minutes": 60},
    }
    file.write_text(yaml.safe_dump(content))
    words = ("train", "--sweep", file, "--model", "nano", "--output-dir", folder)
    done = command(*words, "--cluster", "slurm", "evaluation.pictures=0")
    assert done.code == 0, done.err
    array = re.search(r"submitted: array (\d+) of 8", done.out)[1]

    def running(node: str) -> list[str]:
        return slurm("squeue", "-h", "-r", "-t", "R", "-w", node, "-o", "%i").split()

    until(lambda: running("127.0.0.1") and running("127.0.0.2"), "cells on both nodes")
    until(lambda: any(folder.glob("runs/*/*/*/metrics.csv")), "a cell's first epoch")
    (requeued, *_) = running("127.0.0.1")
    slurm("scontrol", "requeue", requeued)
    slurm("scontrol", "update", "nodename=127.0.0.2", "state=down", "reason=gone")
    until(lambda: not running("127.0.0.2"), "an empty node")
    slurm("scontrol", "update", "nodename=127.0.0.2", "state=resume")
    until(lambda: not slurm("squeue", "-h", "-j", array).strip(), "the end of the array")

    table = command("sweep", "table", folder)
    assert "8 cells: 8 done, 0 failed, 0 at work, 0 left" in table.out
    said = "".join(f.read_text() for f in sorted((folder / "slurm").glob("*_log.*")))
    for run in folder.glob("runs/*/*/*"):
        rows = list(csv.DictReader((run / "metrics.csv").open()))
        assert [float(row["epoch"]) for row in rows] == list(range(1, 9)), said


@pytest.mark.system
def test_an_array_of_shards_outlives_a_requeue(
    slurm: Slurm, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four pieces of a tar: one is queued again at work, and each image is there once."""
    monkeypatch.chdir(REPOSITORY)
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    film = draw_film((0, 5), width=192, height=144)
    names, folder = [f"{number:03}.jpg" for number in range(200)], tmp_path / "out"
    (tmp_path / "images").mkdir()
    for number, name in enumerate(names):
        Image.fromarray(film.frame(number / 50)[0]).save(tmp_path / "images" / name)
    words = ("infer", "--checkpoint", "app/assets/nano", "--input", tmp_path / "images")
    asked = (*words, "--prompt", "circle", "--device", "cpu", "--output-dir", folder)
    split = ("--shards", 4, "--cluster", "slurm")
    settings = ("--cluster-option", "cpus=1", "--cluster-option", "minutes=30")
    done = command(*asked, *split, *settings)
    assert done.code == 0, done.err
    array = re.search(r"submitted: array (\d+) of 4", done.out)[1]
    until(lambda: any(folder.glob("shard-*/")), "a first piece")
    (requeued, *_) = slurm("squeue", "-h", "-r", "-t", "R", "-o", "%i").split()
    slurm("scontrol", "requeue", requeued)
    until(lambda: not slurm("squeue", "-h", "-j", array).strip(), "the end of the array")
    said = "".join(f.read_text() for f in sorted((folder / "slurm").glob("*_log.*")))
    made = command("collect", folder)
    assert made.code == 0, said + made.err
    found = json.loads((folder / "coco.json").read_text())
    assert sorted(image["file_name"] for image in found["images"]) == names
