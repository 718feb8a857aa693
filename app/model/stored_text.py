"""A fixed list of prompts in the text encoder's place: for deployment, 354 M parameters fewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn

from app.errors import UserError
from app.model.vocabulary import VISUAL_PROMPT, unknown_words


class StoredText(nn.Module):
    """The text encoder's stored output for K prompts; it answers no others.

    Args:
        prompts: in the order of the features; what boxes without words need is beside them.
        context_length: tokens.
        d_model: width of the features.
    """

    mask: Tensor  # (K, L) bool, True where there is no token
    memory: Tensor  # (L, K, d_model) float32

    def __init__(self, prompts: Sequence[str], context_length: int, d_model: int) -> None:
        super().__init__()
        self.prompts = tuple(dict.fromkeys((*prompts, VISUAL_PROMPT)))
        self._places = {prompt: index for index, prompt in enumerate(self.prompts)}
        count = len(self.prompts)
        self.register_buffer("mask", torch.zeros(count, context_length, dtype=torch.bool))
        self.register_buffer("memory", torch.zeros(context_length, count, d_model))

    def forward(
        self, captions: Sequence[str], input_boxes: Any = None, device: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return padding (N, L), features (L, N, d), and these again in the embeddings' place.

        Raises:
            UserError: prompts that are not stored; lists those that are.
        """
        del input_boxes, device
        if problems := unknown_words(self.prompts, captions):
            raise UserError(problems)
        places = [self._places[caption] for caption in captions]
        memory = self.memory[:, places]
        return self.mask[places], memory, memory


def store(model: Sam3Image, prompts: Sequence[str], context_length: int) -> StoredText:
    """Run the model's text encoder on the prompts and store its output."""
    text: Any = model.backbone.language_backbone
    device = next(model.parameters()).device
    stored = StoredText(prompts, context_length, text.resizer.out_features).to(device)
    with torch.inference_mode():
        mask, memory, _ = text.eval()(list(stored.prompts), device=device)
    stored.mask.copy_(mask)
    stored.memory.copy_(memory)
    return stored
