"""Every tensor of a step's losses is on the model's device, seen without a GPU or a compiler.

The tensors are torch's own fake ones, on a CUDA device that is not there. The backward pass is left
out, because autograd asks the driver for a stream; the null GPU has it (test_commands.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from sam3.model import decoder, geometry_encoders, vl_combiner
from sam3.model.utils.misc import copy_data_to_device
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from app.config.compose import load_config
from app.config.schema import Config
from app.datasets.build import load_splits
from app.datasets.queries import collate
from app.model.build import build_model
from app.model.fake import KnownValues
from app.planning.memory import AnyMatcher
from app.training import method
from app.training.batches import query_dataset
from app.training.losses import LabelLosses
from tests.helpers import MICRO

CUDA = torch.device("cuda", 0)


class OnDevice(AnyMatcher):
    """Answers on the device of what it matches."""

    def forward(self, outputs: dict[str, Tensor], *args: Any, **options: Any) -> tuple[Tensor, ...]:
        device = outputs["pred_logits"].device
        return tuple(index.to(device) for index in super().forward(outputs, *args, **options))


class EveryMask(TorchFunctionMode):
    """Takes all of a tensor for what a mask chooses of it: how many that are is a value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = args[1] if func is Tensor.__getitem__ else None
        if isinstance(chosen, Tensor) and chosen.dtype == torch.bool:
            assert args[0].device == chosen.device
            return args[0]
        return func(*args, **(kwargs or {}))


def _faked(value: Any, mode: FakeTensorMode) -> Any:
    """Return a batch with a fake tensor for each of its tensors."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: _faked(part, mode) for name, part in parts.items()})
    return type(value)(_faked(part, mode) for part in value) if isinstance(value, list) else value


def _losses(config: Config, dataset: Path) -> dict[str, Tensor]:
    data = query_dataset(config, load_splits(dataset).train)
    batch = collate([data[0], data[1]])
    objects = batch.find_targets[0].num_boxes.tolist()
    criterion: Any = instantiate(config.loss.criterion, _convert_="all")
    model = build_model(config.model, device="meta")
    grid = config.model.resolution // config.model.vision.patch_size
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = model.to_empty(device=CUDA)
        model.matcher = criterion.matcher = OnDevice(objects, 1)
        criterion.o2m_matcher = OnDevice(objects, criterion.o2m_matcher.topk)
        method.set_training(model)
        on_device = copy_data_to_device(_faked(batch, mode), CUDA)
        with KnownValues(len(batch.img_batch), grid), EveryMask():
            return LabelLosses(criterion, torch.float32)(model, on_device)


def _coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_cpu(height: int, width: int, device: Any) -> tuple[Tensor, Tensor]:
        return torch.arange(height) / height, torch.arange(width) / width

    monkeypatch.setattr(decoder.TransformerDecoder, "_get_coords", staticmethod(on_cpu))


def _text(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = vl_combiner.SAM3VLBackbone.forward_text

    def on_cpu(self: Any, captions: Any, device: Any = None) -> Any:
        return forward(self, captions, device="cpu")

    monkeypatch.setattr(vl_combiner.SAM3VLBackbone, "forward_text", on_cpu)


def _prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = geometry_encoders.SequenceGeometryEncoder.forward

    def by_cpu(self: Any, **inputs: Any) -> Any:
        tokens, mask = encode(self, **inputs)
        return tokens * torch.ones(tokens.shape[-1]), mask

    monkeypatch.setattr(geometry_encoders.SequenceGeometryEncoder, "forward", by_cpu)


@pytest.fixture
def config() -> Config:
    return load_config([*MICRO, "transforms=none"])


def test_losses_of_a_step(config: Config, shapes: Path) -> None:
    losses = _losses(config, shapes)
    assert len(losses) > 5
    assert {value.device for value in losses.values()} == {CUDA}


@pytest.mark.parametrize("plant", [_coordinates, _text, _prompt])
def test_a_tensor_on_the_cpu_is_seen(
    config: Config, shapes: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None]
) -> None:
    build_model(config.model, device="meta")  # mends upstream, which the fault must come after
    plant(monkeypatch)
    with pytest.raises(RuntimeError, match="device"):
        _losses(config, shapes)
