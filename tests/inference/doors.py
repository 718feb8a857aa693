"""A folder of predictions by a finder that finds the same everywhere, without a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.inference.batch import Work, predict_batches
from app.inference.detections import Detections
from app.inference.folder import list_jobs, predict_folder
from app.inference.masks import place
from app.inference.settings import Settings

SETTINGS = Settings("none", prompts=("=1+1",), threshold=0.5)


class Same:
    """Finds a square in the corner of each image."""

    levels = None  # of images of more than 8 bits

    def predict_batch(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **_: Any
    ) -> list[Detections]:
        """Return the square as a detection of the first prompt."""
        return [
            Detections(
                boxes_xyxy=np.array([[0, 0, 4, 4]], dtype=np.float32),
                scores=np.array([0.9], dtype=np.float32),
                prompt_ids=np.array([0]),
                prompts=tuple(prompts),
                masks=[place(np.ones((4, 4), dtype=bool), 0, 0, image.height, image.width)],
                width=image.width,
                height=image.height,
            )
            for image in images
        ]


def predict(
    source: Path,
    output: Path,
    *save: str,
    overwrite: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> list[str]:
    """Predict on images; return the problems of single ones.

    Args:
        meanwhile: what happens while the weights are loaded.
    """

    @contextlib.contextmanager
    def open_work(settings: Settings, output: Path, _: int) -> Iterator[tuple[Work, str]]:
        meanwhile()
        finder: Any = Same()
        yield partial(predict_batches, finder, settings, output), "fp32"

    settings = Settings(**{**SETTINGS.__dict__, "save": save or ("overlay", "coco")})
    jobs = list_jobs(str(source), output, settings.save, overwrite=overwrite)
    return predict_folder(jobs, output, settings, open_work, overwrite=overwrite)
