"""The compiled trunk beside the one as written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.config.compose import load_config
from app.datasets.queries import collate
from app.training import compiling, method
from tests.helpers import MICRO, log_lines
from tests.training.conftest import Train
from tests.training.updates import Updates, tiny_updates

# What is recomputed is compiled as well.
ONE_BLOCK = (
    *("model.vision.depth=1", "model.vision.global_blocks=[0]"),
    "model.activation_checkpointing=[vision]",
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _compile(updates: Updates) -> None:
    method.set_training(updates.step.module)
    compiling.compile_trunk(updates.step.module, 2, 64, torch.float32)


@pytest.mark.parametrize(
    ("words", "device", "updates", "cached", "expected"),
    [
        ([], CUDA, compiling.LEAST_UPDATES, False, True),
        ([], CUDA, compiling.LEAST_UPDATES - 1, False, False),
        ([], CPU, compiling.LEAST_UPDATES, False, False),
        ([], CUDA, compiling.LEAST_UPDATES, True, False),
        (["training.compile=true"], CPU, 1, False, True),
        (["training.compile=true"], CPU, 0, False, False),
        (["training.compile=false"], CUDA, compiling.LEAST_UPDATES, False, False),
        (["training.compile=true", "training.check_finite=true"], CUDA, 9, False, False),
    ],
)
def test_when(
    words: list[str], device: torch.device, updates: int, cached: bool, expected: bool
) -> None:
    assert compiling.is_wanted(load_config(words), device, updates, cached=cached) == expected


def test_what_cannot_be_compiled_runs_as_written(
    shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates, data = tiny_updates(shapes, *MICRO)
    trunk = updates.step.module.backbone.vision_backbone.trunk
    before = trunk.forward
    monkeypatch.setattr(trunk.patch_embed, "forward", torch.compiler.disable(lambda x: x))
    lines = log_lines(monkeypatch)
    state = torch.get_rng_state()
    _compile(updates)
    assert torch.equal(state, torch.get_rng_state())
    assert trunk.forward == before
    assert lines == [lines[0]]
    assert lines[0].startswith("note: the trunk is not compiled (")
    monkeypatch.undo()
    assert updates.step([collate([data[0], data[1]])], 0).images == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_step_is_the_same_up_to_rounding(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Tensor]] = []
    compiled_for: list[int] = []  # images of each call

    def seen(function: Callable[[Tensor], Any], **options: Any) -> Callable[[Tensor], Any]:
        compiled = torch_compile(function, **options)

        def call(pixels: Tensor) -> Any:
            compiled_for.append(len(pixels))
            return compiled(pixels)

        return call

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", seen)
    for compiles in (False, True):
        updates, data = tiny_updates(shapes, *MICRO, *ONE_BLOCK, "transforms=none")
        module = updates.step.module
        if compiles:
            _compile(updates)
        method.set_training(module)
        for images in ((0, 1), (2,)):  # the last batch of an epoch may be smaller
            torch.manual_seed(7)
            batch = collate([data[index] for index in images])
            with torch._dynamo.config.patch(error_on_recompile=compiles):
                updates.step.batch_losses(batch, 0)["loss"].backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert compiled_for == [2, 2]  # to compile it, and the whole batch
    for name, gradient in found[0].items():
        tolerance = max(1e-3 * float(gradient.abs().max()), 1e-5)
        assert torch.allclose(gradient, found[1][name], rtol=1e-2, atol=tolerance), name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_run_says_it(train: Train) -> None:
    done = train("--epochs", 1, "training.compile=true", *ONE_BLOCK)
    assert done.code == 0, done.err
    assert "the trunk is compiled (" in done.out
