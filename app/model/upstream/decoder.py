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
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sam3.model import decoder as upstream
from sam3.model.model_misc import inverse_sigmoid
from torch import Tensor

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
    valid_ratios: Tensor,
    memory_text: Tensor,
    text_attention_mask: Tensor,
    apply_dac: bool | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries (L, Q, B, D), boxes (L, Q, B, 4), presence logits, and its token (1, B, D).

    With `apply_dac` there are twice as many queries, and the second half does not attend to itself.
    The logits (L, 1, B) are of every layer where something is trained, else of the last alone.

    Args:
        tgt: (Q, B, D).
        memory: (tokens, B, D), the encoded image for B prompts; pos, its position embedding.
        spatial_shapes: (1, 2), height and width of the feature map, on the host.
        valid_ratios: (B, 1, 2), the share of the map that is no padding.
        memory_text: (T, B, D).
        text_attention_mask: (B, T) bool, True where a prompt has no token.
    """
    copies = 2 if (self.dac if apply_dac is None else apply_dac) else 1
    batch = tgt.shape[1]
    recomputed = upstream.activation_ckpt_wrapper
    layers_too = self.training and getattr(self, "checkpoint_activations", True)
    ratios = torch.cat([valid_ratios, valid_ratios], -1)[:, 0]  # (B, 4)
    side = int(spatial_shapes[0, 0])
    steps, _ = self._get_coords(side, side, memory.device)  # (side,), 0..1
    frequencies = _frequencies(self.d_model // 2, memory.device)
    key = memory + pos
    presence = self.presence_token.weight[None].expand(1, batch, -1)
    tokens = torch.cat([presence, tgt.repeat(copies, 1, 1)])  # (1 + Q, B, D)
    boxes = self.reference_points.weight[:, None].repeat(copies, batch, 1).sigmoid()  # cxcywh

    queries, all_boxes, presences = [], [boxes], []
    for layer in self.layers:
        where = self.ref_point_head(_sines(boxes * ratios, frequencies))  # (Q, B, D)
        bias_x, bias_y = (
            recomputed(head)(x=distances, act_ckpt_enable=self.training)
            for head, distances in zip(
                (self.boxRPB_embed_x, self.boxRPB_embed_y), _distances(boxes, steps), strict=True
            )
        )  # (B, Q, side, heads)
        tokens = recomputed(functools.partial(decode_layer, layer))(
            tokens=tokens,
            where=F.pad(where, (0, 0, 0, 0, 1, 0)),  # the presence token is nowhere
            text=memory_text,
            text_mask=text_attention_mask,
            key=key,
            memory=memory,
            bias=_bias(bias_x, bias_y),
            copies=copies,
            act_ckpt_enable=layers_too,
        )
        normed = self.norm(tokens[1:])
        refined = (self.bbox_embed(normed) + inverse_sigmoid(boxes)).sigmoid()
        boxes = refined.detach()
        queries.append(normed)
        all_boxes.append(refined)
        presences.append(tokens[:1])
    trains = self.training or torch.is_grad_enabled()  # the second: what is before it, it frozen
    seen = torch.stack(presences if trains else presences[-1:])  # (L, 1, B, D)
    logits = self.presence_token_head(self.presence_token_out_norm(seen)).squeeze(-1)
    return torch.stack(queries), torch.stack(all_boxes[:-1]), logits, presences[-1]


def decode_layer(
    self: Any,
    tokens: Tensor,
    where: Tensor,
    text: Tensor,
    text_mask: Tensor,
    key: Tensor,
    memory: Tensor,
    bias: Tensor,
    copies: int,
) -> Tensor:
    """Return the tokens (1 + Q, B, D) after self-attention, words, image and feed-forward.

    Attention does not return its weights in training and on a GPU, so that one kernel computes it.
    A CPU's kernel rounds otherwise than upstream, hence not in a CPU's predictions.

    Args:
        where: their position embedding.
        text: (T, B, D), with text_mask as above.
        key: the image with its position embedding; memory without, both (tokens, B, D).
        bias: (B * heads, 1 + Q, tokens), added to the scores of the image's tokens.
        copies: 2 where the second half of the queries does not attend to itself.
    """
    weights = {"need_weights": not (self.training or tokens.is_cuda)}
    first, second = tokens, tokens[:0]
    if copies == 2:
        first, second = tokens.split([1 + len(tokens) // 2, len(tokens) // 2])
    query = first + where[: len(first)]
    first = first + self.dropout2(self.self_attn(query, query, first, **weights)[0])
    tokens = self.norm2(torch.cat([first, second]) if copies == 2 else first)
    seen = self.ca_text(tokens + where, text, text, key_padding_mask=text_mask, **weights)[0]
    tokens = self.catext_norm(tokens + self.catext_dropout(seen))
    seen = self.cross_attn(tokens + where, key, memory, attn_mask=bias)[0]
    out: Tensor = self.forward_ffn(self.norm1(tokens + self.dropout1(seen)))
    return out


def _frequencies(count: int, device: torch.device) -> Tensor:
    """Return what the angles of a sine embedding are divided by: (count / 2,)."""
    steps = torch.arange(0, count, 2, dtype=torch.float32, device=device)
    return 10000 ** (steps / count)


def _sines(boxes: Tensor, frequencies: Tensor) -> Tensor:
    """Return the sine embedding of boxes (Q, B, 4), as upstream's `gen_sineembed_for_position`."""
    x, y, width, height = boxes.unbind(-1)
    angles = torch.stack([y, x, width, height], -1) * (2 * math.pi)
    angles = angles[..., None] / frequencies  # (Q, B, 4, D / 4)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(2)  # (Q, B, 2 D)


def _distances(boxes: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
    """Return logarithms of the distances of steps from a box's edges, along x and along y.

    Args:
        boxes: (Q, B, 4) cxcywh, 0..1.
        steps: (side,).

    Returns:
        Two of (B, Q, side, 2).
    """
    center, size = boxes.permute(2, 1, 0).split(2)  # (2, B, Q)
    half = 0.5 * size
    edges = torch.stack([center - half, center + half], -1)  # (2, B, Q, 2)
    distances = (steps[:, None] - edges[..., None, :]) * 8
    distances = torch.sign(distances) * torch.log2(torch.abs(distances) + 1.0) / math.log2(8)
    return distances.unbind()


def _bias(bias_x: Tensor, bias_y: Tensor) -> Tensor:
    """Return the sum of both for each step of y and x, and 0 for the presence token.

    Args:
        bias_x, bias_y: (B, Q, side, heads).

    Returns:
        (B * heads, 1 + Q, side * side).
    """
    along_x, along_y = (
        F.pad(bias.permute(0, 3, 1, 2), (0, 0, 1, 0)).flatten(0, 1).contiguous()
        for bias in (bias_x, bias_y)
    )  # (B * heads, 1 + Q, side)
    return (along_y[..., None] + along_x[..., None, :]).flatten(2)
