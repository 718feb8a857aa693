"""What a newcomer's first two commands bring, as they stand, over seeds; exits 1 below a goal.

    .venv/bin/python -m benchmarks.first_hour                    # 3 seeds: 40 minutes on 2 cores
    .venv/bin/python -m benchmarks.first_hour shapes --seeds 1
    pip download --no-deps --dest WHEELS stardist==0.9.2         # for a third kind of thing: nuclei
    .venv/bin/python -m benchmarks.first_hour nuclei --wheels WHEELS

The defaults of nano were chosen on shapes and potholes. Nuclei, on which they were not, say whether
they are fitted to these: they are of stardist's sample image, cut into 16 tiles, and have no goal.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.build import load_splits
from app.evaluation.validate import validate
from app.files import read_json, write_json
from app.inference.predictor import Predictor
from benchmarks.nano import join

ROOT = Path(__file__).resolve().parents[1]
POTHOLES = ROOT / "examples" / "potholes"
TILES, TILE, SCALE = 4, 128, 2  # tiles a side, pixels of one, and how much they are enlarged


@dataclass(frozen=True)
class Goal:
    """A figure beside what it should reach."""

    name: str
    value: float
    goal: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        missed = "" if self.reached else "  MISSED"
        return f"{self.name}: {self.value:.3f} (goal {sign} {self.goal:.3f}){missed}"


def shapes(seed: int, folder: Path, _: Path | None) -> Iterator[Goal]:
    """Run `./train.sh`: drawn shapes in a look that the carried model does not know."""
    seconds = train(folder, ["--seed", str(seed)])
    figures = read_json(folder / "run" / "metrics.json")
    before, after = figures["baseline/bbox/AP"], figures["bbox/AP"]
    print(f"box AP {before:.3f} before, {after:.3f} after; mask AP {figures['segm/AP']:.3f}")
    yield Goal("box AP", after, max(2 * before, before + 0.3, 0.70))
    yield Goal("seconds", seconds, 240, at_most=True)


def potholes(seed: int, folder: Path, _: Path | None) -> Iterator[Goal]:
    """Run `./train.sh --dataset-dir examples/potholes`; score validation and test images."""
    seconds = train(folder, ["--dataset-dir", str(POTHOLES), "--seed", str(seed)])
    splits = load_splits(POTHOLES)
    assert splits.test is not None
    both = join(splits.valid, splits.test)
    predictor = Predictor.load(folder / "run" / "weights" / "best")
    figures = validate(predictor, both, max_detections=100).figures
    print(f"{len(both.images)} images: box AP {figures['bbox/AP']:.3f}", end=", ")
    print(f"mask AP50 {figures['segm/AP50']:.3f}")
    yield Goal("box AP50", figures["bbox/AP50"], 0.35)
    yield Goal("seconds", seconds, 480, at_most=True)


def nuclei(seed: int, folder: Path, wheels: Path | None) -> Iterator[Goal]:
    """Run `./train.sh` on tiles of a microscope's image, without a goal."""
    if wheels is None:
        print("nuclei: skipped; --wheels names the folder of stardist's wheel")
        return
    write_nuclei(next(wheels.glob("stardist-*.whl")), folder / "nuclei")
    seconds = train(folder, ["--dataset-dir", str(folder / "nuclei"), "--seed", str(seed)])
    figures = read_json(folder / "run" / "metrics.json")
    boxes, masks = figures["bbox/AP50"], figures["segm/AP50"]
    print(f"box AP50 {boxes:.3f}, mask AP50 {masks:.3f}, {seconds:.0f} s")
    yield from ()


Part = Callable[[int, Path, Path | None], Iterator[Goal]]  # of a seed, a new folder, wheels
PARTS: dict[str, Part] = {part.__name__: part for part in (shapes, potholes, nuclei)}


def train(folder: Path, words: Sequence[str]) -> float:
    """Run `./train.sh` with these words; return its seconds, from the command to its end."""
    begun = time.monotonic()
    subprocess.run(
        ["./train.sh", *words, "--output-dir", str(folder / "run")],
        cwd=ROOT,
        env=os.environ | {"SAM3_RUNTIME": "local"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - begun


def write_nuclei(wheel: Path, folder: Path) -> None:
    """Write the sample image and its labels as tiles: 10 to train on, 6 for validation."""
    with zipfile.ZipFile(wheel) as archive:
        pixels, labels = (
            np.asarray(Image.open(io.BytesIO(archive.read(f"stardist/data/images/{name}2d.tif"))))
            for name in ("img", "mask")
        )
    low, high = np.percentile(pixels, (0.1, 99.9))
    gray = (np.clip((pixels - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    side = SCALE * TILE
    for split, rest in (("train", (1, 2)), ("valid", (0,))):
        images: list[dict] = []
        annotations: list[dict] = []
        (folder / split).mkdir(parents=True)
        for row in range(TILES):
            for column in range(TILES):
                if (row + column) % 3 not in rest:
                    continue
                window = np.s_[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
                image = {"id": len(images) + 1, "file_name": f"{row}{column}.png"}
                images.append({**image, "width": side, "height": side})
                tile = Image.fromarray(gray[window]).resize((side, side), Image.Resampling.BICUBIC)
                tile.save(folder / split / f"{row}{column}.png")
                numbers = labels[window].repeat(SCALE, 0).repeat(SCALE, 1)
                for number in set(np.unique(numbers).tolist()) - {0}:
                    rle = coco_mask.encode(np.asfortranarray(numbers == number, dtype=np.uint8))
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": len(images),
                            "category_id": 1,
                            "bbox": coco_mask.toBbox(rle).tolist(),
                            "area": int(coco_mask.area(rle)),
                            "iscrowd": 0,
                            "segmentation": {
                                "size": [side, side],
                                "counts": rle["counts"].decode("ascii"),
                            },
                        }
                    )
        document = {"images": images, "annotations": annotations}
        names = {"categories": [{"id": 1, "name": "nucleus"}]}
        write_json(folder / split / "_annotations.coco.json", document | names)


def main() -> int:
    """Print each figure beside its goal; return 1 where one is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="|".join(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--wheels", type=Path, help="folder of stardist's wheel, for nuclei")
    arguments = parser.parse_args()
    goals: list[Goal] = []
    for name in arguments.parts or PARTS:
        for seed in range(arguments.seeds):
            print(f"{name}, seed {seed}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                for goal in PARTS[name](seed, Path(folder), arguments.wheels):
                    print(f"  {goal}", flush=True)
                    goals.append(goal)
    return 0 if all(goal.reached for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
