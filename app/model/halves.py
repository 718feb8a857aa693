"""Weights in a half precision: frozen ones held in it, those of a layer converted at once.

Autocast converts a weight each time it is used, and its gradient back: at full size that is a third
of a step's launches. Only matrices and biases that nothing but autocast reads are converted here,
so that each product is the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sam3.model.decoder import TransformerDecoder, TransformerDecoderLayer
from sam3.model.encoder import TransformerEncoderLayer
from sam3.model.geometry_encoders import SequenceGeometryEncoder
from sam3.model.maskformer_segmentation import UniversalSegmentationHead
from sam3.model.model_misc import DotProductScoring
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.sam3_image import Sam3Image
from sam3.model.text_encoder_ve import ResidualAttentionBlock
from sam3.model.vitdet import Block, ViT
from torch import Tensor, nn

from app.model import adapters

_MULTIPLYING = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)
_LAYERS = (Block, ResidualAttentionBlock, TransformerEncoderLayer)
_PARTS = (  # with matrices outside of such layers
    *(Sam3DualViTDetNeck, SequenceGeometryEncoder, TransformerDecoder),
    *(UniversalSegmentationHead, DotProductScoring),
)
_ORIGINALS = "float32_originals"  # attribute of a model


def hold_all(model: Sam3Image, precision: torch.dtype) -> None:
    """Convert all matrices of a model that predicts and never trains to a half, in place.

    They take half the memory, and no time to be converted. In float32 nothing is done, nor to a
    model that a LoRA is added to, which is done in float32.
    """
    if precision == torch.float32 or adapters.has_lora(model):
        return
    for _, parameter in _converted_by_autocast(model):
        parameter.data = parameter.data.to(precision)


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


def convert_by_layer(model: Sam3Image, precision: torch.dtype) -> None:
    """Let each layer convert its trained matrices at once, and their gradients, as autocast would.

    Parts of the model do so for those that are in no layer, the decoder for all of its own. The
    `forward` of both is replaced. It gives the modules below the converted weights for as long as
    it runs, so that what is recomputed in the backward pass converts them again. The trunk, which
    may be compiled, is left as it is outside of its layers.
    """
    trained = {
        id(parameter)
        for _, parameter in _converted_by_autocast(model)
        if parameter.requires_grad and parameter.dtype == torch.float32
    }
    for layer in model.modules():
        if isinstance(layer, (*_LAYERS, *_PARTS)):
            inner = (part for part in layer.modules() if isinstance(part, (*_LAYERS, ViT)))
            elsewhere = {id(x) for part in inner if part is not layer for x in part.modules()}
            places = [
                (module._parameters, name)
                for module in layer.modules()
                for name, parameter in module.named_parameters(recurse=False)
                if id(parameter) in trained and id(module) not in elsewhere
            ]
            if places:
                layer.forward = _converting(layer.forward, places, precision)


def _converting(
    forward: Callable[..., Any], places: list[tuple[dict[str, Any], str]], precision: torch.dtype
) -> Callable[..., Any]:
    """Return a layer's `forward` with the weights at these places converted while it runs."""

    @functools.wraps(forward)
    def converting(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which fuses what autocast does
            return forward(*args, **kwargs)
        weights = [parameters[name] for parameters, name in places]
        try:
            for (parameters, name), half in zip(
                places, _AtOnce.apply(precision, *weights), strict=True
            ):
                parameters[name] = half
            return forward(*args, **kwargs)
        finally:
            for (parameters, name), weight in zip(places, weights, strict=True):
                parameters[name] = weight

    return converting


class _AtOnce(torch.autograd.Function):
    """Converts tensors by few launches, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, precision: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _AtOnce._convert(tensors, precision)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        there = [gradient for gradient in gradients if gradient is not None]
        converted = iter(_AtOnce._convert(there, torch.float32))
        return None, *(None if each is None else next(converted) for each in gradients)

    @staticmethod
    def _convert(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        converted = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(converted, list(tensors))
        return tuple(converted)


def originals(model: nn.Module) -> dict[str, Tensor]:
    """Return the float32 values of what `hold_frozen` has converted, by name."""
    kept: dict[str, Tensor] = getattr(model, _ORIGINALS, {})
    return kept


def _converted_by_autocast(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters that autocast converts wherever they are used, by name.

    The decoder's feed-forward layers compute in float32 (decoder.py:74), and an adapter of a packed
    attention is added to its matrix before that is converted.
    """
    in_float32: set[int] = set()
    for module in model.modules():
        parts: tuple[Any, ...] = ()
        if isinstance(module, TransformerDecoderLayer):
            parts = (module.linear1, module.linear2)
        elif type(module).__name__ == "ParamWrapper":  # peft's, which takes 2 s to import
            parts = (module.lora_A, module.lora_B)
        in_float32 |= {id(layer) for part in parts for layer in part.modules()}
    for path, module in model.named_modules():
        if isinstance(module, _MULTIPLYING) and id(module) not in in_float32:
            is_adapted = path.endswith(".base_layer")
            for name, parameter in module.named_parameters(recurse=False):
                if not (is_adapted and name == "in_proj_weight"):
                    yield f"{path}.{name}", parameter
