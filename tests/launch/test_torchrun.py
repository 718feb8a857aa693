"""Several processes on one machine; test_signals starts, stops and resumes two of them."""

from __future__ import annotations

import pytest
import torch

from app.errors import UserError
from app.launch import torchrun


def test_more_gpus_than_there_are(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="this machine has 1"):
        torchrun.relaunch(4, [])
