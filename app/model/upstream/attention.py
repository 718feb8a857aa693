"""DETR's attention on a GPU, in fewer launches.

torch's (`multi_head_attention_forward`) copies tokens into its order and what they have attended
to back, projects queries, keys and values one by one where they are not all the same, and makes
numbers of a padding mask in each layer. Here tokens stay where they are, what is the same is
projected at once, and the mask may come as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 8  # numbers of a half: where the rows of a mask must start for the fused kernel


class Attention(nn.MultiheadAttention):
    """torch's attention, on a GPU by `attend`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the queries attend to, and None or the weights."""
        if not is_usual(args[0], **kwargs):
            return super().forward(*args, **padding_as_mask(self, args[0], **kwargs))
        kwargs.pop("need_weights", None)
        return attend(self, *args, **kwargs), None


def is_usual(
    query: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
) -> bool:
    """Return whether `attend` shall compute what is asked: on a GPU, where no weights are wanted.

    Masks of videos and of clicks are torch's.
    """
    if not query.is_cuda or need_weights:
        return False
    if attn_mask is None:
        return True
    return key_padding_mask is None and attn_mask.ndim == 3 and attn_mask.is_floating_point()


def padding_as_mask(
    attention: Any, query: Tensor, key_padding_mask: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Return torch's arguments with the padding as `attn_mask`, where there is none beside it.

    The answers are the same. torch checks a padding mask by its symbolic shapes, whose import
    (sympy) takes a second of each process that predicts or trains.

    Args:
        query: (L, B, D), or (B, L, D) where `attention.batch_first`.
        key_padding_mask: (B, S), bool, True where there is no key, or by `added_to_scores`.
    """
    if key_padding_mask is None or kwargs.get("attn_mask") is not None:
        return kwargs | {"key_padding_mask": key_padding_mask}
    if key_padding_mask.dtype == torch.bool:
        key_padding_mask = added_to_scores(key_padding_mask, query.dtype)
    length = query.shape[1 if attention.batch_first else 0]
    of_heads = key_padding_mask.repeat_interleave(attention.num_heads, dim=0)
    return kwargs | {"attn_mask": of_heads[:, None].expand(-1, length, -1)}


@dataclass(frozen=True)
class Projected:
    """Keys and values of an attention.

    Attributes:
        key, value: (B, heads, S, c).
        weight, bias: of the query: (D, D) and (D,).
    """

    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor


def project_at_once(attentions: Sequence[Any], key: Tensor, value: Tensor) -> list[Projected]:
    """Return what N attentions make of the same keys and values, (S, B, D), by a product or two."""
    width, half = attentions[0].embed_dim, multiplied_in(key)
    count = len(attentions)
    weights, biases = (
        [x.split([width, 2 * width]) for x in packed]
        for packed in zip(*((x.in_proj_weight, x.in_proj_bias) for x in attentions), strict=True)
    )
    weight, bias = (  # (2, N, D, D) and (2, N, D): those of the keys, and of the values
        torch.stack([x.unflatten(0, (2, width)) for _, x in each], dim=1).to(half)
        for each in (weights, biases)
    )

    if key is value:
        parts, packed = [(key, 2 * count)], [(weight.flatten(0, -2), bias.flatten())]
    else:
        parts = [(key, count), (value, count)]
        packed = [
            (w.flatten(0, -2), b.flatten())
            for w, b in zip(weight.unbind(), bias.unbind(), strict=True)
        ]
    made = _project(attentions[0], parts, packed)
    keys, values = made[:count], made[count:]
    return [
        Projected(k, v, of_query.to(half), added.to(half))
        for k, v, (of_query, _), (added, _) in zip(keys, values, weights, biases, strict=True)
    ]


def attend(
    attention: Any,
    query: Tensor,
    key: Tensor | Projected,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Return what the queries attend to: of `torch.nn.MultiheadAttention`, without its weights.

    Args:
        query: (L, B, D), or (B, L, D) where `attention.batch_first`; key and value (S, B, D), or
            both as they were projected.
        attn_mask: (B * heads, L, S), added to the scores.
        key_padding_mask: (B, S), bool, True where there is no key, or by `added_to_scores`.
    """
    heads, half = attention.num_heads, multiplied_in(query)
    if isinstance(key, Projected):
        [q] = _project(attention, [(query, 1)], [(key.weight, key.bias)])
        k, v = key.key, key.value
    else:
        assert value is not None
        parts = [(query, 1), (key, 1), (value, 1)]  # and how many projections each has
        if key is value:
            parts = [(query, 3)] if query is key else [(query, 1), (key, 2)]
        elif query is key:
            parts = [(query, 2), (value, 1)]
        widths = [count * attention.embed_dim for _, count in parts]
        packed = attention.in_proj_weight.to(half), attention.in_proj_bias.to(half)
        weights, biases = (x.split(widths) if len(parts) > 1 else (x,) for x in packed)
        q, k, v = _project(attention, parts, list(zip(weights, biases, strict=True)))
    mask = None
    if attn_mask is not None:
        mask = attn_mask.to(half).unflatten(0, (-1, heads))  # (B, heads, L, S)
    elif key_padding_mask is not None:
        padding = key_padding_mask
        if padding.dtype == torch.bool:
            padding = added_to_scores(padding, half)
        mask = padding[:, None, None].expand(-1, heads, q.shape[2], -1)
    dropped = attention.dropout if attention.training else 0.0
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
    out = attention.out_proj
    answer = _linear(seen.transpose(1, 2).flatten(2), out.weight.to(half), out.bias.to(half))
    return answer if attention.batch_first else answer.transpose(0, 1)


def _project(
    attention: Any,
    parts: Sequence[tuple[Tensor, int]],
    weights: Sequence[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Return (B, heads, L or S, c) of each projection of each of the tokens."""
    half = multiplied_in(parts[0][0])
    projected: list[Tensor] = []
    for (tokens, count), (weight, bias) in zip(parts, weights, strict=True):
        of_batch = tokens if attention.batch_first else tokens.transpose(0, 1)
        mapped = _linear(of_batch.to(half), weight, bias)
        heads = mapped.unflatten(-1, (count, attention.num_heads, -1))
        each = heads.unbind(2) if count > 1 else [heads.squeeze(2)]
        projected += (x.transpose(1, 2) for x in each)
    return projected


def _linear(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map (B, L, D) to (B, L, d) in the order that it has in memory.

    torch multiplies another order than that of the dimensions by a copy of the weight for each of
    the first (`should_fold` in ATen's LinearAlgebra.cpp).
    """
    if not tokens.is_contiguous() and tokens.transpose(0, 1).is_contiguous():
        return F.linear(tokens.transpose(0, 1), weight, bias).transpose(0, 1)
    return F.linear(tokens.contiguous(), weight, bias)


def added(tokens: Tensor, places: Tensor) -> Tensor:
    """Return the sum of both, of one shape: on a GPU in the half that it is multiplied in."""
    half = multiplied_in(tokens)
    if not tokens.is_cuda or half == tokens.dtype:
        return tokens + places
    total: Tensor = _Sum.apply(tokens, places, half)
    return total


class _Sum(torch.autograd.Function):
    """Adds two tensors of one shape to one of another dtype."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = first.dtype, second.dtype
        return torch.add(first, second, out=torch.empty_like(first, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *(gradient.to(dtype) if need else None for dtype, need in needed), None


def multiplied_in(tokens: Tensor) -> torch.dtype:
    """Return the half in which autocast multiplies tokens; their own precision without it."""
    kind = tokens.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype


def rectified(layer: Any, tokens: Tensor, activation: Any = F.relu) -> Tensor:
    """Return activation(layer(tokens)): on a GPU without gradients, ReLU within the product."""
    usual = type(layer) is nn.Linear and activation is F.relu
    if usual and tokens.is_cuda and not torch.is_grad_enabled():
        return product_rectified(layer, tokens)
    found: Tensor = activation(layer(tokens))
    return found


def product_rectified(layer: nn.Linear, tokens: Tensor) -> Tensor:
    """Map (…, d) to (…, D) by a layer and ReLU, in one operation, of which there is no gradient."""
    half = multiplied_in(tokens)
    rows, weight, bias = (x.to(half) for x in (tokens.flatten(0, -2), layer.weight, layer.bias))
    return torch._addmm_activation(bias, rows, weight.T).unflatten(0, tokens.shape[:-1])


def added_to_scores(mask: Tensor, precision: torch.dtype) -> Tensor:
    """Return a mask (B, S), True where there is no key, as what is added to scores: 0, or -inf.

    On a GPU its rows start where the fused kernel can read them, which would copy it otherwise.
    """
    count, keys = mask.shape
    width = math.ceil(keys / ALIGNED) * ALIGNED if mask.is_cuda else keys
    added = torch.zeros(count, width, dtype=precision, device=mask.device)[:, :keys]
    return added.masked_fill_(mask, -math.inf)
