"""The plan of a run on a GPU, beside what torch's own allocator takes for its updates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.gpu.null_gpu import NullGpu

FEW, MANY = "4 prompts an image", "20 prompts an image"


def _check(
    gpu: NullGpu, datasets: dict[str, Path], size: str, runs: list[tuple[str, list[str]]]
) -> None:
    """Compare what runs plan with what they take."""
    words = [(str(datasets[name]), size, overrides) for name, overrides in runs]
    for run, found in zip(runs, gpu.probe("memory", words), strict=True):
        assert 0.9 <= found["planned"] / found["taken"] <= 1.25, (run, found)


@pytest.fixture
def datasets(shapes: Path, many_classes: Path) -> dict[str, Path]:
    return {FEW: shapes, MANY: many_classes}


def test_small_runs_take_what_is_planned(null_gpu: NullGpu, datasets: dict[str, Path]) -> None:
    """A GPU keeps no scores of attention, with dropout too, and autocast leaves more in float32."""
    runs = [
        (FEW, ["method=full", "training.batch_size=2"]),
        (MANY, ["method=full", "training.batch_size=4", "model.dropout=0.1"]),
    ]
    _check(null_gpu, datasets, "nano", runs)


@pytest.mark.slow
def test_runs_of_the_full_size_take_what_is_planned(
    null_gpu: NullGpu, datasets: dict[str, Path]
) -> None:
    runs = [
        (FEW, ["method=full", "training.batch_size=1"]),
        (FEW, ["method=head", "training.batch_size=2"]),
        (MANY, ["method=full", "training.batch_size=1"]),
        (MANY, ["method=lora", "training.batch_size=2"]),
    ]
    _check(null_gpu, datasets, "sam3", runs)


@pytest.mark.slow
def test_the_batch_that_is_found_fits(
    null_gpu: NullGpu, many_classes: Path, tmp_path: Path
) -> None:
    """Of 12 images all but a few, in 2 GiB; the run takes them and does not run out of memory."""
    words = ["--model", "nano", "--recipe", "none", "--epochs", 1, "--batch-size", "auto"]
    done = null_gpu.train(many_classes, tmp_path / "run", *words, gb=2)
    assert done.code == 0, done.output
    size = int(re.search(r"batch size: (\d+) images", done.output)[1])
    assert 2 <= size <= 8
