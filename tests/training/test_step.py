"""Steps: what accumulates averages, what is not finite stops, what is sampled is everything."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from sam3.model.data_misc import BatchedDatapoint

from app.datasets.queries import collate
from app.training.nonfinite import NotFiniteError
from tests.helpers import MICRO
from tests.training.updates import Updates, tiny_updates


def _gradients(updates: Updates) -> dict[str, torch.Tensor]:
    return {
        n: p.grad.clone() for n, p in updates.step.model.named_parameters() if p.grad is not None
    }


def test_accumulated_gradients_are_a_mean(shapes: Path) -> None:
    """Also over the last group of an epoch, which may be shorter."""
    updates, data = tiny_updates(shapes, "optim.max_grad_norm=1e9")
    batches = [collate([data[i]]) for i in range(3)]
    torch.manual_seed(7)
    separate = []
    updates.step.model.train()
    for batch in batches:
        updates.step.batch_losses(batch, 0)["loss"].backward()
        separate.append(_gradients(updates))
        updates.step.model.zero_grad(set_to_none=True)
    seen: list[dict[str, torch.Tensor]] = []
    updates.step.optimizer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(_gradients(updates))
    )
    torch.manual_seed(7)
    updates.step(batches, 0)
    scale = max(float(gradient.abs().max()) for gradient in seen[0].values())
    for name, gradient in seen[0].items():
        mean = sum(grads[name] for grads in separate) / 3
        assert torch.allclose(gradient, mean, rtol=1e-3, atol=1e-7 * scale), name


def test_steps_in_bfloat16(shapes: Path) -> None:
    """As on a GPU: the loss is near that of float32, the weights stay in float32 and move."""
    losses = {}
    for precision in ("fp32", "bf16"):
        updates, data = tiny_updates(shapes, f"training.precision={precision}")
        before = {name: p.clone() for name, p in updates.step.model.named_parameters()}
        updates.step.model.train()
        torch.manual_seed(7)
        losses[precision] = updates.step([collate([data[0], data[1]])], 0).loss
        after = dict(updates.step.model.named_parameters())
        assert {p.dtype for p in after.values()} == {torch.float32}
        assert any(not torch.equal(after[name], before[name]) for name in before)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


def _in_float16(shapes: Path, *overrides: str) -> tuple[Updates, list[BatchedDatapoint]]:
    updates, data = tiny_updates(shapes, "training.precision=fp16", *MICRO, *overrides)
    updates.step.set_training()
    return updates, [collate([data[0], data[1]])]


def _set_scale(updates: Updates, scale: float) -> None:
    scaler = updates.step.scaler
    scaler.scale(torch.zeros(()))  # which makes it
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale})


def test_steps_in_float16(shapes: Path) -> None:
    """The scale of the loss is gone again from the gradient that is clipped and applied."""
    losses, norms = {}, {}
    for precision in ("fp32", "fp16"):
        updates, data = tiny_updates(shapes, f"training.precision={precision}", *MICRO)
        updates.step.set_training()
        if precision == "fp16":
            _set_scale(updates, 16.0)
        torch.manual_seed(7)
        done = updates.step([collate([data[0], data[1]])], 0)
        losses[precision], norms[precision] = done.loss, done.gradient_norm
        assert not done.skipped
        assert {p.dtype for p in updates.step.model.parameters()} == {torch.float32}
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp16"] != losses["fp32"]
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.1)


def test_a_gradient_beyond_float16_skips_the_update(shapes: Path) -> None:
    """It changes nothing but the scale: not the weights, their average, AdamW or the schedule."""
    updates, batches = _in_float16(shapes, "training.ema=0.9")
    step = updates.step
    _set_scale(updates, 16.0)
    assert not step(batches, 0).skipped
    _set_scale(updates, 2.0**100)
    before = {name: p.clone() for name, p in step.model.named_parameters()}
    state = copy.deepcopy(step.state_dict())
    done = step(batches, 0)
    assert done.skipped
    assert math.isfinite(done.loss)
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())
    after = step.state_dict()
    assert after["scaler"]["scale"] == state["scaler"]["scale"] / 2
    assert after["scheduler"]["last_epoch"] == state["scheduler"]["last_epoch"] == 1
    assert after["average"]["updates"] == 1
    for number, moments in after["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, state["optimizer"]["state"][number][name])
    _set_scale(updates, 16.0)
    assert not step(batches, 0).skipped
    assert any(not torch.equal(p, before[name]) for name, p in step.model.named_parameters())


def test_a_gradient_that_no_scale_makes_finite_is_an_error(shapes: Path) -> None:
    updates, batches = _in_float16(shapes)
    bias = updates.step.model.dot_prod_scoring.hs_proj.bias
    bias.register_hook(lambda gradient: gradient * float("inf"))
    _set_scale(updates, 2.0)
    assert updates.step(batches, 0).skipped
    with pytest.raises(NotFiniteError, match=r"dot_prod_scoring\.hs_proj\.bias .*precision=fp32"):
        updates.step(batches, 0)


def test_memory_that_runs_out_leaves_the_step_as_it_was(shapes: Path) -> None:
    settings = ("model.dropout=0.2", "training.grad_accum=2", *MICRO)
    updates, data = tiny_updates(shapes, *settings)
    step, batches = updates.step, [collate([data[0]]), collate([data[1]])]
    step.set_training()
    calls: list[int] = []

    def full(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError

    hook = step.module.dot_prod_scoring.register_forward_hook(full)
    torch.manual_seed(7)
    with pytest.raises(torch.OutOfMemoryError):
        step(batches, 0)
    hook.remove()
    assert step.is_whole
    assert not _gradients(updates)
    after = step(batches, 0).loss  # as if nothing had been
    again, _ = tiny_updates(shapes, *settings)
    again.step.set_training()
    torch.manual_seed(7)
    assert again.step(batches, 0).loss == after


def test_gradients_are_clipped(shapes: Path) -> None:
    updates, data = tiny_updates(shapes, "optim.max_grad_norm=0.1")
    norms: list[float] = []

    def norm(*_: object) -> None:
        norms.append(float(torch.cat([g.flatten() for g in _gradients(updates).values()]).norm()))

    updates.step.optimizer.optimizer.register_step_pre_hook(norm)
    updates.step.model.train()
    step = updates.step([collate([data[0]])], 0)
    assert step.gradient_norm > 1
    assert norms[0] == pytest.approx(0.1, rel=1e-3)


def test_what_is_not_finite_stops_before_the_update(shapes: Path) -> None:
    updates, data = tiny_updates(shapes)
    with torch.no_grad():
        updates.step.model.dot_prod_scoring.hs_proj.bias.fill_(float("nan"))
    before = {n: p.clone() for n, p in updates.step.model.named_parameters()}
    updates.step.model.train()
    with pytest.raises((FloatingPointError, ValueError)):
        updates.step([collate([data[0]])], 0)
    for name, parameter in updates.step.model.named_parameters():
        assert torch.equal(parameter, before[name]) or parameter.isnan().any(), name


def test_the_guard_names_the_module(shapes: Path) -> None:
    updates, data = tiny_updates(shapes, "training.check_finite=true")
    with torch.no_grad():
        updates.step.model.dot_prod_scoring.hs_proj.bias.fill_(float("nan"))
    updates.step.model.train()
    with pytest.raises(NotFiniteError, match=r"dot_prod_scoring\.hs_proj \(Linear\)"):
        updates.step([collate([data[0]])], 0)


def test_the_guard_leaves_a_sound_step_alone(shapes: Path) -> None:
    """Activation checkpointing recomputes without it, and must find the same tensors."""
    losses = []
    for enabled in ("true", "false"):
        settings = ["model.activation_checkpointing=true", f"training.check_finite={enabled}"]
        updates, data = tiny_updates(shapes, *settings)
        updates.step.model.train()
        torch.manual_seed(7)
        losses.append(updates.step([collate([data[0]])], 0).loss)
    assert losses[0] == losses[1]


def test_the_average_follows_the_weights(shapes: Path) -> None:
    updates, data = tiny_updates(shapes, "training.ema=0.9")
    assert updates.step.ema is not None
    updates.step.model.train()
    weight = updates.step.model.transformer.decoder.norm.weight
    before = expected = weight.detach().clone()
    for update in range(1, 4):
        updates.step([collate([data[0]])], 0)
        decay = min(0.9, update / (10 + update))
        expected = decay * expected + (1 - decay) * weight.detach()
    raw = weight.detach().clone()
    with updates.step.ema.in_place():
        assert torch.allclose(weight, expected, atol=1e-7)
        assert not torch.equal(weight, before)
    assert torch.equal(weight, raw)


@pytest.mark.parametrize("loss", ["full", "boxes"])
def test_losses_are_trained_as_configured(shapes: Path, loss: str) -> None:
    updates, data = tiny_updates(shapes, f"loss={loss}")
    updates.step.model.train()
    updates.step.batch_losses(collate([data[0], data[1]]), 0)["loss"].backward()
    head = updates.step.model.segmentation_head.mask_predictor.mask_embed.layers[0].weight
    assert (head.grad is not None) is (loss == "full")
