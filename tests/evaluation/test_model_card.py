"""The model card of a run: read by the library that huggingface.co uses, true to the run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from app.config import load_config
from app.evaluation import model_card
from app.evaluation.model_card import CARD
from app.files import read_json
from tests.conftest import Command


def test_the_card_of_a_run(tiny_run: Path) -> None:
    card = ModelCard.load(tiny_run / "weights" / "best" / CARD)
    figures = read_json(tiny_run / "metrics.json")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None
    given = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert given == {
        f"{name} AP": pytest.approx(figures[f"{kind}/AP"], abs=5e-5)
        for name, kind in (("box", "bbox"), ("mask", "segm"))
    }
    assert "trained from random weights" in card.text
    assert "“circle”" in card.text
    row = next(line for line in card.text.splitlines() if line.startswith("| box AP |"))
    expected = [figures["baseline/bbox/AP"], figures["bbox/AP"]]
    assert [float(cell) for cell in row.split("|")[2:4]] == pytest.approx(expected, abs=5e-4)


def test_its_commands_run(tiny_run: Path, shapes: Path, tmp_path: Path, command: Command) -> None:
    text = (tiny_run / "weights" / "best" / CARD).read_text()
    line = next(line for line in text.splitlines() if line.startswith("./infer.sh"))
    words = line.replace("THIS_FOLDER", str(tiny_run / "weights" / "best"))
    words = words.replace("IMAGES", str(shapes / "valid" / "images"))
    done = command("infer", *shlex.split(words)[1:-1], tmp_path / "found")
    assert done.code == 0, done.err


def test_weights_that_come_from_metas(tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    """Size sam3 from a checkpoint: another licence, and a base. From Python, without a command."""
    header = model_card.weights.describe(tiny_run / "weights" / "best")
    large = header.model_copy(update={"model": header.model.model_copy(update={"name": "sam3"})})
    monkeypatch.setattr(model_card.weights, "describe", lambda _: large)
    (tmp_path / "metrics.json").write_bytes((tiny_run / "metrics.json").read_bytes())
    config = load_config([f"output_dir={tmp_path}"])
    card = ModelCard.load(model_card.write_card(config, Path("sam3.pt")))
    assert (card.data.license, card.data.license_name) == ("other", "sam-license")
    assert card.data.base_model == "facebook/sam3"
    assert "from `sam3.pt`" in card.text
    assert "train.sh" not in card.text
