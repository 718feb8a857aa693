"""Matrices that are kept in a half, against autocast that makes the half at each use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from app.config.compose import load_config
from app.inference.predictor import Predictor
from app.model import adapters
from app.model.build import build_model
from app.model.half import keep_matrices_in
from tests.helpers import TINY

CONFIG = load_config(TINY).model
BOX = {"boxes_xywh": [(20, 10, 40, 40)]}  # so that the layers of boxes take part


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_the_same_is_found_to_the_bit(precision: torch.dtype) -> None:
    torch.manual_seed(1)
    model = build_model(CONFIG)
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    expected = Predictor(model, CONFIG, precision).predict(image, ["a"], threshold=0.0, **BOX)
    keep_matrices_in(model, precision)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    matrices = [name for name, kind in kinds.items() if kind == precision]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    del sizes["backbone.language_backbone.encoder.token_embedding.weight"]  # most of so small a one
    assert sum(sizes[name] for name in matrices) > 0.8 * sum(sizes.values())
    assert not any("norm" in name or "embed.weight" in name for name in matrices)
    for layer in range(CONFIG.decoder_layers):  # outside of autocast (decoder.py:74)
        for side in ("linear1", "linear2"):
            assert kinds[f"transformer.decoder.layers.{layer}.{side}.weight"] == torch.float32
    found = Predictor(model, CONFIG, precision).predict(image, ["a"], threshold=0.0, **BOX)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)
    assert found.masks == expected.masks


def test_float32_and_a_lora_stay_as_they_are() -> None:
    config = load_config([*TINY, "method=lora"])
    model = build_model(config.model)
    keep_matrices_in(model, torch.float32)
    adapters.apply_lora(model, config.method.lora)
    keep_matrices_in(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
