"""Fetch a dataset from its source → a folder on this machine that `build.load_splits` reads."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from app.config.schema import DatasetConfig
from app.config.shapes import ShapesConfig
from app.datasets import huggingface, roboflow
from app.datasets.archive import unzip
from app.datasets.build import shapes_dataset
from app.datasets.folders import FOLDERS
from app.files import hash_file, locked, open_own, short_hash

log = logging.getLogger(__name__)

HOME = Path(__file__).resolve().parents[2]
# Of the project where it can be written; in an image it cannot, and the working folder is mounted.
DATA = (HOME if os.access(HOME, os.W_OK) else Path.cwd()) / "data"


def fetch(config: DatasetConfig, seed: int, data: Path = DATA) -> Path:
    """Return the folder of the dataset that `config` names; fetch or draw it if it is missing.

    Raises:
        UserError: it is not to be had; says why and what to do.
    """
    if config.dir is not None and not Path(config.dir).is_file():
        return Path(config.dir)
    with _locked(data):
        return _fetch(config, seed, data)


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Let one process fetch at a time: all others of a run then find the data there."""
    data.mkdir(parents=True, exist_ok=True)
    open_own(data / ".lock").close()
    with locked(data / ".lock"):
        yield


def _fetch(config: DatasetConfig, seed: int, data: Path) -> Path:
    if config.dir is not None:
        return _unpacked(Path(config.dir), data)
    if config.huggingface.name is not None:
        return huggingface.fetch(config.huggingface, data, config.reading.group_column)
    if config.roboflow is not None:
        return roboflow.fetch(config.roboflow, data)
    folder = data / f"shapes-{_shapes_name(config.shapes, seed)}"
    return shapes_dataset(folder, **config.shapes.model_dump(), seed=seed)


def _unpacked(archive: Path, data: Path) -> Path:
    """Return the folder that holds a zip's dataset; unpack it if it is not there."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", archive.stem)[:80]
    folder = data / f"zip-{name}-{hash_file(archive)[:12]}"
    if not folder.is_dir():
        log.info("unpacking %s to %s", archive, folder)
        unzip(archive, folder)
    return _innermost(folder)


def _innermost(folder: Path) -> Path:
    """Descend to where there is more than one folder: many zips hold one folder with all in it."""
    entries = [path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]
    splits = [name for names in FOLDERS.values() for name in names]
    if len(entries) == 1 and entries[0].is_dir() and entries[0].name not in splits:
        return _innermost(entries[0])
    return folder


def _shapes_name(shapes: ShapesConfig, seed: int) -> str:
    """Return a short name, safe for a folder, that differs for other settings."""
    settings = json.dumps({**shapes.model_dump(), "seed": seed}, sort_keys=True)
    return short_hash(settings, 12)
