"""Where and how a model computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from app.config.compose import load_model_config
from app.model.device import choose_threads


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("size", "device", "chosen", "threads"),
    [
        ("nano", "cpu", None, 1),
        ("nano", "cpu", "3", 3),  # by the user
        ("nano", "cuda", None, 3),
        ("small", "cpu", None, 3),
    ],
)
def test_a_narrow_model_computes_on_one_thread(
    three_threads: None,
    monkeypatch: pytest.MonkeyPatch,
    size: str,
    device: str,
    chosen: str | None,
    threads: int,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    choose_threads(torch.device(device), load_model_config(size))
    assert torch.get_num_threads() == threads
