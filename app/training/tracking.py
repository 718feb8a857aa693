"""Where figures go: metrics.csv, metrics.json and TensorBoard, always."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from app.files import atomic_path, write_json


class Tracker:
    """The figures of one run, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def log_epoch(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write metrics.csv, whole, with a row an epoch; send the last row to TensorBoard."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (
            atomic_path(self.folder / "metrics.csv") as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        for key, value in rows[-1].items():
            self._board.add_scalar(key, value, int(rows[-1]["epoch"]))
        self._board.flush()

    def finish(self, figures: Mapping[str, float | str | int]) -> None:
        """Write metrics.json and close."""
        write_json(self.folder / "metrics.json", figures)
        self._board.close()
