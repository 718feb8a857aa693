"""What is decided by the memory of a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.config.compose import load_config, load_model_config
from app.config.schema import Config
from app.datasets.build import load_splits
from app.planning import fit
from app.planning import plan as planning
from app.planning.plan import Planner
from app.training.prepare import Prepared, Request
from tests.helpers import MICRO, log_lines
from tests.planning.test_plan import _small

AUTO = "model.activation_checkpointing=auto"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is only asked what it is: its steps are counted, not done."""
    for module in (fit, planning):
        monkeypatch.setattr(module, "choose_device", lambda *_: torch.device("cuda"))
    _small(monkeypatch, 1e12)


def _prepared(config: Config, shapes: Path) -> Prepared:
    return Prepared(Request(()), config, load_splits(shapes), Path("model.safetensors"), ())


def test_a_gpu_computes_anew_what_its_memory_wants(
    gpu: None, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*MICRO, "model.resolution=128", "training.precision=fp32", AUTO]
    prepared = _prepared(load_config(words), shapes)
    planner = Planner(prepared)
    needed = {
        str(choice): planner.plan(fit.recomputing(prepared.config, choice)).memory.total
        for choice in (True, ["vision"], False)
    }
    assert needed["True"] < needed["['vision']"] < needed["False"]
    lines = log_lines(monkeypatch)
    for enough, choice, said in (
        ("False", False, "nothing"),
        ("['vision']", ["vision"], "vision"),
        ("True", True, "everything"),
    ):
        # With the margin, and without the context that the driver counts as used.
        _small(monkeypatch, needed[enough] * 1.1 + 1 - planning.CUDA_CONTEXT)
        decided = fit.choose_recomputed(prepared, planner)
        assert decided.config.model.activation_checkpointing == choice
        assert load_config([*words, *decided.decided]).model == decided.config.model
        assert f"recomputed in the backward pass: {said} (" in lines[-1]
    _small(monkeypatch, 0)
    assert fit.choose_recomputed(prepared, planner).config.model.activation_checkpointing is True
    assert "not even this fits" in lines[-1]


@pytest.mark.parametrize(("size", "expected"), [("sam3", True), ("nano", False)])
def test_a_cpu_computes_wide_models_anew(size: str, expected: bool, shapes: Path) -> None:
    model = load_model_config(size).model_copy(update={"activation_checkpointing": "auto"})
    prepared = _prepared(load_config(["training.device=cpu"], None, model), shapes)
    decided = fit.choose_recomputed(prepared, Planner(prepared))
    assert decided.config.model.activation_checkpointing is expected


def test_what_was_asked_for_stays(shapes: Path) -> None:
    prepared = _prepared(load_config(["model.activation_checkpointing=[text]"]), shapes)
    assert fit.choose_recomputed(prepared, Planner(prepared)) is prepared
