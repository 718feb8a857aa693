"""Steps: what accumulates averages, what is not finite stops, what is sampled is everything."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.queries import QueryDataset, collate
from app.errors import UserError
from app.model.build import build_model
from app.training.loop import EpochSampler, Loop, build_accelerator, build_optimizer
from app.training.nonfinite import NotFiniteError
from tests.conftest import TINY


def _loop(shapes: Path, *overrides: str) -> tuple[Loop, QueryDataset]:
    config = load_config([*TINY, *overrides])
    transforms = [instantiate(node) for node in config.transforms.train]
    data = QueryDataset(load_splits(shapes).train, transforms, seed=0)
    torch.manual_seed(0)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    accelerator = build_accelerator(torch.device("cpu"))
    return Loop(config, model, data, accelerator, lr_scale=1.0), data


def _gradients(loop: Loop) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in loop.model.named_parameters() if p.grad is not None}


def test_accumulated_gradients_are_a_mean(shapes: Path) -> None:
    """Also over the last group of an epoch, which may be shorter."""
    loop, data = _loop(shapes, "optim.max_grad_norm=1e9")
    batches = [collate([data[i]]) for i in range(3)]
    torch.manual_seed(7)
    separate = []
    loop.model.train()
    for batch in batches:
        loop._losses(batch)["loss"].backward()
        separate.append(_gradients(loop))
        loop.model.zero_grad(set_to_none=True)
    seen: list[dict[str, torch.Tensor]] = []
    loop.optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(_gradients(loop)))
    torch.manual_seed(7)
    loop._update(batches)
    scale = max(float(gradient.abs().max()) for gradient in seen[0].values())
    for name, gradient in seen[0].items():
        mean = sum(grads[name] for grads in separate) / 3
        assert torch.allclose(gradient, mean, rtol=1e-3, atol=1e-7 * scale), name


def test_steps_in_bfloat16(shapes: Path) -> None:
    """As on a GPU: the loss is near that of float32, the weights stay in float32 and move."""
    losses = {}
    for precision in ("fp32", "bf16"):
        loop, data = _loop(shapes, f"training.precision={precision}")
        before = {name: p.clone() for name, p in loop.model.named_parameters()}
        loop.model.train()
        torch.manual_seed(7)
        losses[precision] = loop._update([collate([data[0], data[1]])]).loss
        after = dict(loop.model.named_parameters())
        assert {p.dtype for p in after.values()} == {torch.float32}
        assert any(not torch.equal(after[name], before[name]) for name in before)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


def test_an_epoch_takes_every_image_once(shapes: Path) -> None:
    for accumulate, updates in ((1, 4), (3, 2), (9, 1)):
        loop, _ = _loop(shapes, "training.batch_size=1", f"training.grad_accum={accumulate}")
        assert loop.updates_per_epoch == updates
        steps = list(loop.run_epoch(0))
        assert len(steps) == updates
        assert sum(step.images for step in steps) == 4


def test_an_error_leaves_no_loading_process(shapes: Path, monkeypatch) -> None:
    """Whoever holds the error holds its frames: the exit would wait for the processes for ever."""
    loop, data = _loop(shapes, "training.num_workers=2")

    def bad(*_: object) -> None:
        raise UserError("bad image")

    monkeypatch.setattr(type(data), "__getitem__", bad)
    with pytest.raises(UserError, match="bad image") as caught:
        list(loop.run_epoch(0))
    assert caught.value.__traceback__ is not None
    assert not multiprocessing.active_children()


def test_gradients_are_clipped(shapes: Path) -> None:
    loop, data = _loop(shapes, "optim.max_grad_norm=0.1")
    norms: list[float] = []

    def norm(*_: object) -> None:
        norms.append(float(torch.cat([g.flatten() for g in _gradients(loop).values()]).norm()))

    loop.optimizer.optimizer.register_step_pre_hook(norm)
    loop.model.train()
    step = loop._update([collate([data[0]])])
    assert step.gradient_norm > 1
    assert norms[0] == pytest.approx(0.1, rel=1e-3)


def test_what_is_not_finite_stops_before_the_update(shapes: Path) -> None:
    loop, data = _loop(shapes)
    with torch.no_grad():
        loop.model.dot_prod_scoring.hs_proj.bias.fill_(float("nan"))
    before = {n: p.clone() for n, p in loop.model.named_parameters()}
    loop.model.train()
    with pytest.raises((FloatingPointError, ValueError)):
        loop._update([collate([data[0]])])
    for name, parameter in loop.model.named_parameters():
        assert torch.equal(parameter, before[name]) or parameter.isnan().any(), name


def test_the_guard_names_the_module(shapes: Path) -> None:
    loop, data = _loop(shapes, "training.check_finite=true")
    with torch.no_grad():
        loop.model.dot_prod_scoring.hs_proj.bias.fill_(float("nan"))
    loop.model.train()
    with pytest.raises(NotFiniteError, match=r"dot_prod_scoring\.hs_proj \(Linear\)"):
        loop._update([collate([data[0]])])


def test_the_guard_leaves_a_sound_step_alone(shapes: Path) -> None:
    """Activation checkpointing recomputes without it, and must find the same tensors."""
    losses = []
    for enabled in ("true", "false"):
        settings = ["model.activation_checkpointing=true", f"training.check_finite={enabled}"]
        loop, data = _loop(shapes, *settings)
        loop.model.train()
        torch.manual_seed(7)
        losses.append(loop._update([collate([data[0]])]).loss)
    assert losses[0] == losses[1]


def test_the_sampler_goes_on_from_a_position() -> None:
    for rank in range(3):
        sampler = EpochSampler(10, seed=1, rank=rank, processes=3)
        whole = list(sampler)
        sampler.first = 2
        assert list(sampler) == whole[2:]


def test_the_average_follows_the_weights(shapes: Path) -> None:
    loop, data = _loop(shapes, "training.ema=0.9")
    assert loop.average is not None
    loop.model.train()
    weight = loop.model.transformer.decoder.norm.weight
    before = expected = weight.detach().clone()
    for update in range(1, 4):
        loop._update([collate([data[0]])])
        decay = min(0.9, update / (10 + update))
        expected = decay * expected + (1 - decay) * weight.detach()
    raw = weight.detach().clone()
    with loop.average.in_place():
        assert torch.allclose(weight, expected, atol=1e-7)
        assert not torch.equal(weight, before)
    assert torch.equal(weight, raw)


def test_the_sampler_shares_out_every_image() -> None:
    for length, processes in ((10, 1), (10, 3), (2, 4)):
        shares = []
        for rank in range(processes):
            sampler = EpochSampler(length, seed=1, rank=rank, processes=processes)
            sampler.epoch = 5
            assert len(list(sampler)) == len(sampler)
            shares.append(list(sampler))
        assert {i for share in shares for _, i in share} == set(range(length))
        assert {epoch for share in shares for epoch, _ in share} == {5}
    first, second = EpochSampler(50, 1, 0, 1), EpochSampler(50, 1, 0, 1)
    assert list(first) == list(second)
    second.epoch = 1
    assert [i for _, i in first] != [i for _, i in second]


def test_learning_rates_are_upstreams_groups() -> None:
    config = load_config()
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optim, lr_scale=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[parameter]] = group["lr"]
            decays[names[parameter]] = group["weight_decay"]
    assert set(rates) == set(names.values())
    assert rates["transformer.decoder.query_embed.weight"] == pytest.approx(8e-5)
    assert rates["backbone.language_backbone.resizer.weight"] == pytest.approx(5e-6)
    assert rates["backbone.vision_backbone.convs.0.conv_1x1.weight"] == pytest.approx(2.5e-5)
    block = "backbone.vision_backbone.trunk.blocks.{}.mlp.fc1.weight"
    for index in range(4):  # a factor of 0.9 for each block further from the output
        assert rates[block.format(index)] == pytest.approx(2.5e-5 * 0.9 ** (4 - index))
    assert rates["backbone.vision_backbone.trunk.pos_embed"] == pytest.approx(2.5e-5)
    assert decays[block.format(0)] == pytest.approx(0.1)
    assert decays["backbone.vision_backbone.trunk.blocks.0.mlp.fc1.bias"] == 0
    assert decays["backbone.vision_backbone.trunk.blocks.0.norm1.weight"] == 0


@pytest.mark.parametrize("loss", ["full", "boxes"])
def test_losses_are_trained_as_configured(shapes: Path, loss: str) -> None:
    loop, data = _loop(shapes, f"loss={loss}")
    loop.model.train()
    loop._losses(collate([data[0], data[1]]))["loss"].backward()
    head = loop.model.segmentation_head.mask_predictor.mask_embed.layers[0].weight
    assert (head.grad is not None) is (loss == "full")
