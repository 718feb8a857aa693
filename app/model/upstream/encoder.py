"""A layer of DETR's encoder, in fewer operations on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from app.model.upstream.attention import added, rectified


def encode_layer(
    self: Any,
    tgt: Tensor,
    memory: Tensor,
    of_images: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    query_pos: Any,
    pos: Any,
    memory_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
) -> Tensor:
    """Return image tokens (P, h * w, d) after attention to themselves, to prompts, feed-forward.

    As upstream's `TransformerEncoderLayer.forward_pre`. On a GPU what the layers add to stays in
    float32, of which their norms are made anyway.

    Args:
        tgt: (P, h * w, d), of the image of each of P prompts; query_pos, their position embedding,
            or None where the layer adds none.
        memory: (P, L, d), the prompts' tokens; pos (as query_pos), memory_mask and
            memory_key_padding_mask theirs.
        of_images: of the first layer, where prompts of an image still have the same tokens: those
            of B images and their position embedding, (B, h * w, d), and the image of each prompt,
            (P,) int64.
    """
    if tgt.is_cuda:
        tgt = tgt.float()
    tokens, places = (tgt, query_pos) if of_images is None else of_images[:2]
    seen = self.norm1(tokens)
    asked = added(seen, places) if self.pos_enc_at_attn else seen
    attended = self.self_attn(asked, asked, value=seen)[0]
    if of_images is not None:
        attended = attended.index_select(0, of_images[2])
    tgt = tgt + self.dropout1(attended)
    asked = self.norm2(tgt)
    attended = self.cross_attn_image(
        query=added(asked, query_pos) if self.pos_enc_at_cross_attn_queries else asked,
        key=added(memory, pos) if self.pos_enc_at_cross_attn_keys else memory,
        value=memory,
        attn_mask=memory_mask,
        key_padding_mask=memory_key_padding_mask,
    )[0]
    tgt = tgt + self.dropout2(attended)
    hidden = self.dropout(rectified(self.linear1, self.norm3(tgt), self.activation))
    out: Tensor = tgt + self.dropout3(self.linear2(hidden))
    return out
