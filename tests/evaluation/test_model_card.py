"""The model card of a run: read by the library that huggingface.co uses, true to the run."""

from __future__ import annotations

import ast
import html
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from app.config.compose import load_config
from app.console import plain
from app.datasets.build import Splits
from app.evaluation import model_card
from app.evaluation.model_card import CARD, code, escaped
from app.files import hash_file, read_json
from app.model import weights
from app.model.bundled import NANO
from tests.evaluation.examples import BOX, truth
from tests.helpers import Command


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
    assert _facts(card)["started from"] == "random weights"
    assert _facts(card)["learning rates, at most"] == "detector 0.0008, vision 0.00025, text 5e-05"
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


def _facts(card: ModelCard) -> dict[str, str]:
    lines = [line.removeprefix("- ") for line in card.text.splitlines() if line.startswith("- ")]
    return dict(line.split(": ", 1) for line in lines)


def test_what_made_the_weights(nano_run: Path, shapes: Path) -> None:
    """Settings from a file, from flags and from the defaults, each as it was used."""
    card = ModelCard.load(nano_run / "weights" / "best" / CARD)
    facts = _facts(card)
    nano = hash_file(NANO / "model.safetensors")
    assert facts["started from"] == f"the nano that the project carries, SHA-256 `{nano}`"
    assert facts["method"] == "`full`"
    said = f"4 to train on and 2 to validate on, from the folder `{shapes.name}`"
    assert facts["images"] == said
    assert (
        r"Augment (flip 0.5, flip_vertical 0.0, scale \[0.5, 2.0\], rotate" in facts["transforms"]
    )
    assert facts["losses, with their weights"].startswith("loss_bbox 5.0, loss_giou 2.0, loss_ce")
    assert facts["losses, with their weights"].endswith("semantic_dice 30.0")
    # --lr 2e-6 is 1/400 of the default; the others keep their ratio
    assert facts["learning rates, at most"] == "detector 2e-06, vision 6.25e-07, text 1.25e-07"
    assert facts["images an update"] == "1 a step × 2 steps × 1 processes"
    assert (facts["precision"], facts["seed"]) == ("float32", "0")
    line = next(line for line in card.text.splitlines() if line.startswith("./train.sh"))
    typed = read_json(nano_run / "environment.json")["command"]
    assert typed[0] == "train"
    assert shlex.split(line) == ["./train.sh", *typed[1:]]


@pytest.fixture
def write(tiny_run: Path, tmp_path: Path, monkeypatch):
    """A card of the tiny run's weights, as if they had been made in another way."""

    def card(*overrides: str, start: Path | None = None, size: str = "nano") -> ModelCard:
        header = model_card.weights.describe(tiny_run / "weights" / "best")
        model = header.model.model_copy(update={"name": size})
        other = header.model_copy(update={"model": model})
        monkeypatch.setattr(model_card.weights, "describe", lambda _: other)
        (tmp_path / "metrics.json").write_bytes((tiny_run / "metrics.json").read_bytes())
        config = load_config([f"output_dir={tmp_path}", *overrides])
        splits = Splits(truth((1, 1, BOX)), truth(), None, ())
        made = {"lr_scale": 0.1, "processes": 3, "precision": torch.bfloat16}
        return ModelCard.load(model_card.write_card(config, start, splits, **made))

    return card


NASTY = "a|b`\n# H\n<img src=x onerror=y> [l](http://x) **b** _i_ &amp; www.x.y ```\x1b[31m"


def test_foreign_names_are_text_in_markdown() -> None:
    """As a renderer of Markdown shows them: the characters themselves, and nothing made of them."""
    shown = MarkdownIt().enable("table").render(f"| x |\n|---|\n| {escaped(NASTY)} |")
    (cell,) = re.findall("<td>(.*?)</td>", shown, re.DOTALL)
    expected = (
        "a|b`\\n# H\\n<img src=x onerror=y> [l](http://x) **b** _i_ &amp; www.x.y ```\\x1b[31m"
    )
    assert html.unescape(cell) == expected
    assert "<" not in cell
    for name in (NASTY, "`", "a``b", "```", "plain"):
        shown = MarkdownIt().render(code(name)).strip()
        assert shown.startswith("<p><code>")
        assert html.unescape(shown[9:-11]) == plain(name)


def test_a_prompt_cannot_end_the_cards_commands(write, tiny_run: Path, monkeypatch) -> None:
    header = weights.read_header(tiny_run / "weights" / "best")
    assert header is not None
    evil = "x'; touch y; '\n```\n# Owned"
    monkeypatch.setattr(weights, "describe", lambda _: header)
    used = model_card._use(header.model_copy(update={"prompts": [evil]}))
    tokens = [token for token in MarkdownIt().parse(used) if token.type != "softbreak"]
    assert [token.type for token in tokens] == ["fence", "fence"]
    line = tokens[0].content.replace("./infer.sh", "printf '%s\\0'").strip()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[5] == evil.encode()
    assert ast.parse(tokens[1].content)


def test_weights_that_come_from_metas(write, tmp_path: Path) -> None:
    """Size sam3 from a checkpoint: another licence, and a base. From Python, without a command."""
    start = tmp_path / "meta" / "sam3.pt"
    start.parent.mkdir()
    start.write_bytes(b"weights")
    card = write("training.batch_size=5", "training.grad_accum=7", start=start, size="sam3")
    assert (card.data.license, card.data.license_name) == ("other", "sam-license")
    assert card.data.base_model == "facebook/sam3"
    facts = _facts(card)
    assert facts["started from"] == f"`meta/sam3.pt`, SHA-256 `{hash_file(start)}`"
    assert facts["images an update"] == "5 a step × 7 steps × 3 processes"
    assert facts["precision"] == "bfloat16"
    assert facts["learning rates, at most"].startswith("detector 8e-05, ")
    assert "train.sh" not in card.text


def test_weights_of_a_run_are_named_by_it(write, tiny_run: Path) -> None:
    start = tiny_run / "weights" / "last" / "model.safetensors"
    named = f"`{tiny_run.name}/weights/last/model.safetensors`, SHA-256 `"
    assert _facts(write(start=start))["started from"].startswith(named)


def test_weights_of_the_hub_are_named_as_there(write, tmp_path: Path, monkeypatch) -> None:
    start = tmp_path / "sam3.pt"
    start.write_bytes(b"weights")
    monkeypatch.setattr(model_card.weights, "cached_sam3", lambda: start)
    said = _facts(write(start=start, size="sam3"))["started from"]
    assert said.startswith("`facebook/sam3/sam3.pt` on huggingface.co, SHA-256 `")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dataset.dir=TMP/secret/cracks"], "the folder `cracks`"),
        (["dataset.dir=TMP/secret/cracks.zip"], "the zip `cracks.zip`"),
        (["dataset.huggingface.name=TMP/secret/cracks"], "the folder `cracks`"),
        (
            ["dataset.huggingface.name=me/cracks@main", "dataset.huggingface.split=train"],
            "`me/cracks@main` on huggingface.co, split `train`",
        ),
        (["dataset.roboflow=me/cracks/3"], "`me/cracks/3` on Roboflow"),
        ([], "the project's own generator of synthetic shapes"),
    ],
)
def test_where_the_images_came_from(write, tmp_path: Path, overrides, said: str) -> None:
    """By its name, without where on this machine it lay."""
    (tmp_path / "secret" / "cracks").mkdir(parents=True)
    (tmp_path / "secret" / "cracks.zip").touch()
    card = write(*(text.replace("TMP", str(tmp_path)) for text in overrides))
    assert _facts(card)["images"] == f"3 to train on and 3 to validate on, from {said}"
    assert "secret" not in card.text
