"""Follow 10,000 frames; print the megabytes of this process after 2,000 and after all of them."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from PIL import Image, ImageDraw

from app.inference.detections import Detections
from app.inference.film_writer import FilmWriter
from app.inference.following import Following, follow_films, list_films
from app.inference.settings import RANDOM, Settings
from tests.inference.colors import ByColor

FRAMES = 10_000
PERIOD = 104  # frames after which the squares are where they were
found: list[float] = []


class Measured(ByColor):
    """Looks at the frames of one period, which come again and again."""

    period: list[Detections] = []  # noqa: RUF012

    def _one(self, *arguments: Any) -> Detections:
        if self.seen in (2000, FRAMES):
            gc.collect()
            found.append(psutil.Process().memory_info().rss / 1e6)
        if len(self.period) < PERIOD:
            self.period.append(super()._one(*arguments))
        return self.period[(self.seen - 1) % PERIOD]


def main(folder: Path) -> None:
    writer = FilmWriter(folder / "long.mp4", 25)
    for number in range(FRAMES):
        image = Image.new("RGB", (64, 48))
        for row in range(2):
            left = (number * (row + 1) + 40 * row) % PERIOD - 20
            box = (left, 4 + 22 * row, left + 11, 15 + 22 * row)
            ImageDraw.Draw(image).rectangle(box, fill=(255, 0, 0))
        writer.add(image, number / 25)
    writer.close()
    save = ("video", "coco", "mot", "csv")
    films = list_films(str(folder / "long.mp4"), folder / "out", save, fps=25, overwrite=False)
    settings = Settings(RANDOM, prompts=("red",), threshold=0.5)
    follow_films(films, folder / "out", replace(settings, save=save), Following(), Measured())
    print(*found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
