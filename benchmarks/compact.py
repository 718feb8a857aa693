"""The cost of cutting a model down, with nano as the teacher; and the full size, cut and distilled.

    .venv/bin/python -m benchmarks.compact                # the table: an hour on 2 cores
    .venv/bin/python -m benchmarks.compact vocabulary     # parts, by name
    .venv/bin/python -m benchmarks.compact full           # random weights at full size, 20 minutes

Exits 1 where a figure misses its least value.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from app.compression.compaction import REPORT, compact
from app.compression.cut import Cut, cut_model
from app.compression.flags import CutFlags
from app.compression.teaching import teach
from app.config.compose import load_config, load_model_config, recipe_file
from app.datasets.build import Splits
from app.datasets.coco import Dataset
from app.evaluation.validate import validate
from app.files import read_json
from app.inference.predictor import Predictor
from app.model import weights
from app.model.build import build_model
from app.tracking.files import Tracker
from app.training import run
from app.training.output_folder import prepare_folder
from benchmarks.nano import KNOWN_KINDS, Figure, Part, draw, main_of

IMAGES = 1600  # training images, drawn as by the recipe of nano
TRUNK_EPOCHS, FEATURE_EPOCHS, EPOCHS = 8, 2, 11  # some 10 minutes on 2 cores
MINUTES = 20
BLOCKS, MLP = 2, 0.5  # that stay of nano's 4 blocks, and the share of their units that stays
FULL_GB, STUDENT_GB, FULL_SPEED = 20, 8, 2
PEAK = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def table(start: Path, folder: Path) -> list[Figure]:
    """Compare students of half the blocks and half the MLP units that were made in three ways."""
    truth = draw(folder / "truth", train=300, valid=1, kinds=KNOWN_KINDS, label_by="kind").train
    learn = draw(folder / "learn", train=IMAGES, valid=10, seed=2_000_000)
    teacher = mask_ap(start, truth)
    pruned = cut(start, folder / "pruned", folder / "learn", "taylor")
    projected = cut(start, folder / "projected", folder / "learn", "svd")
    misplaced = misplace(start, folder / "misplaced")
    students = {"pruned": pruned, "projected": projected, "misplaced": misplaced}
    share = {name: mask_ap(path, truth) / teacher for name, path in students.items()}
    taught, seconds = {}, {}
    for name, path in students.items():
        best, seconds[name] = distil(path, start, learn, folder / f"{name}-taught")
        taught[name] = mask_ap(best, truth) / teacher
        print(f"  {name}, distilled: {taught[name]:.3f} in {seconds[name]:.0f} s", flush=True)
    first = taught["pruned"]
    return [
        Figure("the teacher's mask AP", teacher),
        Figure("half of blocks and MLP, distilled, share of it", first, 0.95, 0.85),
        Figure("  its minutes", seconds["pruned"] / 60, MINUTES, MINUTES, True),
        Figure("the same, not distilled", share["pruned"], None, share["projected"]),
        Figure("SVD at equal parameters, not distilled", share["projected"]),
        Figure("SVD, distilled as long", taught["projected"], None, first, True),
        Figure("global slots misplaced, not distilled", share["misplaced"]),
        Figure("global slots misplaced, distilled as long", taught["misplaced"], None, first, True),
    ]


def vocabulary(start: Path, folder: Path) -> list[Figure]:
    """Compare a stored vocabulary with the text encoder."""
    truth = draw(folder / "truth", train=300, valid=1, kinds=KNOWN_KINDS, label_by="kind").train
    stored = folder / "stored"
    compact(start, stored, CutFlags(vocabulary=KNOWN_KINDS), [], by="taylor")
    share = mask_ap(stored, truth) / mask_ap(start, truth)
    saved = read_json(stored / REPORT)["steps"]
    bytes_left = saved[-1]["bytes"] / saved[0]["bytes"]
    return [
        Figure("stored vocabulary, share of the teacher's mask AP", share, 1.0, 1.0),
        Figure("  its bytes, share of the teacher's", bytes_left),
    ]


def cut(start: Path, student: Path, images: Path, by: Any) -> Path:
    """Cut weights to half the blocks and units; return the student's folder."""
    compact(
        start,
        student,
        CutFlags(blocks=BLOCKS, mlp=MLP),
        [f"dataset.dir={images}"],
        by=by,
        has_data=True,
    )
    return student


def misplace(start: Path, student: Path) -> Path:
    """Save a student with windowed blocks in the places of global attention; return its folder."""
    model, header = weights.load(start)
    blocks = model.backbone.vision_backbone.trunk.blocks
    windowed, everywhere = (0, 2), (1, 3)
    for new, old in zip(everywhere, windowed, strict=True):
        state = {k: v for k, v in blocks[old].state_dict().items() if not k.endswith("freqs_cis")}
        blocks[new].load_state_dict(state, strict=False)
    units = tuple(
        (blocks[i].mlp.fc2.weight.norm(dim=0) * blocks[i].mlp.fc1.weight.norm(dim=1))
        .topk(round(MLP * header.model.vision.mlp_units))
        .indices.sort()
        .values
        for i in everywhere
    )
    smaller, size = cut_model(model, header.model, Cut(blocks=everywhere, hidden=units))
    weights.save(smaller, student, header.model_copy(update={"model": size}))
    return student


def distil(student: Path, teacher: Path, learn: Splits, folder: Path) -> tuple[Path, float]:
    """Distil a student; return its last weights and the seconds that it took."""
    config = load_config(
        [
            f"output_dir={folder}",
            f"distill.teacher={teacher}",
            f"distill.trunk_epochs={TRUNK_EPOCHS}",
            f"distill.feature_epochs={FEATURE_EPOCHS}",
            f"training.epochs={EPOCHS}",
            f"training.save_every={EPOCHS}",
            f"evaluation.every={EPOCHS}",
            "evaluation.pictures=0",
        ],
        recipe_file("distill"),
        weights.describe(student).model,
    )
    prepare_folder(folder, resume=None, overwrite=False)
    begun = time.monotonic()
    run.train(config, learn, weights.find_file(student), recorder=Tracker(folder), teach=teach)
    return folder / "weights" / "last", time.monotonic() - begun


def mask_ap(path: Path, truth: Dataset) -> float:
    """Return the mask AP of weights on labelled images."""
    return validate(Predictor.load(path), truth, max_detections=100).figures["segm/AP"]


def full(start: Path, folder: Path) -> list[Figure]:
    """Cut sam3 with random weights to small, distil a few steps, and time the trunk of each."""
    del start
    folder.mkdir(parents=True)
    sam3 = folder / "sam3"
    weights.save(
        build_model(load_model_config("sam3")),
        sam3,
        weights.Header(
            model=load_model_config("sam3"), prompts=["circle", "rectangle", "triangle"]
        ),
    )
    make = ["data", "build", "--output-dir", str(folder / "set"), "dataset.shapes.train=2"]
    source = ["--dataset-dir", str(folder / "set")]
    seconds, peak = command(*make)
    seconds, peak = command(
        "compact",
        sam3,
        "--output-dir",
        folder / "small",
        "--to",
        "small",
        "--remove-blocks",
        "dart",
        "--decoder-layers",
        4,
        "--width",
        "activation",
        "--images",
        folder / "set" / "train" / "images",
        "--measure-on",
        1,
        "--vocabulary",
        "classes",
    )
    figures = [
        Figure("full size cut to small, seconds", seconds),
        Figure("  its peak, GB", peak / 1e9, FULL_GB, FULL_GB, True),
    ]
    taught, peak = command(
        "train",
        "--recipe",
        "distill",
        "--checkpoint",
        folder / "small",
        "--teacher",
        sam3,
        "--plan=measure",
        "--batch-size",
        2,
        "training.precision=bf16",
        *source,
    )
    figures += [
        Figure("distilling small at 672 px, four steps of 2 images, start to end, seconds", taught),
        Figure("  its peak, GB", peak / 1e9, STUDENT_GB, FULL_GB, True),
    ]
    times, side = {}, load_model_config("sam3").resolution
    for name, path in (("sam3", sam3), ("small", folder / "small")):
        model, _ = weights.load(path, resolution=side)
        trunk = model.eval().backbone.vision_backbone.trunk
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            pixels = torch.zeros(1, 3, side, side)
            trunk(pixels)
            begun = time.monotonic()
            trunk(pixels)
            times[name] = time.monotonic() - begun
        print(f"  {name}: trunk at {side} px {times[name]:.2f} s", flush=True)
    ratio = times["sam3"] / times["small"]
    return [*figures, Figure("small's trunk, times as fast", ratio, FULL_SPEED, FULL_SPEED)]


def command(*words: object) -> tuple[float, int]:
    """Run `python -m app WORDS`; return its seconds and its peak bytes."""
    begun = time.monotonic()
    line = [sys.executable, "-c", PEAK, sys.executable, "-m", "app", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    if done.returncode:
        sys.exit(f"python -m app {' '.join(map(str, words))} failed")
    return time.monotonic() - begun, int(done.stdout.split()[-1])


PARTS: dict[str, Part] = {part.__name__: part for part in (table, vocabulary, full)}


if __name__ == "__main__":
    sys.exit(main_of(__doc__, PARTS, ("table", "vocabulary")))
