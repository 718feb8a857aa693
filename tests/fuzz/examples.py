"""The examples of `test_fuzz`, by themselves: `python -m tests.fuzz.examples COUNT FOLDER`.

Ends with an error at the first example at which anything but a UserError comes out.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.checked_copy import build
from app.datasets.coco import examine
from app.datasets.names import Names
from app.errors import UserError
from tests.datasets.conftest import noise, sound_document
from tests.fuzz import strategies
from tests.fuzz.usable import assert_usable

MEMORY = 2**30  # bytes of address space that the examples may take beside the libraries
FOLDER = Path(sys.argv[2])
SOURCE, OUTPUT = FOLDER / "set", FOLDER / "out"
CONFIG = load_config(["dataset.max_drop=0.5"])
ran = Counter[str]()


def save(document: Any) -> Path:
    path = SOURCE / "_annotations.coco.json"
    path.write_text(json.dumps(document))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_documents(document: Any) -> None:
    """What is kept can be used, whatever is left out; every fault can be said and shown."""
    ran["documents"] += 1
    path = save(document)
    reading = examine(path, Names([SOURCE]))
    assert_usable(reading.dataset)
    assert all(str(fault).startswith(str(path)) for fault in reading.faults)
    try:
        assert_usable(reading.sound())
    except UserError as error:
        problems = error.problems
    else:
        problems = []
    assert all(p.startswith(str(path)) or "left out (" in p for p in problems)


def check_polygons(polygons: Any) -> None:
    ran["polygons"] += 1
    document = sound_document()
    document["annotations"][0]["segmentation"] = polygons
    reading = examine(save(document), Names([SOURCE]))
    assert_usable(reading.dataset)
    kinds = {f.kind for f in reading.faults}
    assert kinds <= {
        *("polygon", "segmentation", "zero area", "no bbox", "no area", "no iscrowd"),
        *("box convention", "unlisted"),
    }, kinds


def check_runs(counts: Any) -> None:
    ran["runs"] += 1
    document = sound_document()
    document["annotations"][0]["segmentation"] = {"size": [30, 40], "counts": counts}
    reading = examine(save(document), Names([SOURCE]))
    assert_usable(reading.dataset)
    assert len(reading.dataset.annotations) >= 2


def check_full_runs(runs: list[int]) -> None:
    """Runs that fill the mask give their pixels, however many of them are empty."""
    ran["runs"] += 1
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    document = sound_document()
    document["annotations"][0]["segmentation"] = {"size": [30, 40], "counts": runs}
    del document["annotations"][0]["bbox"]
    first = next(
        (a for a in examine(save(document), Names([SOURCE])).dataset.annotations if a.id == 1), None
    )
    assert (first is not None) == flat.any()
    if first is not None:
        mask = coco_mask.decode(first.segmentation)
        assert (mask.ravel(order="F") == flat).all()


def check_builds(document: Any) -> None:
    """An earlier build stays as it was to the byte, or is replaced by one that can be read."""
    ran["builds"] += 1
    save(document)
    before = contents(OUTPUT)
    try:
        build(SOURCE, OUTPUT, CONFIG)
    except UserError:
        assert contents(OUTPUT) == before
    else:
        assert_usable(load_splits(OUTPUT).train)
    assert {path.name for path in FOLDER.iterdir()} == {"set", "out"}


def main() -> None:
    count = int(sys.argv[1])
    logging.disable()
    SOURCE.mkdir()
    for name in ("a.png", "b.png"):
        noise(name).save(SOURCE / name)
    save(sound_document())
    build(SOURCE, OUTPUT, CONFIG)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    documents = strategies.spoiled_documents()
    shares: list[tuple[Any, st.SearchStrategy[Any], float]] = [
        (check_documents, documents, 0.35),
        (check_polygons, strategies.polygons, 0.25),
        (check_runs, strategies.counts, 0.25),
        (check_full_runs, strategies.full_runs, 0.05),
        (check_builds, documents, 0.1),
    ]
    for check, strategy, share in shares:
        limits = settings(
            max_examples=round(count * share),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        limits(given(strategy)(check))()
    print(json.dumps(ran))


if __name__ == "__main__":
    main()
