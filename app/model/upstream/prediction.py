"""What prediction leaves out of upstream's passes: the same is found by fewer operations.

A GPU waits for the host, which launches one operation after the other. On a GPU, and where a module
is in evaluation mode and no gradient is kept, the functions below stand in for upstream's; training
on a CPU runs upstream's own. Places are those of the pinned commit 84cc43b (`pin.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from sam3.model import geometry_encoders
from sam3.model.encoder import TransformerEncoder
from sam3.model.geometry_encoders import SequenceGeometryEncoder
from sam3.model.model_misc import MLP
from torch import Tensor

from app.model.upstream.attention import added_to_scores, multiplied_in, rectified


def apply() -> None:
    """Put the functions of this file before upstream's, once a process."""
    _stand_in(TransformerEncoder, _encode)
    _stand_in(SequenceGeometryEncoder, _encode_geometry)
    MLP.forward = _map_by_layers


def _stand_in(cls: Any, predict: Any) -> None:
    """Let `predict` answer where it shall; it is given upstream's function first."""
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        predicts = not self.training and not torch.is_grad_enabled()
        if predicts or next(self.parameters()).is_cuda:
            return predict(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    cls.forward = forward


def _map_by_layers(self: Any, x: Tensor) -> Tensor:
    """Map (…, d) as upstream's perceptron (model_misc.py:188)."""
    hidden = x
    for layer in self.layers[:-1]:
        hidden = self.drop(rectified(layer, hidden))
    hidden = self.layers[-1](hidden)
    found: Tensor = self.out_norm(hidden + x if self.residual else hidden)
    return found


def _encode(
    upstream: Any,
    self: Any,
    *args: Any,
    prompt: Tensor,
    prompt_key_padding_mask: Tensor,
    **kwargs: Any,
) -> Any:
    """Encode an image (encoder.py:366) with prompts (B, L, D) that all layers take as they are.

    Args:
        prompt_key_padding_mask: (B, L) bool, True where a prompt has no token.
    """
    half = multiplied_in(prompt)
    kwargs["prompt"] = prompt.to(half)
    kwargs["prompt_key_padding_mask"] = added_to_scores(prompt_key_padding_mask, half)
    return upstream(self, *args, **kwargs)


def _encode_geometry(
    upstream: Any, self: Any, geo_prompt: Any, img_feats: Any, img_sizes: Any, img_pos_embeds: Any
) -> tuple[Tensor, Tensor]:
    """Encode a prompt without boxes and points (geometry_encoders.py:720): the class token alone.

    Upstream joins it to sequences of no length, in a hundred operations.
    """
    if len(geo_prompt.box_embeddings) or len(geo_prompt.point_embeddings):
        found: tuple[Tensor, Tensor] = upstream(
            self, geo_prompt, img_feats, img_sizes, img_pos_embeds
        )
        return found
    count = geo_prompt.box_embeddings.shape[1]
    tokens = self.cls_embed.weight[None].repeat(1, count, 1)  # (1, B, D)
    tokens = self.norm(self.final_proj(tokens))
    if torch.is_grad_enabled():
        tokens = _Unused.apply(tokens, *_of_boxes_and_points(self))
    for layer in self.encode:
        tokens = geometry_encoders.activation_ckpt_wrapper(layer)(
            tgt=tokens,
            memory=img_feats[-1],
            pos=img_pos_embeds[-1],
            act_ckpt_enable=self.training and self.use_act_ckpt,
        )
    return self.encode_norm(tokens), torch.zeros(count, 1, dtype=torch.bool, device=tokens.device)


def _of_boxes_and_points(geometry: Any) -> list[Tensor]:
    """Return what encodes boxes and points alone, and is trained."""
    used = (geometry.cls_embed, geometry.final_proj, geometry.norm, geometry.encode_norm)
    parts = [part for part in geometry.children() if part not in (*used, geometry.encode)]
    return [p for part in parts for p in part.parameters() if p.requires_grad]


class _Unused(torch.autograd.Function):
    """Returns tokens, and gradients of 0 for weights: where there are none, AdamW forgets them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *weights: Tensor) -> Tensor:
        ctx.shapes = [weight.shape for weight in weights]
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        sizes = [shape.numel() for shape in ctx.shapes]
        zeros = torch.zeros(sum(sizes), device=gradient.device).split(sizes)
        return gradient, *(x.view(shape) for x, shape in zip(zeros, ctx.shapes, strict=True))
