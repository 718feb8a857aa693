"""Commands that are killed: `python -m tests.cli.killed_commands FOLDER KILLS`.

FOLDER holds a finished `run`. `merge`, `compact` and `report`, each forked from this warm process,
write over old files until they kill themselves, for real: before one of their file operations, or
within a file. Under its final name, each file is then the old one or the new one, whole.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path

import torch

# What the commands import, once for all of them.
import app.compression.compaction
import app.evaluation.model_card
import app.evaluation.report_page  # noqa: F401
from app.config.compose import load_config
from app.files import LOCK
from app.model import adapters, weights
from tests import kills

OLD = b"what was there before"


def contents(folder: Path, names: list[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def main() -> None:
    folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
    logging.disable()
    torch.set_num_threads(1)
    best, adapter = folder / "run" / "weights" / "best", folder / "adapter"
    model, header = weights.load(best)
    lora = load_config(["method=lora-minimal"]).method.lora
    assert lora is not None
    adapters.apply_lora(model, lora, weights.base_reference(weights.find_file(best)))
    weights.save(model, adapter, header)
    cut = ("--mlp", "0.5", "--width", "svd")
    jobs: dict[str, tuple[list[object], Path, list[str]]] = {}
    for name, words, files in (
        ("merge", ("merge", adapter), ["model.safetensors", "README.md"]),
        ("compact", ("compact", best, *cut), ["model.safetensors", "compact.json"]),
    ):
        output = folder / name
        jobs[name] = ([*words, "--output-dir", output, "--overwrite"], output, files)
    jobs["report"] = (["report", folder / "run"], folder / "run", ["report.html"])

    chance, counts = random.Random(0), {}
    for name, (words, output, files) in jobs.items():
        operations = kills.run_command(words, folder)
        assert operations is not None
        new = contents(output, files)
        assert new.keys() == {*files}, name
        largest, made, kept = max(map(len, new.values())), 0, 0
        for number in range(wanted):
            for file in files:
                (output / file).write_bytes(OLD)
            if number % 2:
                kills.run_command(words, folder, longest=chance.randrange(largest))
            else:
                kills.run_command(words, folder, kill_at=chance.randint(1, operations))
            left = contents(output, files)
            assert left.keys() == {*files}, f"{name} lost {files}"
            assert all(left[file] in (OLD, new[file]) for file in files), name
            made += 1
            kept += left == dict.fromkeys(files, OLD)
        assert kills.run_command(words, folder), name
        assert contents(output, files) == new
        if output != folder / "run":  # a report's folder is nobody's alone
            assert {path.name for path in output.iterdir()} == {*files, LOCK}, name
        counts[name] = {"kills": made, "that kept the old": kept}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
