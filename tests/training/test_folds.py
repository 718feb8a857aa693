"""Folds: each image is scored by weights that have not seen it; those that are kept see all."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import uniform_filter1d

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.errors import UserError
from app.evaluation.metrics import evaluate
from app.model import weights
from app.training import folds
from tests.helpers import (
    MICRO,
    Command,
    Result,
    finish,
    metrics,
    metrics_rows,
    once,
    run_module,
    same_weights,
)

WORDS = ("--checkpoint", "none", *MICRO, "--epochs", 3, "--batch-size", 2, "evaluation.pictures=0")


@pytest.fixture(scope="module")
def images(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of shapes in a folder, without a validation split."""
    return once(tmp_path_factory, "unsplit", lambda out: shutil.copytree(shapes / "train", out))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two folds that was never stopped."""
    words = ("train", "--dataset-dir", images, "--folds", 2, *WORDS)
    return once(tmp_path_factory, "in-folds", lambda out: finish(*words, "--output-dir", out))


def test_each_image_is_scored_without_having_been_seen(images: Path, whole: Path) -> None:
    splits = load_splits(images, folds=2)
    everything = {image.id for image in splits.train.images}
    assert set.union(*map(set, splits.folds)) == everything
    assert sum(map(len, splits.folds)) == len(everything)
    found = {}
    for number, aside in enumerate(splits.folds):
        part = splits.fold(number)
        assert {image.id for image in part.valid.images} == aside
        assert {image.id for image in part.train.images} == everything - aside
        folder = whole / "folds" / str(number + 1)
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["data"]["train"]["sha256"] == part.train.content_hash()
        epoch = metrics(whole)["folds/epoch"]
        results = json.loads((folder / "predictions" / "epochs" / f"{epoch}.json").read_text())
        assert {result["image_id"] for result in results} <= aside
        found |= {result["image_id"]: True for result in results}
    pooled = json.loads((whole / "predictions" / "valid.json").read_text())
    assert {result["image_id"] for result in pooled} == set(found)
    figures = metrics(whole)
    expected = evaluate(splits.train, pooled)
    assert {name: figures[name] for name in expected} == expected
    assert figures["bbox/AP_low"] <= figures["bbox/AP"] <= figures["bbox/AP_high"]


def test_the_epoch_is_the_median_of_the_folds_best(whole: Path) -> None:
    """Each by the mean of three validations, which scipy's filter smooths too."""
    best = []
    for number in (1, 2):
        rows = metrics_rows(whole / "folds" / str(number))
        values = np.array([float(row["segm/AP"]) for row in rows])
        smooth = [values[max(0, i - 1) : i + 2].mean() for i in range(len(values))]
        assert np.allclose(smooth[1:-1], uniform_filter1d(values, 3)[1:-1])
        best.append(max(range(len(smooth)), key=lambda i: (smooth[i], i)) + 1)
    assert metrics(whole)["folds/epoch"] == statistics.median_high(best)
    assert metrics(whole)["folds"] == 2
    assert metrics(whole)["epochs"] == metrics(whole)["folds/epoch"]


def test_what_is_kept(whole: Path, images: Path) -> None:
    """Weights of all images, with the threshold of the folds; of a fold its figures alone."""
    header = weights.read_header(whole / "weights" / "best")
    assert header.data_hash == load_splits(images, folds=2).train.content_hash()
    assert header.threshold == metrics(whole).get("calibration/threshold")
    assert header.scores.images == 4
    for number in (1, 2):
        left = {path.name for path in (whole / "folds" / str(number)).iterdir()}
        assert {"metrics.json", "metrics.csv", "config_resolved.yaml", "predictions"} <= left
        assert not {"weights", "checkpoints"} & left
    report = (whole / "report.html").read_text()
    assert "Each image was scored in one of 2 folds, by weights that had not seen it." in report
    card = (whole / "weights" / "best" / "README.md").read_text()
    assert "4 to train on, each scored in one of 2 folds without it" in card


@pytest.mark.parametrize("updates", [1, 4, 5])
def test_stopped_in_a_fold_or_at_the_end_it_goes_on(
    command: Command, images: Path, whole: Path, tmp_path: Path, stop_after: Any, updates: int
) -> None:
    """Three updates of each fold of two images, then six of all: what is done is not done again."""
    stop_after(updates)
    words = ("train", "--dataset-dir", images, "--folds", 2, *WORDS, "--output-dir", tmp_path / "a")
    stopped = command(*words)
    assert stopped.code == 143
    done = command(*words, "--resume")
    assert done.code == 0, done.err
    assert ("fold 1 of 2: done before" in done.out) == (updates > 3)
    assert same_weights(whole, tmp_path / "a")
    assert same_weights(whole, tmp_path / "a", "best")
    differing = {
        name for name, value in metrics(whole).items() if metrics(tmp_path / "a")[name] != value
    }
    # The peak is of this process, whichever runs it had before.
    assert all("second" in name for name in differing - {"peak_memory_gb"})


def _train(command: Command, images: Path, folder: Path, *words: object) -> Result:
    return command("train", "--dataset-dir", images, *WORDS, "--output-dir", folder, *words)


def test_few_images_are_in_folds_unless_it_is_declined(
    command: Command, images: Path, shapes: Path, tmp_path: Path
) -> None:
    done = _train(command, images, tmp_path / "few", "--epochs", 1)
    assert done.code == 0, done.err
    assert "no validation split: 4 folds of 4 images" in done.out
    assert (tmp_path / "few" / "folds" / "4" / "metrics.json").is_file()
    declined = _train(command, images, tmp_path / "one", "--epochs", 1, "--folds", "none")
    assert declined.code == 0, declined.err
    assert not (tmp_path / "one" / "folds").exists()
    own = _train(command, shapes, tmp_path / "own", "--epochs", 1, "--folds", 2)
    assert own.code == 2
    assert "the dataset has a validation split of its own" in own.err


def test_a_fold_of_other_settings_is_refused(
    command: Command, images: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "folds", tmp_path / "a" / "folds")
    done = _train(command, images, tmp_path / "a", "--folds", 2, "--lr", 1e-5, "--resume")
    assert done.code == 2
    assert "--lr: not given then" in done.err
    from_weights = _train(command, images, tmp_path / "a", "--folds", 2, "--resume=weights")
    assert from_weights.code == 2
    assert "--folds none" in from_weights.err


def test_results_that_are_gone_or_broken_are_told(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    splits, folder = load_splits(images, folds=2), tmp_path / "a"
    shutil.copytree(whole / "folds", folder / "folds")
    config = load_config([f"output_dir={folder}"])
    assert folds.choose(folder, splits, config).epoch == metrics(whole)["folds/epoch"]
    (folder / "folds/1/predictions/epochs/firings-1.json").write_text('{"nouns": 3}')
    with pytest.raises(UserError, match="nouns"):
        folds.choose(folder, splits, config)
    shutil.rmtree(folder / "folds/2/predictions")
    with pytest.raises(UserError, match="no epoch was validated by every fold"):
        folds.choose(folder, splits, config)


@pytest.mark.slow
def test_killed_anywhere(memory_folder: Path) -> None:
    """Before one of its file operations; the same command then comes to the same end."""
    done = run_module("tests.training.killed_runs", memory_folder, 2, "folds")
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 2
