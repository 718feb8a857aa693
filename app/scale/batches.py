"""Batches of columns in, columns out: for Ray Data's `map_batches`, and engines like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.datasets.images import ImageError, open_image
from app.errors import UserError
from app.inference.finder import Picture
from app.inference.predictor import Predictor
from app.scale.parts import SCHEMA, Row, failed_row, row_of

IMAGE, BYTES, NAME = "image", "bytes", "path"  # columns that are read
COLUMNS = tuple(SCHEMA.names[1:])  # that are added


class FindObjects:
    """Find the same in each image of a batch; each process that makes one loads the weights.

    Args:
        checkpoint: weights file or folder.
        prompts: noun phrases; none for the classes of the weights.
        device, precision: as of `Predictor.load`.
        limits: as of `Predictor.predict`: threshold, max_detections, nms, tile, overlap.

    Raises:
        UserError: no weights, or a prompt or a number that is refused.
    """

    def __init__(
        self,
        checkpoint: str,
        prompts: Sequence[str] = (),
        *,
        device: str = "auto",
        precision: str = "auto",
        **limits: Any,
    ) -> None:
        self.predictor = Predictor.load(checkpoint, device=device, precision=precision)
        self.prompts, self.limits = tuple(prompts), limits
        self.predictor.query(self.prompts)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch without its pixels, with COLUMNS as `./infer.sh --shards` writes them.

        Args:
            batch: "image": arrays (H, W, 3) uint8, RGB; or "bytes": contents of image files. And
                "path", where there is one: their names.

        Raises:
            UserError: it has neither.
        """
        if IMAGE not in batch and BYTES not in batch:
            raise UserError(f"a batch has {', '.join(batch)}: it needs {IMAGE} or {BYTES}")
        given = batch[IMAGE] if IMAGE in batch else batch[BYTES]
        names = [str(name) for name in batch.get(NAME, [""] * len(given))]
        rows: list[Row | None] = [None] * len(given)
        opened: list[tuple[int, Picture]] = []
        for number, (one, name) in enumerate(zip(given, names, strict=True)):
            try:
                opened.append((number, self._open(one, name)))
            except ImageError as error:
                rows[number] = failed_row(name, error.reason)
        if opened:
            pictures = [picture for _, picture in opened]
            found = self.predictor.predict_batch(pictures, self.prompts, **self.limits)
            for (number, _), each in zip(opened, found, strict=True):
                rows[number] = row_of(names[number], each)
        kept = {key: value for key, value in batch.items() if key not in (IMAGE, BYTES)}
        columns = {key: [row[key] for row in rows if row is not None] for key in COLUMNS}
        return {**kept, **{key: _column(values) for key, values in columns.items()}}

    def _open(self, one: Any, name: str) -> Picture:
        if isinstance(one, bytes | bytearray | memoryview):
            return open_image(Path(name or "image"), self.predictor.levels, bytes(one))
        return np.asarray(one)


def _column(values: Sequence[Any]) -> Any:
    """Return values as an array of objects: their lists may differ in length."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
