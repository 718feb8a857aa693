"""Files as Meta publishes them, of random tensors, as small as upstream's builders can be made."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sam3 import model_builder
from sam3.model.text_encoder_ve import VETextEncoder
from sam3.model.vitdet import ViT
from torch import Tensor, nn

from app.config.compose import load_model_config
from app.config.schema import ModelConfig
from app.model import build
from app.model.upstream import fixes, pin

NAMES = Path(__file__).parent / "sam31_names.txt"
# Widths as upstream's builders have them written out, over nano's trunk and text encoder.
SMALL: ModelConfig = load_model_config("nano").model_copy(
    update={
        **{name: getattr(load_model_config("sam3"), name) for name in ("d_model", "feedforward")},
        **dict.fromkeys(("encoder_layers", "decoder_layers", "geometry_layers"), 1),
        "num_heads": 8,
        "num_queries": 8,
    }
)


def build_small(monkeypatch: pytest.MonkeyPatch, size: ModelConfig = SMALL) -> None:
    """Make upstream's builders build SMALL, or a size that is SMALL but for trunk and text."""

    def trunk(compile_mode: object = None) -> ViT:
        del compile_mode
        return build._vision(size).trunk  # type: ignore[return-value]

    def text(bpe_path: str) -> VETextEncoder:
        del bpe_path
        return build._text(size)  # type: ignore[return-value]

    monkeypatch.setattr(model_builder, "_create_vit_backbone", trunk)
    monkeypatch.setattr(model_builder, "_create_text_encoder", text)
    for name, changed in (
        ("TransformerEncoderFusion", {"num_layers": SMALL.encoder_layers}),
        ("SequenceGeometryEncoder", {"num_layers": SMALL.geometry_layers}),
        (
            "TransformerDecoder",
            {"num_layers": SMALL.decoder_layers, "num_queries": SMALL.num_queries},
        ),
    ):
        monkeypatch.setattr(model_builder, name, _with(getattr(model_builder, name), changed))


def _with(cls: Callable[..., Any], changed: dict[str, Any]) -> Callable[..., Any]:
    return lambda **given: cls(**given | changed)


def video_model(*, on_meta: bool = False) -> nn.Module:
    """Return what upstream's own builder makes for videos, of random weights."""
    fixes.apply_fixes()
    device = "meta" if on_meta else "cpu"
    on_device = fixes.building_on_meta() if on_meta else contextlib.nullcontext()
    with torch.device(device), on_device, fixes.leaving_autocast():
        model: nn.Module = model_builder.build_sam3_video_model(
            load_from_HF=False, bpe_path=str(pin.bpe_path()), device=device
        )
    return model


def sam31_beside() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of SAM 3.1's file beside its image model, as listed."""
    shapes = {}
    for line in NAMES.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, shape = line.split()
        parts = re.split(r"\{([^}]*)\}", name)
        choices = [part.split(",") if at % 2 else [part] for at, part in enumerate(parts)]
        for each in itertools.product(*choices):
            shapes["".join(each)] = tuple(int(number) for number in shape.split(","))
    return shapes


def sam31(image: Mapping[str, Tensor], beside: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return a file's content in SAM 3.1's layout: without the level that the detector drops.

    Args:
        image: the image model's tensors, RoPE tables included.
        beside: names and shapes of all else, which is random.
    """
    state = {
        f"detector.{key}": value for key, value in image.items() if ".convs.3." not in f".{key}"
    }
    return state | {key: torch.randn(shape) for key, shape in beside.items()}


def write_sam3(file: Path) -> dict[str, Tensor]:
    """Write `sam3.pt` of random tensors, as large as upstream's builders now make it; return it."""
    torch.manual_seed(11)
    state = {key: value.detach() for key, value in video_model().state_dict().items()}
    for key, value in state.items():
        if value.is_floating_point() and value.dim() < 2:  # no bias and no norm is what it began as
            state[key] = value + torch.randn_like(value) * 0.02
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return state


def fit_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make upstream's builders build the tracker for the feature maps of SMALL."""
    side = SMALL.resolution // SMALL.vision.patch_size
    for name, changed in (
        (
            "Sam3TrackerPredictor",
            {"image_size": SMALL.resolution, "backbone_stride": SMALL.vision.patch_size},
        ),
        ("SimpleMaskDownSampler", {"interpol_size": [16 * side] * 2}),
    ):
        monkeypatch.setattr(model_builder, name, _with(getattr(model_builder, name), changed))
