"""Loaders from the package index, installed apart, take all of what is exported for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from app.model.upstream import pin
from tests.deploy.apart import run_apart
from tests.model.published import build_small, video_model, write_sam3

pytestmark = pytest.mark.system


def _load(name: str, file: Path, folder: Path) -> dict[str, Any]:
    line = run_apart(name, folder, "-m", "tests.deploy.other_loaders", name, str(file))
    found: dict[str, Any] = json.loads(line)
    return found


def test_ultralytics_misses_nothing(tmp_path: Path) -> None:
    """Of the full size: each tensor is one number, seen as many."""
    whole = video_model(on_meta=True).state_dict()
    state = {k: torch.zeros(1, dtype=v.dtype).expand(v.shape) for k, v in whole.items()}
    torch.save(state, tmp_path / "sam3.pt")
    found = _load("ultralytics", tmp_path / "sam3.pt", tmp_path)
    assert found["missing"] == [[], []]
    assert min(found["tensors"]) > 700


def test_samgeo_has_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_small(monkeypatch)
    write_sam3(tmp_path / "sam3.pt")
    found = _load("samgeo", tmp_path / "sam3.pt", tmp_path)
    assert found["other"] == []
    assert found["tensors"] > 250


def test_roboflows_package_has_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracker's head for points too, as it is asked for unless somebody says otherwise."""
    build_small(monkeypatch)
    write_sam3(tmp_path / "package" / "weights.pt")
    shutil.copy(pin.bpe_path(), tmp_path / "package" / "bpe_simple_vocab_16e6.txt.gz")
    found = _load("roboflow", tmp_path / "package" / "weights.pt", tmp_path)
    assert found["other"] == []
    assert found["tensors"] > 250 + 309
