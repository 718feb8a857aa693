"""Measure which rate and how many epochs suit how many images, for nano's `--recipe auto`.

    .venv/bin/python -m benchmarks.recipes          # all parts: 90 minutes on 2 cores
    .venv/bin/python -m benchmarks.recipes 10 40    # some, by their number of images

Each part is a sweep in outputs/recipes, which the same command goes on with after any end. Shapes
are crosses, stars and rings, which nano does not know; potholes are the photographs carried here. A
run is scored once, after its last epoch.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from app.datasets.synthetic.shapes import make_shapes

ROOT = Path("outputs", "recipes")
POTHOLES = Path(__file__).resolve().parents[1] / "examples" / "potholes"
VALID = 60  # images of shapes to score on
OVERRIDES = ("evaluation.every=1000", "training.save_every=1000")
QUICK = ("evaluation.pictures=0", "evaluation.off_prompts=0", "training.device=cpu")
# By number of images: settings, on both datasets where potholes has so many (43).
PARTS: dict[int, dict[str, Any]] = {
    10: {"optim.lr_scale": [0.8], "training.epochs": [45, 90]},
    40: {"optim.lr_scale": [0.4, 0.8], "training.epochs": [20, 45]},
    160: {"optim.lr_scale": [0.8], "training.epochs": [5, 15]},
    500: {"optim.lr_scale": [0.8], "training.epochs": [3, 6]},
}
BOTH = 40  # images at most where potholes take part
SEEDS = {10: 3}  # of runs that are over soon; else one


def run(limit: int, jobs: int) -> None:
    """Make or go on with the sweep of a number of images, and print its table."""
    shapes = ROOT / "shapes"
    if not shapes.is_dir():
        drawn = {"kinds": ["cross", "star", "ring"], "exclude": [], "label_by": "kind"}
        make_shapes(shapes, train=500, valid=VALID, seed=0, **drawn)
    folder = ROOT / str(limit)
    settings = {
        "keys": PARTS[limit],
        "datasets": [str(shapes), *([str(POTHOLES)] if limit <= BOTH else [])],
        "seeds": list(range(SEEDS.get(limit, 1))),
        "overrides": [*OVERRIDES, *QUICK, f"dataset.limit={limit}"],
        "metric": "bbox/AP50",
    }
    file = ROOT / f"{limit}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    words = ["sweep", str(file), "--output-dir", str(folder), "--jobs", str(jobs)]
    done = subprocess.run([sys.executable, "-m", "app", *words])
    if done.returncode not in (0, 3):  # 3: some runs failed, and the others count
        sys.exit(done.returncode)
    print(f"\n{limit} images\n{_table(folder / 'sweep.csv')}", flush=True)


def _table(file: Path) -> str:
    """Return a row a setting and dataset: box AP50, box AP and mask AP, mean over seeds."""
    with file.open() as opened:
        rows = [row for row in csv.DictReader(opened) if row["state"] == "done"]
    found: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        found[row["setting"], row["dataset"]].append(row)
    lines = ["| setting | images | box AP50 | box AP | mask AP |", "|---|---|---|---|---|"]
    for (setting, dataset), runs in found.items():
        means = (
            f"{statistics.mean(float(row[name]) for row in runs):.3f}"
            for name in ("bbox/AP50", "bbox/AP", "segm/AP")
        )
        lines.append("| " + " | ".join((setting, dataset, *means)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", type=int, help=f"of {', '.join(map(str, PARTS))}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    if not {*arguments.images} <= {*PARTS}:
        parser.error(f"images: of {', '.join(map(str, PARTS))}")
    ROOT.mkdir(parents=True, exist_ok=True)
    for limit in arguments.images or PARTS:
        run(limit, arguments.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
