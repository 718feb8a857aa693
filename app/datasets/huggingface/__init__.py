"""A dataset of huggingface.co, or a folder in its layout → COCO on this machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from app.config.schema import HuggingFaceConfig
from app.datasets.huggingface.columns import check_group, guess, parse
from app.datasets.huggingface.convert import convert
from app.datasets.huggingface.evidence import gather, settle
from app.datasets.huggingface.hub import Repository, Unreachable, quiet, resolve
from app.datasets.huggingface.names import class_names
from app.datasets.huggingface.splits import choose_splits, open_splits
from app.errors import UserError
from app.files import atomic_folder, read_json, short_hash

log = logging.getLogger("app")

VERSION = 1  # of the conversion: a folder that another one wrote is made anew
MARK = Path("train", "_annotations.coco.json")


def fetch(config: HuggingFaceConfig, data: Path, group_column: str | None = None) -> Path:
    """Return the folder under `data` that holds the dataset as COCO; fetch it if it is missing.

    Args:
        config: `name` is OWNER/NAME[@REVISION], or an existing folder in the same layout.
        data: finished sets lie in `data/huggingface/`, a folder a revision.
        group_column: a column that is kept beside each image, under its own name.

    Raises:
        UserError: it is not to be had, or what its columns hold cannot be told.
    """
    assert config.name is not None
    quiet()
    home = data / "huggingface"
    parse(config.columns)  # a mistyped one is said before anything is fetched
    try:
        repository = resolve(config.name)
    except Unreachable as error:
        return _copy_fetched_earlier(config, home, group_column, error)
    folder = home / _folder_name(config, repository, group_column)
    info = _info(config, repository, group_column)
    if (folder / MARK).is_file() and read_json(folder / MARK).get("info") == info:
        log.info("%s: already in %s", config.name, folder)
        return folder
    _make(config, repository, info, folder, home / ".cache", group_column)
    return folder


def _make(
    config: HuggingFaceConfig,
    repository: Repository,
    info: dict[str, Any],
    folder: Path,
    cache: Path,
    group_column: str | None,
) -> None:
    choice = parse(config.columns)
    opened = open_splits(repository, config.config, config.streaming, cache)
    chosen = choose_splits(list(opened.splits), config.split, repository.name)
    splits = {ours: opened.splits[theirs] for ours, theirs in chosen.items()}
    columns = guess(opened.features, choice, repository.name)
    log.info("%s: columns %s", repository.name, columns.describe())
    if group_column is not None:
        check_group(group_column, opened.features, repository.name)
    names = class_names(opened.features, columns, choice, opened.id2label, repository.name)
    evidence = gather(splits, columns, opened.roots, repository.name)
    reading = settle(columns, choice, evidence, names, opened.roots, repository.name)
    for reason in reading.reasons:
        log.info("%s: %s", repository.name, reason)
    with atomic_folder(folder) as temporary:
        convert(splits, reading, temporary, info, repository.name, group_column)


def _info(
    config: HuggingFaceConfig, repository: Repository, group_column: str | None
) -> dict[str, Any]:
    """Return the `info` of the COCO JSON: what was asked for, and the revision that it came to."""
    asked = config.model_dump(include={"name", "config", "split", "columns"})
    if group_column is not None:
        asked["group_column"] = group_column
    return {"source": "huggingface", "version": VERSION, "revision": repository.commit, **asked}


def _folder_name(
    config: HuggingFaceConfig, repository: Repository, group_column: str | None
) -> str:
    name = f"{repository.name.replace('/', '--')}@{repository.commit[:12]}"
    for choice in (config.config, config.split):
        name += f"--{_safe(choice)}" if choice else ""
    if group_column is not None:
        name += f"--{short_hash(group_column, 8)}"
    return f"{name}--{short_hash(config.columns, 8)}" if config.columns else name


def _safe(text: str) -> str:
    """Return the text itself where it can be part of a folder's name, else a hash of it."""
    plain = text.replace("-", "").replace("_", "").isalnum() and text.isascii()
    return text if plain else short_hash(text, 8)


def _copy_fetched_earlier(
    config: HuggingFaceConfig, home: Path, group_column: str | None, error: Unreachable
) -> Path:
    """Return the newest copy of the same choices; raise `error` where there is none."""
    copies = []
    for path in home.glob(f"*/{MARK}"):
        try:
            info = read_json(path)["info"]
        except (UserError, KeyError, TypeError):
            continue
        repository = Repository(config.name or "", str(info.get("revision")), {}, None)
        if json.dumps(info) == json.dumps(_info(config, repository, group_column)):
            copies.append(path)
    if not copies:
        raise error
    folder = max(copies, key=lambda path: path.stat().st_mtime).parents[1]
    log.warning("%s Taking the copy that was fetched earlier: %s", error, folder)
    return folder
