"""AdamW and its learning rates over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from sam3.train.optim.optimizer import construct_optimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from app.config.schema import OptimConfig, ScheduleConfig

TEXT, VISION = "backbone.language_backbone.", "backbone.vision_backbone."


def build_optimizer(model: nn.Module, config: OptimConfig, lr_scale: float) -> Optimizer:
    """Return AdamW with upstream's groups: three learning rates, layer decay, no decay of biases.

    Frozen parameters are in none of the groups. They are taken out afterwards because upstream
    asserts that its groups cover all parameters, and that each of its patterns matches
    (optimizer.py:183, 241).
    """
    parts = OmegaConf.create(
        {
            "optimizer": config.optimizer,
            "options": _matching_options(config.options, model),
            "modifiers": config.param_group_modifiers,
        }
    )
    # Upstream's wrapper sets each group's rate from its own schedule once, and is then left behind.
    optimizer = construct_optimizer(
        model, parts.optimizer, parts.options, parts.modifiers
    ).optimizer
    for group in optimizer.param_groups:
        group["lr"] *= lr_scale
        group["params"] = [p for p in group["params"] if p.requires_grad]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    if type(optimizer) is AdamW and optimizer.defaults["fused"]:
        optimizer.__class__ = _CountingAtOnce
        optimizer._patch_step_function()  # for hooks of a step
    return optimizer


class _CountingAtOnce(AdamW):
    """torch's fused AdamW, but that it counts the updates of all groups at once.

    Layer decay makes 70 groups, and torch counts a group's updates by a launch of its own. In
    float16 the gradient scaler sets `found_inf`, with which nothing is updated nor counted.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        updates = []
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            if lists[0]:
                updates.append((group, lists))
        counts = [count for _, lists in updates for count in lists[-1]]
        if not counts:
            return
        torch._foreach_add_(counts, 1)
        for group, lists in updates:
            beta1, beta2 = group["betas"]
            settings = {key: group[key] for key in ("amsgrad", "lr", "eps", "weight_decay")}
            settings |= {"maximize": group["maximize"], "beta1": beta1, "beta2": beta2}
            torch._fused_adamw_(*lists, **settings, grad_scale=scale, found_inf=found_inf)
        if found_inf is not None:
            torch._foreach_sub_(counts, [found_inf] * len(counts))


def learning_rates(config: OptimConfig, model: nn.Module, lr_scale: float) -> dict[str, float]:
    """Return the highest learning rate of each part that is trained: detector, vision, text."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    text = {name for name in trained if TEXT in name}
    vision = {name for name in trained if VISION in name}
    parts = {
        "detector": (config.lr, len(trained) > len(text) + len(vision)),
        "vision": (config.lr_vision, bool(vision)),
        "text": (config.lr_text, bool(text)),
    }
    return {part: rate * lr_scale for part, (rate, is_trained) in parts.items() if is_trained}


def _matching_options(options: Mapping[str, Any], model: nn.Module) -> dict[str, list[Any]]:
    """Leave out the text encoder's options where stored words are in its place."""
    if any(name.startswith(TEXT) for name, _ in model.named_parameters()):
        return dict(options)
    return {
        kind: [entry for entry in entries if entry.get("param_names") != [f"{TEXT}*"]]
        for kind, entries in options.items()
    }


def build_scheduler(optimizer: Optimizer, config: ScheduleConfig, total: int) -> LambdaLR:
    """Return the schedule of a run of `total` updates; an extended run keeps the last rate."""
    return LambdaLR(
        optimizer, lambda update: learning_rate_factor(min(update, total - 1), total, config)
    )


def learning_rate_factor(update: int, total: int, config: ScheduleConfig) -> float:
    """Return the factor in (0, 1] of each group's own rate, for update 0 .. total - 1.

    Upstream's own schedule divides by zero when a run is as long as its warm-up
    (schedulers.py:24-26), and its first update has a rate of 0. Here warm-up and cool-down take at
    most a tenth of the run each, and no update is wasted.
    """
    warmup = min(config.warmup_steps, total // 10)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    done = update - warmup
    left = (total - update) / max(total - warmup, 1)  # 1 at the end of the warm-up, > 0 to the last
    if config.name == "constant":
        return 1.0
    if config.name == "linear":
        return min(left, 1.0)
    if config.name == "cosine":
        return 0.5 * (1 - math.cos(math.pi * min(left, 1.0)))
    cooldown = min(config.cooldown_steps, total // 10)
    ending = min(1.0, (total - update) / (cooldown + 1))
    return ending / math.sqrt(1 + done / config.timescale)
