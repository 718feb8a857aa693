"""The detections of one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from app.console import counted
from app.inference.masks import bool_masks

SHOWN = 5  # detections in a `repr`


@dataclass(frozen=True, repr=False)
class Detections:
    """Hold the detections of one image, the highest score first.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the image, within it.
        scores: (N,) float32, 0..1.
        prompt_ids: (N,) int64, index into `prompts`.
        prompts: noun phrases that the image was asked for.
        masks: N compressed COCO RLEs of the image's size; None from a model without a mask head.
        width, height: of the image, pixels.
        best_score: the highest score of any query, 0..1, also where it is not above the threshold,
            so that a user can be told which threshold would show it; None where it is not known.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    prompt_ids: np.ndarray
    prompts: tuple[str, ...]
    masks: list[dict[str, Any]] | None
    width: int
    height: int
    best_score: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        """Return "3 detections of 640 x 480: circle 0.93, …"."""
        size = f"{counted(len(self), 'detection')} of {self.width} x {self.height}"
        shown = [
            f"{self.prompts[int(prompt)]} {score:.2f}"
            for prompt, score in zip(self.prompt_ids[:SHOWN], self.scores, strict=False)
        ]
        if len(self) > SHOWN:
            shown.append("…")
        return f"{size}: {', '.join(shown)}" if shown else size

    def select(self, indices: Sequence[int] | np.ndarray) -> Detections:
        """Return some of the detections, by index, in the order given."""
        order = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy[order],
            scores=self.scores[order],
            prompt_ids=self.prompt_ids[order],
            masks=None if self.masks is None else [self.masks[index] for index in order],
        )

    def bool_masks(self) -> np.ndarray:
        """Return the masks as (N, height, width) bool; raise ValueError without a mask head."""
        if self.masks is None:
            raise ValueError("these weights have no mask head: there are boxes only")
        return bool_masks(self.masks, self.height, self.width)
