"""Exports weights to `sam3.pt`, and prints how much memory that took: `python -m … FOLDER`.

Run in a process of its own, as one that has worked before holds memory that it takes again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.deploy.upstream_file import export
from app.model import weights
from app.model.build import build_model
from app.model.bundled import NANO
from tests.model.published import SMALL, build_small, write_sam3

# SMALL over a wider trunk and text encoder, so that weights outweigh all else: 400 MB.
WIDE = SMALL.model_copy(
    update={
        "vision": SMALL.vision.model_copy(update={"embed_dim": 768}),
        "text": SMALL.text.model_copy(update={"width": 512, "depth": 4}),
    }
)
# Anonymous memory: what is mapped of a file is not in it, unless it was written to.
WATCH = """
import select, sys
most, done = 0, False
while not done:
    done = select.select([sys.stdin], [], [], 0.003)[0]
    with open(f"/proc/{sys.argv[1]}/status") as lines:
        most = max([most, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
print(most * 1024)
"""


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Tell the most bytes of anonymous memory in the block, as another process sees them."""
    most: list[int] = []
    words = [sys.executable, "-S", "-c", WATCH, str(os.getpid())]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as watcher:
        yield most
        most.append(int(watcher.communicate()[0]))


def main(folder: Path) -> None:
    """Print the size of the base's file, and by how much each export grew beyond what was held."""
    with pytest.MonkeyPatch.context() as patch:
        build_small(patch, WIDE)
        write_sam3(folder / "sam3.pt")
        model = build_model(WIDE)
        weights.load_into(model, folder / "sam3.pt", merge=False)
        base = weights.origin(folder / "sam3.pt")
        weights.save(model, folder / "tuned", weights.Header(model=WIDE, base=base))
        del model
        export(NANO, folder / "nano")  # what is imported and kept once
        gc.collect()
        with watched() as before:
            pass
        found = {"file": (folder / "sam3.pt").stat().st_size}
        for precision in ("fp32", "fp16"):
            with watched() as most:
                export(folder / "tuned", folder / precision, precision=precision)
            found[precision] = most[0] - before[0]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
