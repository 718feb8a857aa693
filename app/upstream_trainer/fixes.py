"""Fixes that upstream's own Trainer alone needs, beside those of `model/upstream/fixes.py`."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def apply_trainer_fixes() -> None:
    """Mend upstream's Trainer in place, once a process. Each function below is one fix."""
    for fix in (
        _schedule_of_any_length,
        _dummy_loss_on_any_device,
        _no_environment_in_logs,
        _trainer_without_cuda,
    ):
        fix()


def _schedule_of_any_length() -> None:
    """Mend the schedule: schedulers.py:24-26 divide by zero where a run is all warm-up."""
    from sam3.train.optim.schedulers import InverseSquareRootParamScheduler

    original = InverseSquareRootParamScheduler.__call__

    @functools.wraps(original)
    def call(self: Any, step: int, where: float) -> float:
        if where > 0 and step / where == self.warmup_steps:
            where = where * (1 - 1e-9)  # leaves the rate as it is, and the divisor above zero
        return original(self, step, where)

    InverseSquareRootParamScheduler.__call__ = call


def _dummy_loss_on_any_device() -> None:
    """Mend DummyLoss: sam3_loss.py:18 puts its zero on "cuda" by default."""
    import torch
    from sam3.train.loss.sam3_loss import DummyLoss

    original = DummyLoss.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, device: str = "cuda", **kwargs: Any) -> None:
        device = device if torch.cuda.is_available() else "cpu"
        original(self, *args, device=device, **kwargs)

    DummyLoss.__init__ = init


def _no_environment_in_logs() -> None:
    """Log no environment: trainer.py:214 logs every variable, tokens and cloud keys included."""
    from sam3.train import trainer
    from sam3.train.utils import train_utils

    trainer.log_env_variables = train_utils.log_env_variables = lambda: None


def _trainer_without_cuda() -> None:
    """Mend the memory meter: train_utils.py:200-206 ask CUDA for its peak at each step."""
    import torch
    from sam3.train.utils.train_utils import MemMeter

    original = MemMeter.update

    @functools.wraps(original)
    def update(self: Any, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            original(self, *args, **kwargs)

    MemMeter.update = update
