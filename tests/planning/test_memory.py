"""The bytes of a step: hand-worked ones, and those of the same step done for real."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torch.nn import functional as F

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.queries import collate
from app.model.build import build_model
from app.model.fake import FakeMode
from app.model.upstream import fixes
from app.planning.memory import LiveBytes, StepBytes, kernels_of
from app.training import losses as training_losses
from app.training import method
from app.training.batches import query_dataset
from app.training.losses import LabelLosses
from app.training.step import build_accelerator
from tests.helpers import MICRO, TINY

MIB = 1 << 20
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("fake", [False, True])
def test_hand_worked_bytes_of_two_layers(fake: bool) -> None:
    with FakeMode() if fake else nullcontext():
        first, last = nn.Linear(256, 1024, bias=False), nn.Linear(1024, 256, bias=False)
        x = torch.empty(1024, 256)
        live = LiveBytes([first.weight, last.weight, x])
        with live:
            hidden = first(x)  # 4 MiB
            assert live.now == 4 * MIB
            y = last(hidden.relu_())  # in place; 1 MiB more
            assert (live.now, live.peak) == (5 * MIB, 5 * MIB)
            loss = y.sum()
            del y
            assert live.now == 4 * MIB + 4  # the loss is a float
            view = first.weight.T[:3]  # of what is known
            assert live.now == 4 * MIB + 4
            loss.backward()
            del hidden, loss, view
        assert live.now == 2 * MIB  # the gradients
        assert live.peak > 8 * MIB  # the hidden values and their gradient at once


@pytest.mark.parametrize(
    ("overrides", "frozen"),
    [([], []), (["loss=boxes"], []), (["training.precision=bf16"], ["vision", "text"])],
)
def test_a_step_without_contents_takes_what_a_real_one_takes(
    overrides: list[str], frozen: list[str], shapes: Path
) -> None:
    config = load_config([*TINY, "transforms=none", "model.dropout=0", *overrides])
    precision = torch.bfloat16 if "bf16" in str(overrides) else torch.float32
    data = query_dataset(config, load_splits(shapes).train)
    batch = collate([data[index] for index in range(3)])
    model = build_model(config.model, device="meta")
    method.freeze(model, frozen)
    foretold = StepBytes()(config, model, batch, precision, CPU)

    build_accelerator(torch.device("cpu"))
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    method.freeze(model, frozen)
    method.set_training(model)
    criterion = instantiate(config.loss.criterion, _convert_="all")
    live = LiveBytes([*model.parameters(), *model.buffers()])
    with live:
        LabelLosses(criterion, precision)(model, batch)["loss"].backward()
    # A real matcher leaves out what it finds no match for.
    assert foretold == pytest.approx(live.peak, rel=0.05)


def test_hand_worked_bytes_of_attention_on_cuda() -> None:
    """What flash attention makes: no scores, and of each query one number for the way back."""
    with FakeMode():
        inputs = [torch.empty(1, 2, 1024, 128, requires_grad=True) for _ in range(3)]  # 1 MiB each
        live, sums = LiveBytes(inputs), 2 * 1024 * 4
        with live, kernels_of(CUDA):
            outputs = F.scaled_dot_product_attention(*inputs, dropout_p=0.5)
            assert live.now == live.peak == MIB + sums
            outputs.backward(torch.empty_like(outputs))
        gradients, added = 3 * MIB, MIB
        assert live.peak == 2 * MIB + sums + gradients + added
        with LiveBytes(inputs) as live, kernels_of(CPU):
            F.scaled_dot_product_attention(*inputs, dropout_p=0.5)
        assert live.peak > 2 * 1024 * 1024 * 4  # the scores


def test_hand_worked_bytes_of_autocast_on_cuda() -> None:
    """It normalizes in float32, and keeps the inputs in it as well; a CPU's does in bfloat16."""
    with FakeMode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(1024, 256, dtype=torch.bfloat16, requires_grad=True)
        with LiveBytes([x]) as live, kernels_of(CUDA):
            y = F.layer_norm(x, (256,))
        assert (y.dtype, live.now) == (torch.float32, 2 * MIB + 2 * 1024 * 4)
        assert F.layer_norm(x, (256,)).dtype == torch.bfloat16


def test_dropout_costs_cuda_no_scores(shapes: Path) -> None:
    """On a CPU a step with dropout makes them whole; without, it does as CUDA always does."""
    settings = [*MICRO, "model.resolution=256", "transforms=none"]  # 1024 tokens
    bytes_of = {}
    for dropout, device in ((0.0, CPU), (0.1, CUDA), (0.1, CPU)):
        config = load_config([*settings, f"model.dropout={dropout}"])
        batch = collate([query_dataset(config, load_splits(shapes).train)[0]])
        model = build_model(config.model, device="meta")
        bytes_of[dropout, device] = StepBytes()(config, model, batch, torch.float32, device)
    assert bytes_of[0.1, CUDA] == pytest.approx(bytes_of[0.0, CPU], rel=0.15)
    assert bytes_of[0.1, CPU] > 1.5 * bytes_of[0.1, CUDA]


def test_the_mask_head_is_made_anew_few_prompts_at_a_time(
    shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and gradients as all at once, in less memory the more prompts there are."""
    settings = [*TINY, "transforms=none", "model.dropout=0", "model.activation_checkpointing=true"]
    config = load_config(settings)
    data = query_dataset(config, load_splits(shapes).train)
    batch = collate([data[index] for index in range(3)])
    build_accelerator(torch.device("cpu"))
    found, together = [], fixes._few_prompts_at_a_time
    for way in (together, lambda head, **inputs: head(**inputs)):
        monkeypatch.setattr(fixes, "_few_prompts_at_a_time", way)
        torch.manual_seed(0)
        model = build_model(config.model, matcher=instantiate(config.loss.matcher))
        criterion = instantiate(config.loss.criterion, _convert_="all")
        live = LiveBytes([*model.parameters(), *model.buffers()])
        with live:
            loss = LabelLosses(criterion, torch.float32)(model, batch)["loss"]
            loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients, live.peak))
    (loss, gradients, peak), (expected, theirs, all_at_once) = found
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == theirs.keys()
    for name, value in gradients.items():
        assert torch.allclose(value, theirs[name], rtol=1e-3, atol=1e-3), name
    assert peak < all_at_once


def test_weights_in_bfloat16_do_not_pile_up(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast's own cache keeps all of them to the end of the forward pass."""
    settings = [*TINY, "model.text.width=512", "model.activation_checkpointing=true"]
    config = load_config(settings)
    batch = collate([query_dataset(config, load_splits(shapes).train)[0]])
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    criterion = instantiate(config.loss.criterion, _convert_="all")
    peaks = []
    for autocast in (
        training_losses.autocast,
        lambda *_, **__: torch.autocast("cpu", torch.bfloat16),
    ):
        monkeypatch.setattr(training_losses, "autocast", autocast)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            LabelLosses(criterion, torch.bfloat16)(model, batch)
        peaks.append(live.peak)
    layers = model.backbone.language_backbone.encoder.transformer.parameters()
    assert peaks[1] - peaks[0] > 2 * sum(p.numel() for p in layers)
