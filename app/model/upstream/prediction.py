"""What prediction leaves out of upstream's passes: the same is found by fewer operations.

A GPU waits for the host, which launches one operation after the other. Where a module is in
evaluation mode and no gradient is kept, the functions below stand in for upstream's; training runs
upstream's own. Places are those of the pinned commit 84cc43b (`pin.py`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from sam3.model.encoder import TransformerEncoder
from sam3.model.geometry_encoders import SequenceGeometryEncoder
from torch import Tensor


def apply() -> None:
    """Put the functions of this file before upstream's, once a process."""
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


def multiplied_in(tokens: Tensor) -> torch.dtype:
    """Return the half in which autocast multiplies tokens; their own precision without it."""
    kind = tokens.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype


def added_to_scores(mask: Tensor, precision: torch.dtype) -> Tensor:
    """Return a mask, True where there is no key, as what is added to scores: 0, or -inf."""
    return torch.zeros(mask.shape, dtype=precision, device=mask.device).masked_fill_(
        mask, -math.inf
    )
