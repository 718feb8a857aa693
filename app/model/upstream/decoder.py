"""DETR's decoder in fewer operations, and with fewer copies of what is large.

Upstream's (decoder.py, `TransformerDecoder.forward`) takes some 1,350 operations at full size. Here
the same is computed with what does not change from layer to layer made once, x and y at once, the
presence token kept among the queries, and the presence of all layers at once. In a prediction on a
CPU, outputs are upstream's to the bit.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sam3.model import decoder as upstream
from torch import Tensor, nn

from app.model.upstream.attention import (
    Projected,
    added,
    added_to_scores,
    attend,
    multiplied_in,
    project_at_once,
)

# What `Sam3Image._run_decoder` passes; all else is for videos and for clicks.
USUAL = (
    *("pos", "memory_text", "text_attention_mask", "apply_dac"),
    *("spatial_shapes", "valid_ratios", "level_start_index"),
)


def is_usual(decoder: Any, inputs: dict[str, Any]) -> bool:
    """Return whether `decode` computes what is asked."""
    other = any(v is not None and v is not False for k, v in inputs.items() if k not in USUAL)
    height, width = (int(side) for side in inputs["spatial_shapes"][0])
    built = decoder.boxRPB == "log" and decoder.presence_token is not None
    return not other and built and decoder.use_normed_output_consistently and height == width


@contextlib.contextmanager
def _casting_once() -> Iterator[None]:
    """Keep weights in autocast's half from layer to layer: five heads serve all of them.

    Training keeps none elsewhere (`cache_weights` of `model/device.py`); these are few.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@_casting_once()
def decode(
    self: Any,
    tgt: Tensor,
    memory: Tensor,
    *,
    pos: Tensor,
    spatial_shapes: Tensor,
    memory_text: Tensor,
    text_attention_mask: Tensor,
    apply_dac: bool | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries (L, Q, B, D), boxes (L, Q, B, 4), presence logits, and its token (1, B, D).

    With `apply_dac` there are twice as many queries, and the second half does not attend to itself.
    The logits (L, 1, B) are of every layer where something is trained, else of the last alone.
    Images are squares without padding (`is_usual`, `to_square`), so that all of a map is valid.

    Args:
        tgt: (Q, B, D).
        memory: (tokens, B, D), the encoded image for B prompts; pos, its position embedding.
        spatial_shapes: (1, 2), height and width of the feature map, on the host.
        memory_text: (T, B, D).
        text_attention_mask: (B, T) bool, True where a prompt has no token.
    """
    copies = 2 if (self.dac if apply_dac is None else apply_dac) else 1
    batch = tgt.shape[1]
    recomputed = upstream.activation_ckpt_wrapper
    layers_too = self.training and getattr(self, "checkpoint_activations", True)
    side = int(spatial_shapes[0, 0])
    steps = 8 * _steps(self, side, memory.device)
    halves = torch.tensor([-4.0, 4.0]).to(memory.device, non_blocking=True)
    heads = self.boxRPB_embed_x, self.boxRPB_embed_y
    both = together(heads) if memory.is_cuda and not _are_adapted(heads) else None
    frequencies = _frequencies(self.d_model // 2, memory.device)
    key = added(memory, pos)
    if memory.is_cuda:  # each layer would convert them
        half = multiplied_in(memory)
        memory, memory_text = memory.to(half), memory_text.to(half)
        text_attention_mask = added_to_scores(text_attention_mask, half)
    of_text: Sequence[Tensor | Projected] = [memory_text] * len(self.layers)
    of_image: Sequence[Tensor | Projected] = [key] * len(self.layers)
    if memory.is_cuda and not layers_too and not _are_wrapped(self.layers):
        of_text = project_at_once([x.ca_text for x in self.layers], memory_text, memory_text)
        of_image = project_at_once([x.cross_attn for x in self.layers], key, memory)
    presence = self.presence_token.weight[None].expand(1, batch, -1)
    tokens = torch.cat([presence, tgt.repeat(copies, 1, 1)])  # (1 + Q, B, D)
    boxes = self.reference_points.weight[:, None].repeat(copies, batch, 1).sigmoid()  # cxcywh

    queries: list[Tensor] = []
    all_boxes, presences = [boxes], []
    for layer, text, image in zip(self.layers, of_text, of_image, strict=True):
        if queries:
            boxes = all_boxes[-1].detach()
        where = self.ref_point_head(_sines(boxes, frequencies))  # (Q, B, D)
        distances = _distances(boxes, steps, halves)
        if both is not None:
            pair = recomputed(of_both)(x=distances, both=both, act_ckpt_enable=layers_too)
        else:
            pair = [
                recomputed(head)(x=x, act_ckpt_enable=self.training)
                for head, x in zip(heads, distances.unbind(), strict=True)
            ]
        tokens = recomputed(functools.partial(decode_layer, layer))(
            tokens=tokens,
            where=F.pad(where, (0, 0, 0, 0, 1, 0)),  # the presence token is nowhere
            text=text,
            text_mask=text_attention_mask,
            key=image,
            memory=memory,
            bias=_Bias.apply(*pair),
            copies=copies,
            act_ckpt_enable=layers_too,
        )
        presence, objects = tokens.split([1, len(tokens) - 1])
        normed = self.norm(objects)
        queries.append(normed)
        presences.append(presence)
        if len(queries) < len(self.layers):  # no layer attends around the last's boxes
            all_boxes.append((self.bbox_embed(normed) + logits_of(boxes)).sigmoid())
    trains = self.training or torch.is_grad_enabled()  # the second: what is before it, it frozen
    seen = torch.stack(presences if trains else presences[-1:])  # (L, 1, B, D)
    logits = self.presence_token_head(self.presence_token_out_norm(seen)).squeeze(-1)
    if memory.is_cuda:  # in the order in which the heads multiply them
        found = torch.stack([each.transpose(0, 1) for each in queries]).transpose(1, 2)
    else:
        found = torch.stack(queries)
    return found, torch.stack(all_boxes), logits, presences[-1]


def decode_layer(
    self: Any,
    tokens: Tensor,
    where: Tensor,
    text: Tensor | Projected,
    text_mask: Tensor,
    key: Tensor | Projected,
    memory: Tensor,
    bias: Tensor,
    copies: int,
) -> Tensor:
    """Return the tokens (1 + Q, B, D) after self-attention, words, image and feed-forward.

    Attention does not return its weights in training and on a GPU, so that one kernel computes it.
    A CPU's kernel rounds otherwise than upstream, hence not in a CPU's predictions.

    Args:
        where: their position embedding.
        text: (T, B, D), with text_mask as above, or as numbers (`added_to_scores`).
        key: the image with its position embedding; memory without, both (tokens, B, D). Text and
            key may be the keys and values of this layer, where those of all were made at once.
        bias: (B * heads, 1 + Q, tokens), added to the scores of the image's tokens.
        copies: 2 where the second half of the queries does not attend to itself.
    """
    weights: dict[str, Any] = {"need_weights": not (self.training or tokens.is_cuda)}
    first, second = tokens, tokens[:0]
    if copies == 2:
        first, second = tokens.split([1 + len(tokens) // 2, len(tokens) // 2])
    query = added(first, where[: len(first)])
    first = first + self.dropout2(self.self_attn(query, query, first, **weights)[0])
    tokens = self.norm2(torch.cat([first, second]) if copies == 2 else first)
    asked = added(tokens, where), text, text
    seen = _attended(self.ca_text, *asked, key_padding_mask=text_mask, **weights)
    tokens = self.catext_norm(tokens + self.catext_dropout(seen))
    seen = _attended(self.cross_attn, added(tokens, where), key, memory, attn_mask=bias)
    out: Tensor = self.forward_ffn(self.norm1(tokens + self.dropout1(seen)))
    return out


def _attended(
    attention: Any, query: Tensor, key: Tensor | Projected, value: Any, **inputs: Any
) -> Tensor:
    """Return what the queries attend to; `value` is used where the key is not projected yet."""
    if isinstance(key, Projected):
        inputs.pop("need_weights", None)
        return attend(attention, query, key, **inputs)
    seen: Tensor = attention(query, key, value, **inputs)[0]
    return seen


def logits_of(boxes: Tensor) -> Tensor:
    """Return upstream's `inverse_sigmoid` of numbers in 0..1."""
    return torch.log(boxes.clamp(min=1e-3) / (1 - boxes).clamp(min=1e-3))


def _steps(decoder: Any, side: int, device: torch.device) -> Tensor:
    """Return where the steps of a feature map are, (side,), 0..1; the decoder keeps them."""
    kept, size = decoder.compilable_cord_cache, (side, side)
    if kept is None or kept[0].device != device or decoder.compilable_stored_size != size:
        kept = decoder.compilable_cord_cache = decoder._get_coords(side, side, device)
        decoder.compilable_stored_size = size
    steps: Tensor = kept[0]
    return steps


def _frequencies(count: int, device: torch.device) -> Tensor:
    """Return what sides are divided by for a sine embedding, (count / 2,): on a GPU 2 pi in it."""
    steps = torch.arange(0, count, 2, dtype=torch.float32)
    lengths = 10000 ** (steps / count)
    if device.type == "cuda":
        lengths = lengths / (2 * math.pi)
    return lengths.to(device, non_blocking=True)


def _sines(boxes: Tensor, frequencies: Tensor) -> Tensor:
    """Return the sine embedding of boxes (Q, B, 4), as upstream's `gen_sineembed_for_position`."""
    x, y, width, height = boxes.unbind(-1)
    sides = torch.stack([y, x, width, height], -1)
    if not sides.is_cuda:
        sides = sides * (2 * math.pi)
    angles = sides[..., None] / frequencies  # (Q, B, 4, D / 4)
    if not angles.is_cuda or angles.requires_grad:
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(2)  # (Q, B, 2 D)
    both = torch.empty(*angles.shape, 2, device=angles.device, dtype=multiplied_in(angles))
    torch.sin(angles, out=both[..., 0])
    torch.cos(angles, out=both[..., 1])
    return both.flatten(2)


def _distances(boxes: Tensor, steps: Tensor, halves: Tensor) -> Tensor:
    """Return logarithms of the distances of steps from a box's edges, along x and along y.

    Factors of 2, 4 and 8 round nothing, wherever they stand.

    Args:
        boxes: (Q, B, 4) cxcywh, 0..1.
        steps: (side,), times 8.
        halves: -4 and 4, of a box's sides: its edges from its center, times 8.

    Returns:
        (2, B, Q, side, 2).
    """
    center, size = boxes.permute(2, 1, 0).contiguous()[..., None].split(2)  # (2, B, Q, 1)
    edges = torch.addcmul(8 * center, size, halves)  # (2, B, Q, 2), times 8
    distances = steps[:, None] - edges[..., None, :]
    return torch.copysign(torch.log2(distances.abs() + 1.0), distances) / math.log2(8)


def _are_wrapped(layers: Sequence[Any]) -> bool:
    attentions = [x for layer in layers for x in (layer.ca_text, layer.cross_attn)]
    return not all(isinstance(each, nn.MultiheadAttention) for each in attentions)


def _are_adapted(heads: Sequence[Any]) -> bool:
    return any(type(layer) is not nn.Linear for head in heads for layer in head.layers)


def together(heads: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """Return weights (2, d, D) and biases (2, 1, D) of the layers of two heads alike."""
    return [
        (torch.stack([x.weight.mT for x in pair]), torch.stack([x.bias[None] for x in pair]))
        for pair in zip(*(head.layers for head in heads), strict=True)
    ]


def of_both(x: Tensor, both: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Map (2, …, d) by each of two heads, of which `both` are the layers, at once."""
    hidden = x.flatten(1, -2)
    for index, (weight, bias) in enumerate(both):
        hidden = torch.baddbmm(bias, hidden.relu() if index else hidden, weight)
    return hidden.view(*x.shape[:-1], -1)


class _Bias(torch.autograd.Function):
    """Adds bias_x and bias_y (B, Q, side, heads) of each step of x and y.

    Returns (B * heads, 1 + Q, side * side): the presence token, which comes first, has 0.
    """

    @staticmethod
    def forward(ctx: Any, bias_x: Tensor, bias_y: Tensor) -> Tensor:
        ctx.shape = batch, count, side, heads = bias_x.shape
        bias = bias_x.new_empty(batch, heads, 1 + count, side, side)
        bias[:, :, 0].zero_()
        along_x, along_y = (each.permute(0, 3, 1, 2) for each in (bias_x, bias_y))
        torch.add(along_y[..., None], along_x[..., None, :], out=bias[:, :, 1:])
        return bias.flatten(3).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, side, heads = ctx.shape
        cells = gradient.unflatten(0, (batch, heads)).unflatten(-1, (side, side))[:, :, 1:]
        of_x, of_y = (cells.sum(axis).permute(0, 2, 3, 1) for axis in (-2, -1))
        return of_x, of_y
