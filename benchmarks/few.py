"""Measure what few labelled images say and bring, beside goals; exits 1 below one.

    .venv/bin/python -m benchmarks.few                      # all of it: hours on 2 cores
    .venv/bin/python -m benchmarks.few coverage unseen      # parts that train nothing: minutes
    .venv/bin/python -m benchmarks.few honest --seeds 1     # fewer seeds than 5
    .venv/bin/python -m benchmarks.few unseen --weights outputs/nano-examples/weights/best

A seed that is done is kept in outputs/few.jsonl, and not run again with the same weights.
Shapes that the carried nano has never seen (star and ring) and examples/potholes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from app.datasets.build import load_splits
from app.datasets.coco import Dataset, write
from app.evaluation.by_examples import score_by_examples
from app.evaluation.intervals import ap_interval, gain_interval
from app.evaluation.metrics import evaluate
from app.evaluation.validate import validate
from app.files import hash_file, read_json
from app.inference.predictor import Predictor
from benchmarks.first_hour import Goal
from benchmarks.nano import KNOWN_KINDS, NEW_KINDS, arguments, draw, join

ROOT = Path(__file__).resolve().parents[1]
DONE = ROOT / "outputs" / "few.jsonl"
POTHOLES = ROOT / "examples" / "potholes"
LEVEL = 0.90  # of the interval whose coverage is measured
DRAWS, SAMPLES, GOAL_AT = 200, (3, 5, 10, 20), 20  # samples of so many images
MOVED = 2.0  # pixels, by which boxes of other results are displaced
POOL = 400  # images that stand for all there are
NEW = 300  # images that no run has seen
SHOTS = (3, 10, 20)
LAST = "evaluation.every=1000"  # so that the images that score weights do not choose among them

Results = list[dict[str, Any]]


def coverage(start: Path, _: int, folder: Path) -> Iterator[str | Goal]:
    """What intervals of few images promise, of weights that train no more.

    How often one holds the AP of all; and how often a gain that chance made is called one: two
    results of each image, of which a coin says which is the one before.
    """
    pool = draw(folder, train=POOL, valid=1, kinds=KNOWN_KINDS, label_by="kind").train
    results = validate(Predictor.load(start), pool, max_detections=100).results
    whole = evaluate(pool, results)["bbox/AP"]
    yield f"AP of all {POOL}: {whole:.3f}"
    chance = random.Random(0)
    first, second = _by_image(results), _by_image(_moved(results, chance))
    for size in SAMPLES:
        held = called = 0
        for _draw in range(DRAWS):
            chosen = chance.sample([image.id for image in pool.images], size)
            part, swapped = pool.subset(chosen), {id for id in chosen if chance.random() < 0.5}
            same = [result for id in chosen for result in first[id]]
            found = ap_interval(part, same, "bbox", LEVEL)
            held += found.low <= whole <= found.high
            before = [r for id in chosen for r in (first if id in swapped else second)[id]]
            now = [r for id in chosen for r in (second if id in swapped else first)[id]]
            gain = gain_interval(part, before, now)[1]
            called += not gain.low <= 0 <= gain.high
        yield f"{size} images: {called / DRAWS:.3f} of the gains that chance made are called one"
        share = held / DRAWS
        name = f"share of {LEVEL:.0%} intervals from {size} images that hold it"
        if size == GOAL_AT:
            yield Goal(name, share, 0.85)
            yield Goal("  and not too wide", share, 0.95, at_most=True)
        else:
            yield f"{name}: {share:.3f}"


def _by_image(results: Results) -> dict[int, Results]:
    found: dict[int, Results] = defaultdict(list)
    for result in results:
        found[result["image_id"]].append(result)
    return found


def _moved(results: Results, chance: random.Random) -> Results:
    """Return other results of the same images: boxes displaced, scores lowered."""
    return [
        result
        | {"bbox": [side + chance.gauss(0, MOVED) for side in result["bbox"]]}
        | {"score": result["score"] * chance.uniform(0.9, 1.0)}
        for result in results
    ]


def honest(start: Path, seed: int, folder: Path) -> Iterator[str | Goal]:
    """The AP that folds promise, beside the final weights' on new images; and a single split's."""
    given = draw(folder / "set", train=12, valid=NEW, kinds=NEW_KINDS, exclude=[], label_by="kind")
    own = _unsplit(folder, given.train)
    gaps = []
    for name, words in (("folds", ["--folds", "5"]), ("split", ["--folds", "none"])):
        _train(start, own, folder / name, [*words, "--seed", str(seed)])
        said = read_json(folder / name / "metrics.json")["bbox/AP"]
        predictor = Predictor.load(folder / name / "weights" / "best")
        true = validate(predictor, given.valid, max_detections=100).figures["bbox/AP"]
        yield f"{name}: box AP {said:.3f} said, {true:.3f} on {NEW} new images"
        gaps.append(abs(said - true))
    yield Goal("difference of the folds' AP", gaps[0], 0.05, at_most=True)
    yield Goal("  how much less than a single split's", gaps[1] - gaps[0], 0.0)


def duration(start: Path, seed: int, folder: Path) -> Iterator[str | Goal]:
    """The time of five folds of `head`, beside one run's; each computes its features anew."""
    given = draw(folder / "set", train=20, valid=1, kinds=NEW_KINDS, exclude=[], label_by="kind")
    own, seconds = _unsplit(folder, given.train), []
    for words in (["--folds", "none"], ["--folds", "5"]):
        begun = time.monotonic()
        _train(
            start, own, folder / words[1], [*words, "--method", "head", "--epochs", "10"], seed=seed
        )
        seconds.append(time.monotonic() - begun)
    yield f"{seconds[0]:.0f} s one run, {seconds[1]:.0f} s in folds"
    yield Goal("times as long in five folds", seconds[1] / seconds[0], 2.5, at_most=True)


def shots(start: Path, seed: int, folder: Path) -> Iterator[str | Goal]:
    """AP after few images, by words alone and with examples as well; never worse, +0.05 at 3."""
    gains = {}
    for count in SHOTS:
        settings = {"kinds": NEW_KINDS, "exclude": [], "label_by": "kind"}
        given = draw(folder / f"set{count}", train=count, valid=100, **settings)
        found = {}
        for name, share in (("words", 0.0), ("examples", 0.5)):
            words = ["--folds", "none", f"dataset.examples={share}", "--seed", str(seed), LAST]
            run = folder / f"{name}{count}"
            _train(start, folder / f"set{count}", run, words)
            predictor = Predictor.load(run / "weights" / "best")
            by_words = validate(predictor, given.valid, max_detections=100).figures["bbox/AP"]
            kinds = ["other", "both"] if share else []
            others = score_by_examples(
                predictor, given.train, given.valid, kinds, max_detections=100, seed=seed
            )
            found[name] = max(by_words, others.get("other5/bbox/AP", 0.0))
            yield (
                f"{count} images, {name}: box AP {by_words:.3f} by words"
                + "".join(f", {others[k]:.3f} {k[:-8]}" for k in others if k.endswith("bbox/AP"))
            )
        gains[count] = found["examples"] - found["words"]
    for count, gain in gains.items():
        yield Goal(f"gain by examples after {count} images", gain, 0.05 if count == 3 else 0.0)


def unseen(start: Path, seed: int, folder: Path) -> Iterator[str | Goal]:
    """AP on star and ring without any training: by words, by a box, by boxes of other images."""
    given = draw(folder, train=20, valid=100, kinds=NEW_KINDS, exclude=[], label_by="kind")
    predictor = Predictor.load(start)
    words = validate(predictor, given.valid, max_detections=100).figures["bbox/AP"]
    kinds = ["box", "both", "other"]
    figures = score_by_examples(
        predictor, given.train, given.valid, kinds, max_detections=100, seed=seed
    )
    shown = {name[:-8]: value for name, value in figures.items() if name.endswith("/bbox/AP")}
    yield f"words {words:.3f}; " + ", ".join(f"{k} {value:.3f}" for k, value in shown.items())
    yield Goal("box AP by one example in the image", shown["box"], 0.30)


def potholes(start: Path, seed: int, folder: Path) -> Iterator[str | Goal]:
    """Twelve photographs in folds, beside the others."""
    everything = load_splits(POTHOLES)
    assert everything.test is not None
    chosen = random.Random(seed).sample([image.id for image in everything.train.images], 12)
    own = _unsplit(folder, everything.train.subset(chosen))
    _train(start, own, folder / "run", ["--folds", "5", "--seed", str(seed)])
    said = read_json(folder / "run" / "metrics.json")
    predictor = Predictor.load(folder / "run" / "weights" / "best")
    others = join(everything.valid, everything.test)
    true = validate(predictor, others, max_detections=100).figures["bbox/AP50"]
    print(
        f"potholes: box AP50 {said['bbox/AP50']:.3f} said (AP {said['bbox/AP_low']:.3f} to "
        f"{said['bbox/AP_high']:.3f}), {true:.3f} on {len(others.images)} other photographs"
    )
    yield Goal("difference of the folds' AP50", abs(said["bbox/AP50"] - true), 0.15, at_most=True)


def _unsplit(folder: Path, images: Dataset) -> Path:
    """Write a dataset as a folder without a validation split."""
    own = folder / "own"
    own.mkdir(parents=True)
    copied = []
    for image in images.images:
        shutil.copy(image.path, own / image.path.name)
        copied.append(replace(image, path=own / image.path.name))
    write(replace(images, images=tuple(copied)), own / "_annotations.coco.json")
    return own


def _train(
    start: Path, data: Path, folder: Path, words: Sequence[str], seed: int | None = None
) -> None:
    more = [] if seed is None else ["--seed", str(seed)]
    subprocess.run(
        [
            *("./train.sh", "--checkpoint", start, "--dataset-dir", data),
            *("--output-dir", folder, *words, *more),
        ],
        cwd=ROOT,
        env=os.environ | {"SAM3_RUNTIME": "local"},
        stdout=subprocess.DEVNULL,
        check=True,
    )


Part = Callable[[Path, int, Path], Iterator[str | Goal]]  # of weights, a seed, a new folder
PARTS: dict[str, Part] = {
    part.__name__: part for part in (coverage, honest, duration, shots, unseen, potholes)
}
ONCE = ("coverage", "duration")  # parts that have no seed to choose


def _seed(name: str, seed: int, start: Path, weights: str) -> list[Goal]:
    """Run one seed of a part and print what it says; or what it said, if it ran before."""
    key = {"part": name, "seed": seed, "weights": weights}
    for line in DONE.read_text().splitlines() if DONE.exists() else ():
        record = json.loads(line)
        if {field: record[field] for field in key} == key:
            print("\n".join(record["said"]), flush=True)
            return [Goal(**goal) for goal in record["goals"]]
    said, goals = [], []
    with tempfile.TemporaryDirectory() as folder:
        for found in PARTS[name](start, seed, Path(folder) / "work"):
            if isinstance(found, Goal):
                goals.append(found)
            else:
                said.append(found)
                print(found, flush=True)
    DONE.parent.mkdir(exist_ok=True)
    with DONE.open("a") as file:
        record = key | {"said": said, "goals": [asdict(goal) for goal in goals]}
        file.write(json.dumps(record) + "\n")
    return goals


def main() -> int:
    options = arguments(__doc__, PARTS, seeds=5)
    weights = hash_file(options.weights / "model.safetensors")
    reached = True
    for name in options.parts or PARTS:
        found: dict[str, list[Goal]] = {}
        for seed in range(1 if name in ONCE else options.seeds):
            for goal in _seed(name, seed, options.weights, weights):
                print(f"  seed {seed}: {goal.name}: {goal.value:.3f}", flush=True)
                found.setdefault(goal.name, []).append(goal)
        for goals in found.values():
            mean = replace(goals[0], value=statistics.mean(goal.value for goal in goals))
            print(f"{name}: {mean}", flush=True)
            reached &= mean.reached
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
