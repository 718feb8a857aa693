"""Tiny runs of the training room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers import MICRO, TINY, Command, Result

Train = Callable[..., Result]


def train_words(shapes: Path, folder: Path, start: Path | None = None) -> tuple[object, ...]:
    """Return the command that trains the micro-model into a folder, or from weights to start from.

    The header of such weights says the size.
    """
    size = ("--checkpoint", start, *TINY) if start else ("--checkpoint", "none", *MICRO)
    words = ("train", "--dataset-dir", shapes, "--output-dir", folder)
    return (*words, "evaluation.pictures=0", *size)


@pytest.fixture
def train(command: Command, shapes: Path, tmp_path: Path) -> Train:
    """Train the micro-model with further words.

    Args:
        folder: the name of the run's folder, beside which a test may have others.
        start: weights to start from.
    """

    def run(*words: object, folder: str = "out", start: Path | None = None) -> Result:
        return command(*train_words(shapes, tmp_path / folder, start), *words)

    return run


@pytest.fixture
def nan_weights(tiny_run: Path, tmp_path: Path) -> Path:
    """Trained weights with NaN in the bias of one linear layer, dot_prod_scoring.hs_proj."""
    whole = tiny_run / "weights" / "best" / "model.safetensors"
    state = load_file(whole)
    state["dot_prod_scoring.hs_proj.bias"].fill_(float("nan"))
    with safe_open(whole, "pt") as opened:
        save_file(state, tmp_path / "nan.safetensors", metadata=opened.metadata())
    return tmp_path / "nan.safetensors"
