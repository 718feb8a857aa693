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
from app.training import prepare as preparing
from app.training.prepare import BATCH_SIZE, RECOMPUTED, Prepared, Request
from tests.helpers import MICRO, log_lines
from tests.planning.test_plan import _small

AUTO = "model.activation_checkpointing=auto"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is only asked what it is: its steps are counted, not done."""
    for module in (fit, planning, preparing):
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
        str(choice): planner.plan(prepared.decide({RECOMPUTED: choice}).config).memory.total
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


@pytest.mark.parametrize(
    ("settings", "room", "expected"),
    [
        ([], 4, (2, 1)),  # 4 images in 20 epochs: a larger batch would leave too few updates
        (["training.epochs=500"], 4, (4, 1)),
        (["training.epochs=500"], 3, (2, 2)),
        ([], 1, (1, 2)),
        ([], 0, (1, 2)),
        (["training.grad_accum=4"], 4, (4, 2)),  # of a recipe's
    ],
)
def test_a_gpu_takes_what_fits_of_an_updates_images(
    gpu: None,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    room: int,
    expected: tuple[int, int],
) -> None:
    words = [*MICRO, "training.precision=fp32", *settings]
    prepared = _prepared(load_config(words), shapes)
    assert prepared.chooses_by_memory
    planner = Planner(prepared)
    needed = planner.plan(prepared.decide({BATCH_SIZE: max(room, 1)}).config).memory.total
    _small(monkeypatch, (needed * 1.1 if room else 0) + 1 - planning.CUDA_CONTEXT)
    lines = log_lines(monkeypatch)
    decided = fit.choose(prepared, planner)
    training = decided.config.training
    assert (training.batch_size, training.grad_accum) == expected
    assert "--batch-size decides by hand" in lines[-1]
    assert not decided.chooses_batch


@pytest.mark.parametrize("words", [["training.batch_size=1"], ["training.grad_accum=3"]])
def test_a_batch_that_is_given_stays(
    gpu: None, shapes: Path, tmp_path: Path, words: list[str]
) -> None:
    """On the command line, or in a file."""
    config, splits = load_config([*MICRO, *words]), load_splits(shapes)
    file = tmp_path / "own.yaml"
    key, _, value = words[0].removeprefix("training.").partition("=")
    file.write_text(f"training: {{{key}: {value}}}\n")
    for request in (Request(words), Request((), file=file)):
        assert not Prepared(request, config, splits, None, ()).chooses_batch
    assert Prepared(Request(()), config, splits, None, ()).chooses_batch


@pytest.mark.parametrize(("native", "half"), [(True, "bf16"), (False, "fp16")])
def test_the_half_that_is_proposed_is_one_that_the_gpu_multiplies_in(
    gpu: None, shapes: Path, monkeypatch: pytest.MonkeyPatch, native: bool, half: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    words = [*MICRO, "model.resolution=128", "training.precision=fp32", "checkpoint=none"]
    words += ["training.batch_size=1"]
    prepared = Prepared(Request(words), load_config(words), load_splits(shapes), None, (*words,))
    planner = Planner(prepared)
    enough = planner.plan(prepared.configure([f"training.precision={half}"])).memory.total
    _small(monkeypatch, enough + 1 - planning.CUDA_CONTEXT)
    ways = planner.ways_to_fit(planner.plan())
    assert ways[0].startswith(f"  training.precision={half} (")


def test_a_run_that_goes_on_may_have_less_memory(gpu: None, shapes: Path, tmp_path: Path) -> None:
    """What its folder's settings say is a choice of another machine, unless it is asked for."""
    words = [*MICRO, f"output_dir={tmp_path}", "model.activation_checkpointing=false"]
    config, splits = load_config(words), load_splits(shapes)
    file = tmp_path / "config_resolved.yaml"
    file.write_text("training: {batch_size: 1}\n")
    for given, is_open in (([], True), (words, False)):
        request = Request(given, file=file, resume="all")
        assert Prepared(request, config, splits, None, ()).chooses_recomputed == is_open
    assert not Prepared(Request(()), config, splits, None, ()).chooses_recomputed
