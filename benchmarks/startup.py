"""Seconds from a command to its help, its first answer and its first update; exits 1 above a goal.

    .venv/bin/python -m benchmarks.startup                      # on 2 quiet cores
    .venv/bin/python -m benchmarks.startup --before ../other    # beside another tree of the project

Each is run by its script in the runtime `local`, as a user would, with bytecode compiled and files
in the disk's cache; the least of several times counts. The CPU's seconds tell what was waited for:
where they are far below the others, the machine was busy.

The first answer is there when `./infer.sh` ends, having found a prompt in one image with nano. The
first update is there when the optimizer has stepped in `./train.sh` on shapes with nano; a
`sitecustomize.py` in the process notes the time and ends it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.console import log_to_stdout
from app.datasets.synthetic.shapes import make_shapes

ROOT = Path(__file__).resolve().parents[1]
CORES = 2

# Ends a process, all of whose answers are written, at its optimizer's first step.
END_AT_UPDATE = """
import os, sys
class End:
    def find_spec(self, name, path=None, target=None):
        if name == "accelerate":
            sys.meta_path.remove(self)
            from torch.optim.optimizer import register_optimizer_step_post_hook
            register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.meta_path.insert(0, End())
"""


@dataclass(frozen=True)
class Start:
    """A command that is timed.

    Attributes:
        name: what is timed.
        goal: seconds.
        words: of the command; {out} is a new folder, {image} an image, {data} a dataset.
        until_update: end at the first update.
    """

    name: str
    goal: float
    words: tuple[str, ...]
    until_update: bool = False


STARTS = (
    Start("./infer.sh --help", 1.0, ("./infer.sh", "--help")),
    Start(
        "./infer.sh to the first answer",
        5.0,
        (
            *("./infer.sh", "--checkpoint", "app/assets/nano", "--input", "{image}"),
            *("--prompt", "circle", "--output-dir", "{out}"),
        ),
    ),
    Start(
        "./train.sh to the first update",
        7.0,
        (
            *("./train.sh", "--model", "nano", "--epochs", "1", "--batch-size", "2"),
            *("--dataset-dir", "{data}", "--output-dir", "{out}", "evaluation.pictures=0"),
        ),
        until_update=True,
    ),
)


@dataclass(frozen=True)
class Seconds:
    """The seconds that a command took, on the clock and of the CPU."""

    wall: float
    cpu: float


def main() -> None:
    """Print each figure beside its goal, and beside the other tree's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="another tree of the project, with its .venv")
    parser.add_argument("--times", type=int, default=5, help="the least of so many counts")
    args = parser.parse_args()
    log_to_stdout()
    trees = [ROOT, *([args.before.resolve()] if args.before else [])]
    with tempfile.TemporaryDirectory() as temporary:
        rows = [measure(start, trees, Path(temporary), args.times) for start in STARTS]
    before = "        before" if args.before else ""
    print(f"{'seconds':34} goal   now   (CPU){before}")
    for start, best in zip(STARTS, rows, strict=True):
        said = "".join(f"  {one.wall:5.2f} ({one.cpu:5.2f})" for one in best)
        print(f"{start.name:34} {start.goal:4.1f}{said}{'' if met(start, best) else '  ABOVE'}")
    sys.exit(not all(met(start, best) for start, best in zip(STARTS, rows, strict=True)))


def met(start: Start, best: Sequence[Seconds]) -> bool:
    """Return whether this tree's seconds reach the goal."""
    return best[0].wall <= start.goal


def measure(start: Start, trees: Sequence[Path], folder: Path, times: int) -> list[Seconds]:
    """Return the least seconds of each tree, which take turns; a first round is not counted."""
    data = folder / "shapes"
    if not data.exists():
        make_shapes(data, train=4, valid=1, fog=0, width=96, height=64, seed=3)
    image = next((data / "valid" / "images").iterdir())
    rounds = []
    for _ in range(times + 1):
        out = folder / "out"
        row = []
        for tree in trees:
            shutil.rmtree(out, ignore_errors=True)
            words = [word.format(out=out, image=image, data=data) for word in start.words]
            row.append(run(words, tree, folder, until_update=start.until_update))
        rounds.append(row)
    return [min(column, key=lambda one: one.wall) for column in zip(*rounds[1:], strict=True)]


def run(words: Sequence[str], tree: Path, folder: Path, *, until_update: bool) -> Seconds:
    """Return how long a command takes in a tree.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    hooks = folder / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(END_AT_UPDATE if until_update else "")
    environment = os.environ | {
        "SAM3_RUNTIME": "local",
        "PYTHONPATH": str(hooks),
        "OMP_NUM_THREADS": str(CORES),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each start would compile app/ anew
    begun, before = time.monotonic(), os.times()
    done = subprocess.run(
        words, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.monotonic() - begun, os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} in {tree}:\n{done.stdout}{done.stderr}")
    cpu = after.children_user - before.children_user
    return Seconds(wall, cpu + after.children_system - before.children_system)


if __name__ == "__main__":
    main()
