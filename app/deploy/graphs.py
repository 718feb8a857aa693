"""The three graphs of an export: image, text and ground, made of plain modules.

`use_plain_modules` must have been applied to the model. Shapes are static: see
`app.deploy.runtime.manifest`.
"""

from __future__ import annotations

from typing import Any

import torch
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn
from torch.nn import functional as F

FPN = ("fpn0", "fpn1", "fpn2")  # finest first: four, two and one cell along the side of a patch
FEATURES = (*FPN, "position")  # outputs of the image graph


class ImageGraph(nn.Module):
    """The image encoder: three FPN maps, and the position embedding of the coarsest."""

    position_map: Tensor  # (1, D, side, side)

    def __init__(self, model: Sam3Image) -> None:
        super().__init__()
        neck: Any = model.backbone.vision_backbone
        self.trunk, self.convs = neck.trunk, neck.convs[: len(FPN)]
        with torch.no_grad():
            empty = torch.empty(1, 1, self.trunk.side, self.trunk.side)
            self.register_buffer("position_map", neck.position_encoding(empty).clone())

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return fpn0, fpn1, fpn2 and position of pixels (1, 3, R, R) float32, -1..1.

        With s = R / patch size: (1, D, 4s, 4s), (1, D, 2s, 2s), (1, D, s, s), (1, D, s, s).
        """
        x = self.trunk(pixels)
        return *(conv(x) for conv in self.convs), self.position_map.clone()


class TextGraph(nn.Module):
    """The text encoder: the features of one prompt."""

    def __init__(self, model: Sam3Image) -> None:
        super().__init__()
        text: Any = model.backbone.language_backbone
        self.encoder, self.resizer = text.encoder, text.resizer

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (1, L, D) float32 and mask (1, L) bool, True where there is no token.

        Args:
            tokens: (1, L) int64, 0 where there is none.
        """
        _, memory = self.encoder(tokens)
        return self.resizer(memory), tokens == 0


class GroundGraph(nn.Module):
    """The detector: scores, presence, boxes and masks of K prompts in one image.

    Computes what upstream's `forward_grounding` does without example boxes. Their encoder then
    gives a single token about the image, which all prompts share, so it is computed once.

    Args:
        prompts: K.
        top: keep the queries with the highest scores, so many for each prompt; None: all, in order.
    """

    def __init__(self, model: Sam3Image, prompts: int, top: int | None = None) -> None:
        super().__init__()
        self.geometry, self.transformer = model.geometry_encoder, model.transformer
        self.scoring, self.head = model.dot_prod_scoring, model.segmentation_head
        self.prompts, self.top = prompts, top

    def forward(
        self,
        fpn0: Tensor,
        fpn1: Tensor,
        fpn2: Tensor,
        position: Tensor,
        text: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return scores (K, Q), presence (K,), boxes (K, Q, 4) cxcywh 0..1, masks (K, Q, h, w).

        Masks are logits; a model without a mask head returns none.

        Args:
            fpn0, fpn1, fpn2, position: of the image graph.
            text: (K, L, D).
            text_mask: (K, L) bool, True where there is no token.
        """
        count = self.prompts
        image = fpn2.flatten(2).permute(2, 0, 1)  # (tokens, 1, D)
        position = position.flatten(2).permute(2, 0, 1)  # (tokens, 1, D)
        token = self._image_token(image, position).expand(-1, count, -1)
        prompt = torch.cat([text.transpose(0, 1), token])  # (L + 1, K, D)
        mask = F.pad(text_mask, (0, 1))  # (K, L + 1)

        memory = image.transpose(0, 1).expand(count, -1, -1)  # (K, tokens, D)
        for layer in self.transformer.encoder.layers:
            memory = layer(
                tgt=memory,
                memory=prompt.transpose(0, 1),
                memory_key_padding_mask=mask,
                query_pos=position.transpose(0, 1),
            )
        memory = memory.transpose(0, 1)

        decoder = self.transformer.decoder
        queries, boxes, presence = decoder(memory, position, prompt, mask, fpn2.shape[-1])
        logits = self.scoring(queries[None], prompt, mask)[0].squeeze(-1)  # (K, Q)
        scores = logits.sigmoid() * presence
        if self.top is not None:
            scores, best = scores.topk(min(self.top, scores.shape[1]), dim=1)
            boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
            queries = queries.gather(1, best[..., None].expand(-1, -1, queries.shape[-1]))
        detections = (scores, presence.squeeze(-1), boxes)
        if self.head is None:
            return detections
        masks = self.head(
            backbone_feats=[fpn0, fpn1, fpn2],
            obj_queries=queries[None],
            image_ids=torch.zeros(count, dtype=torch.long, device=fpn2.device),
            encoder_hidden_states=memory,
            prompt=prompt,
            prompt_mask=mask,
        )["pred_masks"]
        return *detections, masks

    def _image_token(self, image: Tensor, position: Tensor) -> Tensor:
        """Return (1, 1, D), the token that upstream's geometry encoder gives without boxes."""
        encoder = self.geometry
        token = encoder.norm(encoder.final_proj(encoder.cls_embed.weight[None]))
        for layer in encoder.encode:
            token = layer(tgt=token, memory=image, pos=position)
        out: Tensor = encoder.encode_norm(token)
        return out
