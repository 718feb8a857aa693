"""Frozen matrices held in a half precision, and their float32 originals for what is saved.

Autocast converts a weight each time it is used: at full size that is a third of a step's launches,
and the frozen ones stay the same. Only matrices and biases that nothing but autocast reads are
held, so that each product is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sam3.model.decoder import TransformerDecoderLayer
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn

from app.model import adapters

_MULTIPLYING = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)
_ORIGINALS = "float32_originals"  # attribute of a model


def hold_frozen(model: Sam3Image, precision: torch.dtype) -> None:
    """Convert a model's frozen matrices to a half precision, in place.

    The originals are kept on the CPU, but for those under an adapter, which is saved without them.

    Args:
        model: on any device, with its parts frozen and its adapters in place.
    """
    kept: dict[str, Tensor] = {}
    adapted = adapters.has_lora(model)
    for name, parameter in _converted_by_autocast(model):
        if parameter.requires_grad or parameter.dtype != torch.float32:
            continue
        if not adapted:
            kept[name] = parameter.data if parameter.is_meta else parameter.data.cpu()
        parameter.data = parameter.data.to(precision)
    setattr(model, _ORIGINALS, kept)


def originals(model: nn.Module) -> dict[str, Tensor]:
    """Return the float32 values of what `hold_frozen` has converted, by name."""
    kept: dict[str, Tensor] = getattr(model, _ORIGINALS, {})
    return kept


def _converted_by_autocast(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters that autocast converts wherever they are used, by name.

    The decoder's feed-forward layers compute in float32 (decoder.py:74), and an adapter of a packed
    attention is added to its matrix before that is converted.
    """
    in_float32 = {
        id(layer)
        for module in model.modules()
        if isinstance(module, TransformerDecoderLayer)
        for part in (module.linear1, module.linear2)
        for layer in part.modules()
    }
    for path, module in model.named_modules():
        if isinstance(module, _MULTIPLYING) and id(module) not in in_float32:
            is_adapted = path.endswith(".base_layer")
            for name, parameter in module.named_parameters(recurse=False):
                if not (is_adapted and name == "in_proj_weight"):
                    yield f"{path}.{name}", parameter
