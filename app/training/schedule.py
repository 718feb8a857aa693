"""Learning rate over a run: a factor of each group's own rate, valid for any number of updates."""

from __future__ import annotations

import math

from app.config.schema import ScheduleConfig


def learning_rate_factor(update: int, total: int, config: ScheduleConfig) -> float:
    """Factor in (0, 1] for update 0 .. total - 1.

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
