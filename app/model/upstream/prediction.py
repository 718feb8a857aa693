"""What prediction leaves out of upstream's passes: the same is found by half the operations.

A GPU waits for the host, which launches one operation after the other. Where a module is in
evaluation mode and no gradient is kept, the functions below stand in for upstream's; training runs
upstream's own. Places are those of the pinned commit 84cc43b (`pin.py`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from sam3.model.decoder import TransformerDecoder
from sam3.model.encoder import TransformerEncoder
from sam3.model.geometry_encoders import SequenceGeometryEncoder
from sam3.model.model_misc import inverse_sigmoid
from torch import Tensor


def apply() -> None:
    """Put the functions of this file before upstream's, once a process."""
    _stand_in(TransformerDecoder, _decode)
    _stand_in(TransformerEncoder, _encode)
    _stand_in(SequenceGeometryEncoder, _encode_geometry)


def _stand_in(cls: Any, predict: Any) -> None:
    """Let `predict` answer where no gradients are kept; it is given upstream's function first."""
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training and not torch.is_grad_enabled():
            return predict(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    cls.forward = forward


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
    for layer in self.encode:
        tokens = layer(tgt=tokens, memory=img_feats[-1], pos=img_pos_embeds[-1])
    return self.encode_norm(tokens), torch.zeros(count, 1, dtype=torch.bool, device=tokens.device)


def _decode(
    _upstream: Any,
    self: Any,
    tgt: Tensor,
    memory: Tensor,
    pos: Tensor,
    spatial_shapes: Tensor,
    memory_text: Tensor,
    text_attention_mask: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decode (decoder.py:361) without what the first layers say, which training alone reads.

    The presence token stays before the queries throughout, what all layers have in common is
    computed once, and both axes of the boxes together.

    Args:
        tgt: (Q, B, D), the queries.
        memory, pos: (tokens, B, D), the encoded image, and its position embedding.
        spatial_shapes: (1, 2), height and width of the image in tokens.
        memory_text: (L, B, D), the prompts.
        text_attention_mask: (B, L) bool, True where a prompt has no token.

    Returns:
        As upstream, but all of the last layer: queries (layers, Q, B, D), the boxes that it refines
        (layers, Q, B, 4) cxcywh, 0..1, presence (1, 1, B), and the presence token (1, B, D).
    """
    count, device = memory.shape[1], memory.device
    exact = is_exact(device)
    half = multiplied_in(memory)
    key, memory, memory_text = (
        x.to(half).contiguous() for x in (memory + pos, memory, memory_text)
    )  # converted once for all layers
    padding = {"key_padding_mask": added_to_scores(text_attention_mask, half)}
    height, width = spatial_shapes[0].tolist()
    assert height == width
    steps, _ = self._get_coords(height, width, device)  # (side,), 0..1
    waves = _waves(self.d_model // 2, device)
    presence = self.presence_token.weight[None].expand(1, count, -1)
    tokens = torch.cat([presence, tgt])  # (1 + Q, B, D)
    boxes = self.reference_points.weight[:, None].repeat(1, count, 1).sigmoid()  # (Q, B, 4)
    where = torch.zeros_like(tokens)  # position of each; the presence token has none
    axes: list[Tensor] = []
    for number, layer in enumerate(self.layers):
        where[1:] = self.ref_point_head(_sines(boxes, waves))  # (Q, B, D)
        query = tokens + where
        attended = layer.self_attn(query, query, tokens, need_weights=exact)[0]
        tokens = layer.norm2(tokens + attended)
        query = tokens + where
        text = layer.ca_text(query, memory_text, memory_text, need_weights=exact, **padding)[0]
        tokens = layer.catext_norm(tokens + text)
        bias = _position_bias(self, boxes, steps, axes)
        image = layer.cross_attn(tokens + where, key, memory, attn_mask=bias)[0]
        tokens = layer.forward_ffn(layer.norm1(tokens + image))
        queries = self.norm(tokens[1:])
        if number + 1 < len(self.layers):
            boxes = (self.bbox_embed(queries) + inverse_sigmoid(boxes)).sigmoid()
    present = self.presence_token_head(self.presence_token_out_norm(tokens[:1])).squeeze(-1)
    times = (len(self.layers) if exact else 1, -1, -1, -1)
    return queries.expand(times), boxes.expand(times), present[None], tokens[:1]


def _waves(count: int, device: torch.device) -> Tensor:
    """Return (count,): by what a coordinate is divided for its sines and cosines."""
    steps = torch.arange(count, dtype=torch.float32, device=device)
    waves: Tensor = 10000 ** (2 * torch.div(steps, 2, rounding_mode="floor") / count)
    return waves


def _sines(boxes: Tensor, waves: Tensor) -> Tensor:
    """Return the sine embedding (Q, B, 2 D) of boxes (Q, B, 4), in the order y, x, w, h."""
    x, y, size = boxes.split([1, 1, 2], dim=-1)
    angles = torch.cat([y, x, size], dim=-1)[..., None] * (2 * math.pi) / waves  # (Q, B, 4, D / 2)
    both = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1)
    return both.flatten(2)


def _position_bias(self: Any, boxes: Tensor, steps: Tensor, axes: list[Tensor]) -> Tensor:
    """Return what is added to scores for the distance of a token from the edges of a box.

    Args:
        boxes: (Q, B, 4) cxcywh, 0..1.
        steps: (side,), 0..1: where the tokens of a row, or of a column, are.
        axes: empty at the first layer; memory that the layers share.

    Returns:
        (B * heads, 1 + Q, tokens), 0 for the presence token.
    """
    center, half = boxes.transpose(0, 1)[..., None].split(2, dim=2)  # (B, Q, 2, 1) each: x, y
    half = half * 0.5
    edges = torch.cat([center - half, center + half], dim=-1)  # (B, Q, 2, 2): low, high
    distances = (steps[:, None] - edges[..., None, :]) * 8  # (B, Q, 2, side, 2)
    distances = distances.sign() * (distances.abs() + 1.0).log2() / 3.0  # log2(8)
    heads = self.boxRPB_embed_x, self.boxRPB_embed_y
    found = [head(axis) for head, axis in zip(heads, distances.unbind(2), strict=True)]
    if not axes:  # (B, heads, 1 + Q, side), contiguous: fused attention takes no other sum
        batch, count, side, width = found[0].shape
        axes += [found[0].new_zeros(batch, width, 1 + count, side) for _ in found]
    for axis, one in zip(axes, found, strict=True):
        axis[:, :, 1:] = one.permute(0, 3, 1, 2)
    x, y = axes
    return (y[..., None] + x[..., None, :]).flatten(3).flatten(0, 1)


def is_exact(device: torch.device) -> bool:
    """Return whether all is rounded as upstream: on a CPU no more is fused, nor of fewer rows."""
    return device.type == "cpu"


def multiplied_in(tokens: Tensor) -> torch.dtype:
    """Return the half in which autocast multiplies tokens; their own precision without it."""
    kind = tokens.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype


def added_to_scores(mask: Tensor, precision: torch.dtype) -> Tensor:
    """Return a mask, True where there is no key, as what is added to scores: 0, or -inf."""
    return torch.zeros(mask.shape, dtype=precision, device=mask.device).masked_fill_(
        mask, -math.inf
    )
