"""Upstream's Trainer, mended in place."""

from __future__ import annotations

import logging

import pytest
from sam3.train.optim.schedulers import InverseSquareRootParamScheduler
from sam3.train.utils import train_utils

from app.upstream_trainer.fixes import apply_trainer_fixes


@pytest.fixture(autouse=True)
def _mended() -> None:
    apply_trainer_fixes()


def test_no_value_of_the_environment_is_logged(caplog, monkeypatch) -> None:
    from sam3.train import trainer

    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with caplog.at_level(logging.DEBUG):
        trainer.log_env_variables()
        train_utils.log_env_variables()
    assert "hf_canary" not in caplog.text


def test_upstreams_schedule_takes_a_run_as_long_as_its_warmup() -> None:
    schedule = InverseSquareRootParamScheduler(1.0, 20, 0, timescale=20)
    assert schedule(step=10, where=0.5) == pytest.approx(0.5)
    assert schedule(step=30, where=0.5) == pytest.approx((20 / 30) ** 0.5)
