"""The program's commands on a GPU: each runs to its end, with every tensor where it belongs.

What is found there means nothing, because nothing is computed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.null_gpu import NullGpu
from tests.helpers import MICRO, REPOSITORY, TINY, metrics, saved_weights

NANO = REPOSITORY / "app" / "assets" / "nano"
RANDOM = ["--model", "nano", "--checkpoint", "none", *MICRO]
PRETRAINED = ["--model", "nano", "--recipe", "none", *TINY]


def test_training(null_gpu: NullGpu, shapes: Path, tmp_path: Path) -> None:
    done = null_gpu.train(shapes, tmp_path / "run", "--epochs", 1, *RANDOM)
    assert done.code == 0, done.output
    assert "on cuda in bfloat16" in done.output
    assert {"bbox/AP", "segm/AP", "baseline/segm/AP"} <= metrics(tmp_path / "run").keys()
    assert saved_weights(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--method", "head"],  # with features cached
        ["--method", "lora"],
        ["training.ema=0.9", "training.grad_accum=2", "training.num_workers=0"],
        ["training.precision=fp32", "loss=boxes", "training.check_finite=true"],
    ],
    ids=" ".join,
)
def test_ways_to_train(null_gpu: NullGpu, shapes: Path, tmp_path: Path, words: list[str]) -> None:
    done = null_gpu.train(shapes, tmp_path / "run", "--epochs", 1, *PRETRAINED, *words)
    assert done.code == 0, done.output
    assert f"on cuda in {'float32' if 'training.precision=fp32' in words else 'bfloat16'}" in (
        done.output
    )


@pytest.mark.slow
def test_a_student_and_its_teacher(null_gpu: NullGpu, shapes: Path, tmp_path: Path) -> None:
    words = ["--epochs", 1, "--teacher", NANO, *RANDOM]
    done = null_gpu.train(shapes, tmp_path / "run", *words)
    assert done.code == 0, done.output
    assert "on cuda" in done.output


@pytest.mark.slow
def test_upstreams_trainer(null_gpu: NullGpu, shapes: Path, tmp_path: Path) -> None:
    """Its own loop, with NCCL and DDP around one process."""
    words = ["--use-base-config", "--model", "nano", "--dataset-dir", shapes, "--epochs", 1]
    words += ["--batch-size", 2, "--resolution", 64, "--output-dir", tmp_path / "run"]
    done = null_gpu.app("train", *words, "scratch.num_workers=0", "scratch.mask_points=64")
    assert done.code == 0, done.output
    assert (tmp_path / "run" / "checkpoints" / "checkpoint.pt").is_file()


@pytest.mark.slow
def test_weights_are_used(null_gpu: NullGpu, shapes: Path, tmp_path: Path) -> None:
    """To predict on whole images and on tiles, to be scored, to be exported."""
    images = ["--checkpoint", NANO, "--input", shapes / "valid" / "images", "--resolution", 64]
    for name, words in {
        "words": ["--prompt", "circle", "--batch-size", 2],
        "tiles": ["--prompt", "circle", "--tile", 48],
    }.items():
        done = null_gpu.app("infer", *images, *words, "--output-dir", tmp_path / name)
        assert done.code == 0, done.output
        assert "bfloat16" in done.output  # nano's on a GPU alone
        assert (tmp_path / name / "predictions.json").is_file()
    scoring = ["--checkpoint", NANO, "--dataset-dir", shapes, "--output-dir", tmp_path / "scored"]
    done = null_gpu.app("evaluate", *scoring, *TINY)
    assert done.code == 0, done.output
    exporting = [NANO, "--format", "hf", "--output-dir", tmp_path / "exported"]
    done = null_gpu.app("export", *exporting)
    assert done.code == 0, done.output
