"""From words to a configuration and the weights it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from app.config.compose import load_config
from app.errors import UserError
from app.model import weights
from app.model.build import build_model
from app.model.bundled import bundled_nano
from app.training.prepare import Request, configure, default_weights
from tests.helpers import Command


def test_auto_is_nano_without_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, file = configure(Request([]))
    assert config.model.name == "nano"
    assert file == weights.find_file(bundled_nano())
    assert configure(Request(["checkpoint=none"]))[1] is None


def test_auto_is_sam3_where_gpu_and_weights_are_at_hand(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.save(build_model(load_config().model).state_dict(), tmp_path / "sam3.pt")
    monkeypatch.setattr(weights, "cached_sam3", lambda: tmp_path / "sam3.pt")
    for download in (True, False):
        chosen = default_weights("auto", random=False, download=download)
        assert chosen == ("sam3", tmp_path / "sam3.pt")
    assert default_weights("auto", random=True, download=True) == ("nano", None)


def test_the_gated_weights_that_are_not_at_hand(monkeypatch) -> None:
    monkeypatch.setattr(weights, "cached_sam3", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setattr(weights, "HUB", ("nobody/nothing", "sam3.pt"))
    with pytest.raises(UserError) as caught:
        configure(Request([], size="sam3"))
    assert "SAM License" in str(caught.value)
    assert "--checkpoint none" in str(caught.value)
    config, file = configure(Request([], size="sam3", download=False))  # a plan needs none of them
    assert (config.model.name, file) == ("sam3", Path("sam3.pt"))
    assert "hf_canary" not in str(caught.value)


def test_random_weights_by_choice() -> None:
    config, file = configure(Request(["checkpoint=none"], size="sam3"))
    assert (config.model.name, file) == ("sam3", None)


def test_the_size_follows_the_weights(tmp_path: Path) -> None:
    model = load_config(["model.resolution=96", "model.num_queries=7"]).model
    weights.save(build_model(model), tmp_path, weights.Header(model=model))
    config, file = configure(Request([f"checkpoint={tmp_path}"]))
    assert config.model == model
    assert file == tmp_path / "model.safetensors"
    changed, _ = configure(Request([f"checkpoint={tmp_path}", "model.resolution=64"], size="nano"))
    assert (changed.model.resolution, changed.model.num_queries) == (64, 7)


def test_what_is_recomputed_is_of_training_not_of_weights(tmp_path: Path) -> None:
    """Weights of before, as the carried ones, would keep what their size did then."""
    size = load_config(["model.activation_checkpointing=true"]).model
    weights.save(build_model(size), tmp_path, weights.Header(model=size))
    for more, expected in (
        ([], False),
        (["model.activation_checkpointing=[vision]"], ["vision"]),
    ):
        config, _ = configure(Request([f"checkpoint={tmp_path}", *more]))
        assert config.model.activation_checkpointing == expected


def test_size_in_a_file_or_an_override(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: small\ncheckpoint: none\noutput_dir: here\n")
    config, _ = configure(Request([], file=tmp_path / "c.yaml"))
    assert (config.model.name, config.output_dir) == ("small", "here")
    config, _ = configure(Request(["model=nano"], file=tmp_path / "c.yaml"))
    assert config.model.name == "nano"
    (tmp_path / "d.yaml").write_text("model: {resolution: 64}\n")
    config, _ = configure(Request(["checkpoint=none"], file=tmp_path / "d.yaml", size="nano"))
    assert (config.model.name, config.model.resolution) == ("nano", 64)


def test_learning_rates_keep_their_ratio() -> None:
    config, _ = configure(Request(["checkpoint=none"], size="nano", lr=4e-4))
    assert config.optim.lr_scale == pytest.approx(0.5)
    config, _ = configure(Request(["checkpoint=none", "optim.lr=2e-4"], size="nano", lr=4e-4))
    assert config.optim.lr_scale == pytest.approx(2.0)


def test_flags_reach_the_configuration() -> None:
    overrides = [
        *("training.epochs=3", "training.batch_size=5", "training.grad_accum=2"),
        *("model.resolution=64", "training.num_gpus=2", "seed=9", "output_dir=x"),
    ]
    config, _ = configure(Request([*overrides, "checkpoint=none"], size="nano"))
    training = config.training
    assert (training.epochs, training.batch_size, training.grad_accum) == (3, 5, 2)
    assert (config.model.resolution, training.num_gpus) == (64, 2)
    assert (config.seed, config.output_dir) == (9, "x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--use-base-config", "--plan"], ["--plan: of this project's own training"]),
        (["--use-base-config", "--batch-size", "auto"], ["--batch-size auto: of this"]),
        (
            ["--use-base-config", "--plan", "--batch-size", "auto"],
            ["--plan: ", "--batch-size auto"],
        ),
        (["--plan", "--eval-only"], ["--plan and --eval-only"]),
        (["--use-base-config", "--mlflow"], ["--mlflow, --register: of this"]),
        (["--checkpoint", "none", "--eval-only", "--resume"], ["--resume: of a training"]),
        (["--checkpoint", "none", "--register", "x"], ["--register: is of MLflow"]),
        (["--use-base-config", "--recipe", "auto"], ["--use-base-config and --recipe: give one"]),
    ],
)
def test_what_does_not_go_together(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words, said
) -> None:
    """Refused before anything is read or written."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # mlflow leaves it to its process
    done = command("train", *words, "--output-dir", tmp_path / "out")
    assert done.code == 2
    assert all(text in done.err for text in said)
    assert not (tmp_path / "out").exists()
