"""How long does a dataset take to make? Exits 1 where it takes longer than the goal.

    .venv/bin/python -m benchmarks.datasets shapes

The goal is for 1,000 images of 640 x 480 on 2 cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from app.datasets.shapes import make_shapes

GOAL = 10  # seconds for IMAGES
IMAGES = 1000


def time_shapes(images: int, background: str, workers: int | None) -> float:
    """Seconds to draw and write `images` of 640 x 480, with every option in use."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        make_shapes(
            Path(folder) / "set",
            workers=workers,
            train=images,
            valid=0,
            background=background,
            kinds=("circle", "rectangle", "triangle", "ellipse", "star", "ring", "cross"),
            colors=("red", "green", "blue", "yellow"),
            label_by="both",
        )
        return time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["shapes"], default="shapes")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--background", default="mixed")
    parser.add_argument("--workers", type=int, help="threads; one a core where not given")
    arguments = parser.parse_args()
    seconds = time_shapes(arguments.images, arguments.background, arguments.workers)
    goal = GOAL * arguments.images / IMAGES
    print(f"shapes: {arguments.images} images of 640x480 in {seconds:.1f} s (goal {goal:g} s)")
    return 0 if seconds <= goal else 1


if __name__ == "__main__":
    sys.exit(main())
