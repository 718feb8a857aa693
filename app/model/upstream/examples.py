"""Examples of another image: upstream encodes a prompt's boxes in the image that is asked alone.

Where such a box lies says nothing of the image that is asked. It is encoded as if it were the whole
of its image, so that its token tells what it shows, and that it is from elsewhere.

Places are those of the pinned commit 84cc43b (`pin.py`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from sam3.model.geometry_encoders import Prompt
from sam3.model.sam3_image import Sam3Image
from torch import Tensor

WHOLE = (0.5, 0.5, 1.0, 1.0)  # cxcywh in shares: the whole image


def apply() -> None:
    """Let upstream's model take a stage's `example_ids`, once a process."""
    original = Sam3Image._encode_prompt

    @functools.wraps(original)
    def encode_prompt(
        self: Any, backbone_out: Any, find_input: Any, geometric_prompt: Any, *args: Any, **kw: Any
    ) -> Any:
        """Encode a prompt's boxes in the image that has them (sam3_image.py:167)."""
        examples = getattr(find_input, "example_ids", None)
        if examples is None:
            return original(self, backbone_out, find_input, geometric_prompt, *args, **kw)
        there = copy.copy(find_input)
        there.img_ids = examples
        elsewhere = (examples != find_input.img_ids)[:, None]  # (P, 1)
        with _from_elsewhere(self.geometry_encoder, elsewhere[:, 0]):
            prompt, mask, backbone_out = original(
                self, backbone_out, there, geometric_prompt, *args, **kw
            )
        boxes = (~geometric_prompt.box_mask).sum(dim=1, keepdim=True)
        words = prompt.shape[0] - geometric_prompt.box_mask.shape[1] - 1
        tokens = torch.arange(prompt.shape[0], device=mask.device)[None]
        mask = mask | (elsewhere & (tokens == words + boxes))  # not the other image's own token
        own = encode_boxes(self, backbone_out, find_input.img_ids, None)[0]  # (1, P, D)
        return torch.cat([prompt, own]), torch.cat([mask, ~elsewhere], dim=1), backbone_out

    Sam3Image._encode_prompt = encode_prompt


@contextlib.contextmanager
def _from_elsewhere(encoder: Any, elsewhere: Tensor) -> Iterator[None]:
    """Let an encoder leave out the places of the boxes of some prompts, (P,) bool."""
    encoder.elsewhere = elsewhere
    try:
        yield
    finally:
        encoder.elsewhere = None


def places_of(encoder: Any, boxes: Tensor) -> Tensor:
    """Return the boxes (N, P, 4), cxcywh, 0..1, whose places a geometry encoder tells."""
    elsewhere = getattr(encoder, "elsewhere", None)
    if elsewhere is None:
        return boxes
    whole = torch.tensor(WHOLE, device=boxes.device, dtype=boxes.dtype)
    return torch.where(elsewhere[None, :, None], whole, boxes)


def encode_boxes(
    model: Any, features: dict[str, Any], image_ids: Tensor, boxes: Prompt | None
) -> tuple[Tensor, Tensor]:
    """Return tokens (N + 1, P, D) of N example boxes, and their mask (P, N + 1), True for none.

    They are for other images. Behind its boxes each prompt has a token of the whole image, which
    alone is there without boxes.

    Args:
        features: upstream's, of B images.
        image_ids: (P,) int64, the image that each prompt's boxes lie in.
        boxes: of P prompts; None for none.
    """
    if boxes is None:
        none = torch.zeros(0, len(image_ids), 4, device=image_ids.device)
        boxes = Prompt(box_embeddings=none, box_mask=none.new_zeros(len(image_ids), 0).bool())
    _, maps, positions, sizes = model._get_img_feats(features, image_ids)
    with _from_elsewhere(model.geometry_encoder, torch.ones_like(image_ids, dtype=torch.bool)):
        tokens, mask = model.geometry_encoder(
            geo_prompt=boxes, img_feats=maps, img_sizes=sizes, img_pos_embeds=positions
        )
    return tokens, mask
