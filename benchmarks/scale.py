"""Measure work that is split: images by the million, planning, a sweep; exits 1 below a goal.

.venv/bin/python -m benchmarks.scale                          # all of it: an hour on 2 cores
.venv/bin/python -m benchmarks.scale images --images 2000     # parts, by name, and fewer images
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from PIL import Image

from app.datasets.images import open_image
from app.datasets.synthetic.films import draw_film
from app.datasets.synthetic.shapes import make_shapes
from app.inference.predictor import Predictor
from app.launch.shards import Shard
from app.scale.parts import rows_of
from app.scale.sources import items, read
from benchmarks.first_hour import Goal
from tests.helpers import MICRO

WEIGHTS = Path(__file__).resolve().parents[1] / "app" / "assets" / "nano"
PROMPTS = ("circle", "cross")
TARS, DRAWN = 4, 40  # archives; pictures that fill them
KILLS, SWEEP_KILLS = 20, 10
NAMES, SHARDS, LINES = 10**8, 10_000, 10**7  # names are those of a file of LINES, again and again
SAMPLE = 200  # images that the predictor alone is timed on, before and after


def images(folder: Path, count: int) -> Iterator[Goal]:
    """Small images from tars in 1 and in 4 shards, the latter killed again and again."""
    tars = folder / "tars"
    _draw(tars, count)
    alone = _alone(tars)
    whole, peaks, seconds = folder / "one", list[float](), 0.0
    process, begun = _infer(tars, whole, "--shards", "1", "--shard", "0/1"), time.monotonic()
    memory = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(2)
        seconds = time.monotonic() - begun
        if any(whole.glob("*/part-*")):  # all is loaded, and has been used
            try:
                peaks.append(memory.memory_info().rss / 1e6)
            except psutil.NoSuchProcess:
                break
    assert process.wait() == 0
    alone = (alone + _alone(tars)) / 2
    said = (folder / "said.txt").read_text()
    print(said.strip().splitlines()[-1])
    rate = float(said.rpartition(" images a second")[0].rpartition("\n")[2])
    print(f"predictor alone: {alone:.1f} images a second")
    yield Goal("images a second, of the predictor's alone", rate / alone, 0.9)
    grown = max(peaks[len(peaks) // 2 :]) - max(peaks[: len(peaks) // 2]) if peaks else 0.0
    yield Goal("megabytes more in the second half", grown, 20, at_most=True)

    chance, four, kills = random.Random(0), folder / "four", 0
    while True:
        process = _infer(tars, four, "--shards", "4", "--num-gpus", "2")
        if kills < KILLS:
            time.sleep(6 + 2 * seconds / KILLS * chance.random())
            _kill(process, str(four))
            kills += 1
            continue
        assert process.wait() == 0
        break
    found = [_rows(whole), _rows(four)]
    print(f"killed {kills} times; {len(found[1])} images")
    yield Goal("images that one run and the killed one found alike", _alike(*found), count)
    done = subprocess.run([sys.executable, "-m", "app", "collect", str(four)])
    yield Goal("collect's exit code", done.returncode, 0, at_most=True)


def _draw(tars: Path, count: int) -> None:
    tars.mkdir()
    film = draw_film((0, 5), width=192, height=144)
    blobs = []
    for number in range(DRAWN):
        buffer = io.BytesIO()
        Image.fromarray(film.frame(number / 10)[0]).save(buffer, "JPEG", quality=85)
        blobs.append(buffer.getvalue())
    for number in range(TARS):
        with tarfile.open(tars / f"{number:03}.tar", "w") as archive:
            for image in range(number * count // TARS, (number + 1) * count // TARS):
                info = tarfile.TarInfo(f"{image:06}.jpg")
                info.size = len(blobs[image % DRAWN])
                archive.addfile(info, io.BytesIO(blobs[image % DRAWN]))


def _alone(tars: Path) -> float:
    """Return how many images a second the predictor sees that are opened already."""
    predictor = Predictor.load(WEIGHTS, device="cpu")
    some = itertools.islice(items(str(tars), Shard(0, 1)), SAMPLE)
    opened = [open_image(Path(item.name), None, read(item)) for item in some]
    predictor.predict_batch(opened[:1], PROMPTS)
    begun = time.perf_counter()
    for image in opened:
        predictor.predict_batch([image], PROMPTS)
    return len(opened) / (time.perf_counter() - begun)


def _infer(tars: Path, output: Path, *more: str) -> subprocess.Popen[bytes]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    words = ["--checkpoint", str(WEIGHTS), "--input", str(tars), "--device", "cpu", *prompts]
    command = [sys.executable, "-m", "app", "infer", *words, "--output-dir", str(output), *more]
    with (output.parent / "said.txt").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)


def _kill(process: subprocess.Popen[bytes], words: str) -> None:
    """SIGKILL a process and all that have these words in their command."""
    process.kill()
    process.wait()
    for each in psutil.process_iter(["pid", "cmdline"]):
        if each.pid != os.getpid() and words in " ".join(each.info["cmdline"] or []):
            try:
                os.kill(each.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    time.sleep(0.5)


def _rows(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in sorted(output.glob("*/part-*")):
        for row in rows_of(part):
            assert row["name"] not in found, row["name"]
            found[row["name"]] = row
    return found


def _alike(first: dict[str, Any], second: dict[str, Any]) -> int:
    """Return how many images have the same objects, but for rounding of scores.

    Two processes at a time have a thread each, and sums of another order.
    """

    def close(one: Any, other: Any) -> bool:
        near = zip(one["score"], other["score"], strict=False)
        same = one["label"] == other["label"] and len(one["score"]) == len(other["score"])
        return same and all(abs(a - b) < 1e-3 for a, b in near)

    return sum(name in second and close(row, second[name]) for name, row in first.items())


def plan(folder: Path, _: int) -> Iterator[Goal]:
    """The names of a shard of 10,000 among 100 million."""
    file = folder / "names.txt"
    with file.open("w") as out:
        for start in range(0, LINES, 100_000):
            out.write("".join(f"fleet/{n:08}.jpg\n" for n in range(start, start + 100_000)))
    begun, found = time.perf_counter(), 0
    for _time in range(NAMES // LINES):
        found += sum(1 for _item in items(str(file), Shard(4711, SHARDS)))
    seconds = time.perf_counter() - begun
    print(f"{NAMES} names, shard 4711 of {SHARDS}: {found} images")
    yield Goal("seconds", seconds, 60, at_most=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    yield Goal("gigabytes", memory, 1.0, at_most=True)


def sweep(folder: Path, _: int) -> Iterator[Goal]:
    """12 cells on 3 datasets, killed again and again, beside an unbroken sweep."""
    for number in range(3):
        drawn = {"train": 3, "valid": 1, "width": 96, "height": 64, "seed": number}
        make_shapes(folder / f"set-{number}", **drawn, fog=0, radius=[0.08, 0.25], max_shapes=5)
    content = {
        "keys": {"optim.lr_scale": [0.5, 1, 2], "dataset.negatives": [0, 1]},
        "datasets": [str(folder / f"set-{number}") for number in range(3)],
        "seeds": [0, 1],
        "overrides": [*MICRO, "checkpoint=none", "training.device=cpu", "training.epochs=2"],
    }
    content["overrides"] += ["evaluation.pictures=0", "evaluation.off_prompts=0"]
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    begun = time.monotonic()
    assert _sweep(folder, "whole").wait() == 0
    seconds = time.monotonic() - begun
    chance = random.Random(0)
    for _kill_number in range(SWEEP_KILLS):
        process = _sweep(folder, "cut")
        time.sleep(5 + seconds / SWEEP_KILLS * chance.random())
        _kill(process, str(folder / "cut"))
    assert _sweep(folder, "cut").wait() == 0
    tables = [_table(folder / name) for name in ("whole", "cut")]
    print(f"{len(tables[0])} cells in {seconds:.0f} s; killed {SWEEP_KILLS} times")
    same = sum(one == other for one, other in zip(*tables, strict=True))
    yield Goal("cells of the same figures", same, 36)


def _sweep(folder: Path, name: str) -> subprocess.Popen[bytes]:
    words = ["sweep", str(folder / "sweep.yaml"), "--output-dir", str(folder / name)]
    command = [sys.executable, "-m", "app", *words, "--jobs", "2"]
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)


def _table(folder: Path) -> list[tuple[str, ...]]:
    kept = ("setting", "dataset", "seed", "state", "segm/AP", "bbox/AP", "epochs")
    with (folder / "sweep.csv").open() as file:
        return [tuple(row[key] for key in kept) for row in csv.DictReader(file)]


PARTS: dict[str, Callable[[Path, int], Iterator[Goal]]] = {
    "images": images,
    "plan": plan,
    "sweep": sweep,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--images", type=int, default=20_000)
    options = parser.parse_args()
    reached = True
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            for goal in PARTS[name](Path(folder), options.images):
                print(goal, flush=True)
                reached &= goal.reached
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
