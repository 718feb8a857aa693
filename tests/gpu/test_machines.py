"""What users of GPUs meet: little memory, old drivers, older cards, other machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.null_gpu import NullGpu
from tests.gpu.test_commands import NANO, RANDOM
from tests.helpers import MICRO

TOO_OLD = {"error": 35, "driver": 12040}  # cudaErrorInsufficientDriver; it is for CUDA 12.4


def test_batches_are_pinned(null_gpu: NullGpu, shapes: Path) -> None:
    """The host goes on while a batch is copied, which it cannot from memory that is pageable.

    Colors apart, of which torchvision changes the hue by a table of 144 bytes, without a wait.
    """
    copies = null_gpu.probe("copies_of_a_batch", str(shapes), "transforms=none", *MICRO)
    assert copies["from_pageable"] == 0
    assert copies["from_pinned"] >= 10


def test_what_is_drawn_and_held_leaves_the_gpu_as_it_was(null_gpu: NullGpu, shapes: Path) -> None:
    state = null_gpu.probe("state_of_the_gpu", str(shapes), *MICRO, "dataset.views=2")
    assert state["drawn"]
    assert state["measured"]
    assert state["restored"]
    assert abs(state["cost"]) < 1 << 20


@pytest.mark.slow
def test_a_run_goes_on_where_fewer_gpus_are_visible(
    null_gpu: NullGpu, shapes: Path, tmp_path: Path
) -> None:
    done = null_gpu.train(shapes, tmp_path / "run", "--epochs", 1, *RANDOM, devices=2)
    assert done.code == 0, done.output
    words = ["--epochs", 2, "--resume", *RANDOM]
    done = null_gpu.train(shapes, tmp_path / "run", *words, devices=1)
    assert done.code == 0, done.output
    assert "resumed from" in done.output


def test_a_gpu_without_bfloat16_trains_in_float16(
    null_gpu: NullGpu, shapes: Path, tmp_path: Path
) -> None:
    done = null_gpu.train(shapes, tmp_path / "run", "--epochs", 1, *RANDOM, cc=75)
    assert done.code == 0, done.output
    assert "on cuda in float16" in done.output


def test_an_old_driver_is_named_with_the_one_that_is_needed(
    null_gpu: NullGpu, shapes: Path, tmp_path: Path
) -> None:
    words = ["--epochs", 1, *RANDOM, "training.device=cuda"]
    done = null_gpu.train(shapes, tmp_path / "run", *words, **TOO_OLD)
    assert done.code == 2, done.output
    assert "driver" in done.output
    assert "12.4" in done.output
    assert "580" in done.output


@pytest.mark.parametrize("command", ["train", "infer"])
def test_out_of_memory_is_one_message(
    null_gpu: NullGpu, shapes: Path, tmp_path: Path, command: str
) -> None:
    if command == "train":
        done = null_gpu.train(shapes, tmp_path / "run", "--epochs", 1, *RANDOM, gb=0.02)
    else:
        words = ["--checkpoint", NANO, "--input", shapes / "valid" / "images", "--prompt", "circle"]
        done = null_gpu.app("infer", *words, "--output-dir", tmp_path / "found", gb=0.04)
    assert done.code == 2, done.output
    assert "memory" in done.output
    assert "Traceback" not in done.output
