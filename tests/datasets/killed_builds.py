"""Builds killed at each of their file operations: `python -m tests.datasets.killed_builds FOLDER`.

FOLDER holds two datasets, `old` and `new`. Each build of `new` over a build of `old` is a child
that kills itself, for real, before its k-th operation on a file under FOLDER.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

from app.config.compose import load_config
from app.datasets.checked_copy import build
from tests import kills

Tree = dict[str, bytes]


def contents(folder: Path) -> Tree:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main() -> None:
    folder = Path(sys.argv[1])
    config = load_config()
    logging.disable()
    output, parts = folder / "out", ".out.part-*"
    build(folder / "new", output, config)
    new = contents(output)
    build(folder / "old", output, config)
    old = contents(output)
    shutil.copytree(output, folder / "kept")
    made = swaps = 0
    status = 1
    while status:
        child = os.fork()
        if child == 0:
            kills.before_operation(made + 1, folder)
            build(folder / "new", output, config)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), status
        found = contents(output)
        assert found in (old, new), f"kill {made + 1} left {sorted(found)}"
        if status == 0:
            break
        made += 1
        if found == new:
            swaps += 1
            shutil.rmtree(output)
            shutil.copytree(folder / "kept", output)
        if made % 3:  # every third build also finds, and clears up, what the one before it left
            for path in folder.glob(parts):
                shutil.rmtree(path)
    assert contents(output) == new
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["kept", "new", "old", "out"], left
    print(json.dumps({"kills": made, "after the swap": swaps}))


if __name__ == "__main__":
    main()
