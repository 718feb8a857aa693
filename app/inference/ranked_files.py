"""A ranking as files: a list for other commands, a table, Label Studio's tasks, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from app.datasets.images import open_image
from app.files import csv_text, write_csv, write_json, write_text
from app.inference.outputs import draw_detections
from app.inference.predictor import Predictor
from app.inference.proposals import LOCAL
from app.inference.ranking import Ranked
from app.page import page, picture, text

SHOWN = 100  # pictures
SIDE = 480  # pixels


def write(
    folder: Path,
    ranked: Sequence[Ranked],
    predictor: Predictor,
    prompts: Sequence[str],
    root: Path,
    weights: str,
) -> Path:
    """Write `rank.txt` (a path a line), `rank.csv`, `tasks.json` and `rank.html`; return the page.

    Args:
        root: folder of the images, which Label Studio serves.
        weights: that asked for the images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "rank.txt", "".join(f"{each.image.resolve()}\n" for each in ranked))
    rows = [
        {
            "rank": number,
            "image": csv_text(str(each.image)),
            "doubt": round(each.doubt, 4),
            "distance": round(each.distance, 4),
            "reason": csv_text(each.reason),
        }
        for number, each in enumerate(ranked, start=1)
    ]
    write_csv(folder / "rank.csv", ["rank", "image", "doubt", "distance", "reason"], rows)
    write_json(
        folder / "tasks.json",
        [_task(number, each, root, weights) for number, each in enumerate(ranked, start=1)],
    )
    figures = [
        picture(
            _drawn(each.image, predictor, prompts),
            f"{number}. {each.image.name}: {each.reason}, doubt {each.doubt:.2f}",
        )
        for number, each in enumerate(ranked[:SHOWN], start=1)
    ]
    more = len(ranked) - SHOWN
    told = f" The first {SHOWN} of {len(ranked)} are shown." if more > 0 else ""
    words = f"What the weights propose for {', '.join(prompts)}.{told}"
    body = [f"<p>{text(words)}</p>", f'<div class="row">{"".join(figures)}</div>']
    file = folder / "rank.html"
    write_text(file, page("Which images to label next", body))
    return file


def _task(number: int, ranked: Ranked, root: Path, weights: str) -> dict[str, Any]:
    """Return Label Studio's task of an image: the lowest score is asked for first.

    Its prediction has no regions: what is proposed comes from the server, or from `label`.
    """
    image = ranked.image.resolve()
    place = image.relative_to(root) if image.is_relative_to(root) else Path(image.name)
    return {
        "data": {"image": f"{LOCAL}{place.as_posix()}", "rank": number, "reason": ranked.reason},
        "predictions": [{"model_version": weights, "score": 1 - ranked.doubt, "result": []}],
    }


def _drawn(image: Path, predictor: Predictor, prompts: Sequence[str]) -> Image.Image:
    """Return an image with what the weights propose, small enough for a page."""
    pixels = open_image(image, predictor.levels)
    drawn = draw_detections(pixels, predictor.predict(pixels, prompts))
    drawn.thumbnail((SIDE, SIDE))
    return drawn
