"""The raw outputs of a model, for tests that compare two."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from sam3.model.sam3_image import Sam3Image

from app.config.compose import load_config
from app.datasets.square import to_square
from app.inference.predictor import Predictor, normalise
from tests.helpers import TINY


def raw_outputs(model: Sam3Image) -> dict[str, torch.Tensor]:
    """What a model of size TINY says of one image of noise and two prompts, before thresholds."""
    config = load_config(TINY).model
    predictor = Predictor(model, config)
    noise = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    pixels = normalise(to_square(Image.fromarray(noise), config.resolution))
    with torch.no_grad():
        features = model.backbone.forward_image(pixels)
        return predictor._ground(
            features, ["circle", "dog"], torch.zeros(0, 1, 4), torch.zeros(0).bool()
        )
