"""Matrices that are kept in the half precision in which they are multiplied."""

from __future__ import annotations

import torch
from sam3.model.decoder import TransformerDecoderLayer
from sam3.model.sam3_image import Sam3Image
from torch import nn

from app.model import adapters

MULTIPLY = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)


def keep_matrices_in(model: Sam3Image, precision: torch.dtype) -> None:
    """Convert what autocast converts at each use, once: of a model that predicts and never trains.

    The same is found, to the bit; the weights take half the memory, and no time to be converted.
    The layers that leave autocast stay in float32 (`_decoder_feedforward_in_float32_on_any_device`
    of upstream/fixes.py), and so does a model that a LoRA is added to, which is done in float32.
    """
    if precision == torch.float32 or adapters.has_lora(model):
        return
    exact = {
        layer
        for decoder in model.modules()
        if isinstance(decoder, TransformerDecoderLayer)
        for layer in (decoder.linear1, decoder.linear2)
    }
    for module in model.modules():
        if isinstance(module, MULTIPLY) and module not in exact:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(precision)
