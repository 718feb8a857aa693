"""Weights that the project carries: half as large, proved by their hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.errors import UserError
from app.inference.predictor import Predictor
from app.model import bundled
from app.model.bundled import bundled_nano, pack
from app.model.vocabulary import VISUAL_PROMPT
from app.model.weights import FILE, read_header, to_metadata
from tests.helpers import REPOSITORY, Command


@pytest.fixture
def packed(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pack(tiny_run / "weights" / "best", tmp_path / "nano")
    monkeypatch.setattr(bundled, "NANO", tmp_path / "nano")
    return tmp_path / "nano"


def test_packed_weights_are_half_as_large_and_answer_alike(tiny_run: Path, packed: Path) -> None:
    before, after = tiny_run / "weights" / "best" / FILE, packed / FILE
    assert after.stat().st_size < 0.51 * before.stat().st_size
    assert read_header(after) == read_header(before)
    whole, half = load_file(before), load_file(after)
    assert all(torch.equal(half[key], value.half()) for key, value in whole.items())
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    ours, theirs = (
        Predictor.load(path).predict(image, ["circle"], threshold=0.0) for path in (before, after)
    )
    assert ours.scores == pytest.approx(theirs.scores, abs=0.01)
    assert Predictor.load(after).model.dot_prod_scoring.hs_proj.weight.dtype == torch.float32


def test_the_mean_with_what_was_tuned(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    tuned = tiny_run / "weights" / "best"
    header = read_header(tuned / FILE)
    state = {key: value * 0.5 for key, value in load_file(tuned / FILE).items()}
    (tmp_path / "base").mkdir()
    other = header.model_copy(update={"threshold": 0.2})
    save_file(state, tmp_path / "base" / FILE, metadata=to_metadata(other))
    words = ("pack", tuned, "--base", tmp_path / "base", "--output-dir", tmp_path / "mean")
    assert command(*words, "--share", "0.4").code == 0
    whole, mean = load_file(tuned / FILE), load_file(tmp_path / "mean" / FILE)
    for key, value in whole.items():
        if value.is_floating_point():
            value = (0.4 * value.double() + 0.6 * 0.5 * value.double()).half()
            torch.testing.assert_close(mean[key], value, rtol=2e-3, atol=1e-7)
    threshold = None if header.threshold is None else 0.4 * header.threshold + 0.6 * 0.2
    expected = header.model_copy(update={"scores": None, "golden": None})
    found = read_header(tmp_path / "mean" / FILE)
    assert found.threshold == pytest.approx(threshold)
    assert found.model_copy(update={"threshold": header.threshold}) == expected
    state.popitem()
    save_file(state, tmp_path / "base" / FILE)
    with pytest.raises(UserError, match="has other tensors, such as"):
        pack(tuned, tmp_path / "none", tmp_path / "base")
    assert not (tmp_path / "none").exists()


def test_what_is_carried_is_proved(packed: Path) -> None:
    assert bundled_nano() == packed
    content = bytearray((packed / FILE).read_bytes())
    content[-1] ^= 1
    (packed / FILE).write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        bundled_nano()
    (packed / FILE).unlink()
    assert bundled_nano() is None


def test_what_is_no_weights_of_ours_is_not_packed(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="no header of ours"):
        pack(tmp_path, tmp_path / "out")


def test_a_run_starts_from_what_is_carried(
    packed: Path, shapes: Path, tmp_path: Path, command: Command
) -> None:
    words = ["train", "--dataset-dir", shapes, "--epochs", 1, "evaluation.pictures=0"]
    words += ["--recipe", "none"]
    small = ["model.resolution=64", "model.mask_points=64"]
    done = command(*words, *small, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert f"weights: {packed}" in done.out
    assert "lr_scale 0.1" in done.out
    none = command(*words, *small, "--output-dir", tmp_path / "none", "--checkpoint", "none")
    assert none.code == 0
    assert "lr_scale 1)" in none.out


def test_what_is_carried_finds_what_a_box_shows() -> None:
    carried = bundled_nano()
    assert carried is not None
    circle = (198.0, 157.0, 153.0, 140.0)  # the blue one of the picture, as xywh
    predictor = Predictor.load(carried)
    picture = Image.open(REPOSITORY / "examples" / "scene.png").convert("RGB")
    found = predictor.predict(picture, [VISUAL_PROMPT], boxes_xywh=[circle], threshold=0.6)
    assert len(found) == 1
    low, size = np.array(circle[:2]), np.array(circle[2:])
    assert np.abs(found.boxes_xyxy[0] - [*low, *(low + size)]).max() < 10
