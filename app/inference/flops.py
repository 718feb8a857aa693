"""The floating-point operations of a prediction, counted without doing its arithmetic."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from app.config.schema import ModelConfig
from app.inference.predictor import Predictor
from app.model.build import build_model
from app.model.fake import FakeMode, KnownValues, make_fake


def count_flops(config: ModelConfig) -> int:
    """Return the floating-point operations of one image and one prompt.

    Multiplications and additions count one each; only matrix products and convolutions count.
    """
    model = build_model(config, device="meta")
    with FakeMode():
        make_fake(model)
        predictor = Predictor(model, config)
        pixels = torch.zeros(1, 3, config.resolution, config.resolution)
        grid = config.resolution // config.vision.patch_size
        words = config.vocabulary or ["thing"]
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter, KnownValues(1, grid), sdpa_kernel(SDPBackend.MATH):
            features = model.backbone.forward_image(pixels)
            predictor._ground(features, words[:1], torch.zeros(0, 1, 4), torch.zeros(0).bool())
    return counter.get_total_flops()
