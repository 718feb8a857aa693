"""A run's gain in words: what was found before training and now, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping

from app.datasets.coco import Dataset

FEW = 30  # images, below which a figure is rough
Figures = Mapping[str, float]
BY_EXAMPLES = {  # figures of `by_examples`, and what they are called
    "box/bbox/AP": "box AP by a box in the image",
    "both/bbox/AP": "box AP by a box and words",
    "other1/bbox/AP": "box AP by 1 box of another image",
    "other3/bbox/AP": "box AP by 3 boxes of others",
    "other5/bbox/AP": "box AP by 5 boxes of others",
}


def gain_in_words(before: Figures, now: Figures, dataset: Dataset) -> list[str]:
    """Return the lines that tell what training has brought, and how sure that is.

    Args:
        before, now: figures of the validation before training, and of the best weights; the latter
            `intervals.with_intervals`, but for runs of before there were any.
    """
    objects = sum(not annotation.iscrowd for annotation in dataset.annotations)
    images = len(dataset.images)
    lines = [
        f"of {_count(objects, 'object')} in {_count(images, 'validation image')}: "
        f"{_found(before, objects)} before training, {_found(now, objects)} now"
    ]
    names = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
    gains = [
        f"{name} {before[key]:.2f} before, {now[key]:.2f} now"
        for key, name in names.items()
        if key in before and key in now
    ]
    sentences = [f"{'; '.join(gains)}."]
    if "gain/bbox/AP_low" in now:
        gain, low, high = (now[f"gain/bbox/AP{side}"] for side in ("", "_low", "_high"))
        sentences.append(_gain(gain, low, high, images))
    if others := bounds(now, "bbox/AP"):
        rough = f"; more images than {images} would narrow that" if images < FEW else ""
        sentences.append(f"Box AP of other such images: {others} (95 %{rough})")
    lines.append(" ".join(sentences))
    if "folds" in now:
        lines.append(
            f"Each image was scored in one of {now['folds']:g} folds, by weights that had not seen "
            "it. Those that are kept were trained on all of them, to the median of the folds' best "
            f"epochs, {now['folds/epoch']:g}: they have seen more, and should be no worse."
        )
    return lines


def bounds(figures: Figures, name: str) -> str:
    """Return the interval of a figure as text; empty where it has none."""
    low, high = (figures.get(f"{name}_{side}") for side in ("low", "high"))
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _gain(gain: float, low: float, high: float, images: int) -> str:
    """Return what is to be thought of a difference of box AP whose interval this is."""
    found = f"{gain:+.2f} box AP, 95 %: {low:+.2f} to {high:+.2f}"
    if low <= 0 <= high:
        return f"No gain that {_count(images, 'image')} could show ({found})."
    return f"{'A gain' if gain > 0 else 'A loss'} beyond chance ({found})."


def _found(figures: Figures, objects: int) -> str:
    """Return how many were found at the threshold that suits the weights best, and false alarms."""
    hits = round(figures.get("calibration/recall", 0.0) * objects)
    if not hits:
        return "none was found"
    wrong = round(hits / figures["calibration/precision"]) - hits
    return f"{hits} found and {_count(wrong, 'false alarm')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
