"""What weights answer about a drawn image is told by them, and compared where they are loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from app.inference.golden import answer, check
from app.inference.predictor import Predictor
from app.model import weights
from app.model.golden import Golden, draw
from app.model.weights import Header


def test_the_image_is_the_same_everywhere() -> None:
    digest = hashlib.sha256(draw().tobytes()).hexdigest()
    expected = "e3ded062073d7b6ccd63245d578590db01ebe198b26c5b5aa6098403e8d4535e"
    assert digest == expected


@pytest.mark.parametrize(
    ("scores", "precision", "said"),
    [
        ([0.5, 0.01], "float32", ""),
        ([0.51, 0.0101], "float32", ""),  # log-odds 0.04 and 0.01 away
        ([0.5, 0.011], "float32", "a score of 0.011 in place of 0.01"),
        ([0.5, 0.011], "bfloat16", ""),
        ([0.7, 0.01], "bfloat16", "a score of 0.7 in place of 0.5"),
        ([0.5], "float32", "1 scores in place of 2"),
        ([], "float32", "0 scores in place of 2"),
    ],
)
def test_a_difference_is_told(scores: list[float], precision: str, said: str) -> None:
    told = Golden(["circle"], [0.5, 0.01], "float32")
    assert told.difference(Golden(["circle"], scores, precision)) == said


@pytest.mark.parametrize("scores", [[2.0], [-0.1], [float("nan")], [0.5] * 11])
def test_what_is_no_score_is_refused(scores: list[float]) -> None:
    golden = {"prompts": ["circle"], "scores": scores, "precision": "float32"}
    with pytest.raises(ValidationError):
        Header.model_validate({"model": {}, "golden": golden})


def test_a_run_tells_it(tiny_run: Path) -> None:
    """The best weights do; those that no validation chose do not."""
    best = weights.read_header(tiny_run / "weights" / "best")
    last = weights.read_header(tiny_run / "weights" / "last")
    assert best is not None
    assert best.golden is not None
    assert last is not None
    assert last.golden is None
    predictor = Predictor.load(tiny_run / "weights" / "best", device="cpu")
    assert len(best.golden.scores) == 10
    assert check(predictor, best.golden) == ""
    assert answer(predictor, best.prompts) == best.golden
    assert best.golden.prompts == best.prompts[:3]
    with torch.no_grad():
        for parameter in predictor.model.dot_prod_scoring.parameters():
            parameter.mul_(2)
    changed = Predictor(predictor.model, predictor.config)
    assert "in place of" in check(changed, best.golden)


def test_another_resolution_has_no_golden_image(tiny_run: Path) -> None:
    path = tiny_run / "weights" / "best"
    _, header = weights.load(path, resolution=96)
    assert header.golden is None
