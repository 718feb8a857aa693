"""An image → the model's square: one way, for training and for prediction."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize


def to_square(image: Image.Image, side: int) -> Tensor:
    """Stretch an RGB image to (3, side, side) uint8, as upstream's Sam3Processor does.

    Training and prediction both see this; upstream trains on Pillow's resize, which differs from it
    by two grey levels and takes four times as long.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return resize(pixels, [side, side], antialias=True)
