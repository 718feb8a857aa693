"""Measure what choosing the next images saves, beside chance; exits 1 below the goal.

    .venv/bin/python -m benchmarks.active                    # both parts: hours on 2 cores
    .venv/bin/python -m benchmarks.active shapes --seeds 2   # one part, fewer seeds than 5

A person labels six images, then six more at a time: those that `app rank` asks for, by the weights
of the round before, or any. Each round's weights are tuned from the carried nano on all that is
labelled, and scored on the same images.
"""

from __future__ import annotations

import logging
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from app.datasets.build import Splits, load_splits
from app.datasets.coco import Dataset
from app.inference import ranking
from app.inference.predictor import Predictor
from benchmarks.first_hour import Goal
from benchmarks.nano import NEW_SETTINGS, arguments, draw, fine_tune, join

FIRST, STEP, ROUNDS = 6, 6, 3  # labelled images at first, more of them each round, and rounds
POOL, RARE = 60, 6  # images without labels, and those of them that show the rare class
EPOCHS = 40
SAVED = 0.20  # of the labels, for the same AP
POTHOLES = Path(__file__).resolve().parents[1] / "examples" / "potholes"
Curve = list[float]  # AP of each round


@dataclass(frozen=True)
class Task:
    """Images without labels, whose labels are known here, and images to score on."""

    pool: Dataset
    valid: Dataset
    figure: str
    settings: Sequence[str]


def shapes(seed: int, folder: Path) -> Task:
    """Crosses and stars, and rings in a tenth of the images alone."""
    kinds = {"kinds": ["cross", "star", "ring"], "exclude": [], "label_by": "kind"}
    given = draw(folder / "set", train=300, valid=100, **kinds)
    names = {category.id: category.name for category in given.train.categories}
    rare = {a.image_id for a in given.train.annotations if names[a.category_id] == "ring"}
    chance = random.Random(seed)
    common = [image.id for image in given.train.images if image.id not in rare]
    chosen = chance.sample(sorted(rare), RARE) + chance.sample(common, POOL - RARE)
    return Task(given.train.subset(chosen), given.valid, "bbox/AP", NEW_SETTINGS)


def potholes(_seed: int, _folder: Path) -> Task:
    """The photographs of the repository."""
    given = load_splits(POTHOLES)
    assert given.test is not None
    valid = join(given.valid, given.test)
    return Task(given.train, valid, "bbox/AP50", ["optim.lr_scale=0.5"])


def curves(task: Task, start: Path, seed: int, folder: Path) -> tuple[Curve, Curve]:
    """Return the AP after each round, of chosen images and of any; the first round is shared."""
    ids = [image.id for image in task.pool.images]
    first = set(random.Random(seed).sample(ids, FIRST))

    def labelled(images: set[int], run: Path) -> float:
        splits = Splits(task.pool.subset(images), task.valid, None, ())
        return fine_tune(splits, run, start, EPOCHS, task.settings)[task.figure]

    shared = labelled(first, folder / "first")
    found = []
    for words in ("chosen", "by chance"):
        curve, images, chance, run = [shared], set(first), random.Random(seed), folder / "first"
        for number in range(1, ROUNDS):
            left = [id for id in ids if id not in images]
            if words == "chosen":
                images |= _asked_for(task.pool, images, left, run / "weights" / "best")
            else:
                images |= set(chance.sample(left, STEP))
            run = folder / f"{words} {number}"
            curve.append(labelled(images, run))
        print(f"  seed {seed}, {words}: {[round(value, 3) for value in curve]}", flush=True)
        found.append(curve)
    return found[0], found[1]


def _asked_for(pool: Dataset, labelled: set[int], left: Sequence[int], weights: Path) -> set[int]:
    """Return the images that rank asks for."""
    predictor, known = Predictor.load(weights), pool.subset(labelled)
    paths = {image.path: image.id for image in pool.images if image.id in set(left)}
    prompts = pool.class_names
    seen, _ = ranking.look(predictor, list(paths), prompts)
    chosen = ranking.rank(
        seen,
        prompts,
        STEP,
        weights=ranking.weights_of(prompts, known),
        labelled=ranking.features_of(predictor, known),
    )
    return {paths[each.image] for each in chosen}


def saved(chosen: Sequence[Curve], by_chance: Sequence[Curve]) -> float:
    """Return the share of labels that choosing saves for the AP that chance has at last."""
    counts = [FIRST + STEP * number for number in range(ROUNDS)]
    mean = np.maximum.accumulate(np.mean(chosen, axis=0))
    needed = float(np.interp(np.mean(by_chance, axis=0)[-1], mean, counts))
    return 1 - needed / counts[-1]


def report(name: str, chosen: Sequence[Curve], by_chance: Sequence[Curve]) -> Goal:
    """Print both curves, and the difference of their areas with its 95 % interval."""
    for words, curves in (("chosen", chosen), ("by chance", by_chance)):
        means = ", ".join(f"{value:.3f}" for value in np.mean(curves, axis=0))
        print(f"{name}, {words}: {means}")
    gains = np.mean(chosen, axis=1) - np.mean(by_chance, axis=1)
    mean = statistics.mean(gains)
    if len(gains) > 1:
        half = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
        print(f"{name}: mean AP of the rounds {mean:+.3f} ± {half:.3f} (95 %)")
    return Goal(f"{name}: share of labels saved", saved(chosen, by_chance), SAVED)


PARTS: dict[str, Callable[[int, Path], Task]] = {"shapes": shapes, "potholes": potholes}


def main() -> int:
    options = arguments(__doc__, PARTS, seeds=5)
    logging.getLogger("app").setLevel(logging.ERROR)
    goals = []
    for name in options.parts or PARTS:
        found = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                task = PARTS[name](seed, Path(folder))
                found.append(curves(task, options.weights, seed, Path(folder)))
        goals.append(report(name, *zip(*found, strict=True)))
        print(goals[-1], flush=True)
    return 0 if all(goal.reached for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
