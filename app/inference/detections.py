"""What was found in one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from app.inference.masks import bool_masks


@dataclass(frozen=True)
class Detections:
    """What was found in one image, highest score first.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the image, within it.
        scores: (N,) float32, 0..1.
        prompt_ids: (N,) int64, index into `prompts`.
        prompts: what was asked for.
        masks: N compressed COCO RLEs of the image's size; None from a model without a mask head.
        width, height: of the image, pixels.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    prompt_ids: np.ndarray
    prompts: tuple[str, ...]
    masks: list[dict[str, Any]] | None
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, kept: Sequence[int] | np.ndarray) -> Detections:
        """Some of them, by index, in the order given."""
        indices = np.asarray(kept, dtype=np.int64)
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy[indices],
            scores=self.scores[indices],
            prompt_ids=self.prompt_ids[indices],
            masks=None if self.masks is None else [self.masks[index] for index in indices],
        )

    def bool_masks(self) -> np.ndarray:
        """The masks as (N, height, width) bool; raises ValueError where there are none."""
        if self.masks is None:
            raise ValueError("these weights have no mask head: there are boxes only")
        return bool_masks(self.masks, self.height, self.width)
