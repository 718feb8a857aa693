"""A repository → the rows of its splits, one at a time."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from app.console import command
from app.datasets.huggingface.hub import Repository, explained
from app.errors import UserError, nearest
from app.files import SETTINGS_BYTES, parse_json, read_json

log = logging.getLogger("app")

STREAM_FROM = 5 * 10**9  # bytes: larger sets are not kept on this machine in their own form too
ROLES = {
    "train": ("train", "training"),
    "valid": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json", "id2label.json")
PATTERNS = 1000  # files that are named one by one; each is held against each, so not more


@dataclass(frozen=True)
class Opened:
    """A dataset that can be read.

    Attributes:
        splits: iterable datasets by their own names; images as {"bytes", "path"}, not decoded.
        features: the columns' types, shared by the splits.
        roots: what the address of an image must start with to be read.
        id2label: what the repository's id2label.json holds; None where it has none.
    """

    splits: dict[str, Any]
    features: dict[str, Any]
    roots: tuple[str, ...]
    id2label: Any


def open_splits(
    repository: Repository, config: str | None, streaming: bool | str, cache: Path
) -> Opened:
    """Open every split, its files downloaded to `cache` unless they are streamed.

    Args:
        config: the dataset's configuration; None for the only one, or its default.
        streaming: "auto" streams a set of more than 5 GB, or of unknown size.
    """
    with explained(repository.name, repository.commit):
        builder = _builder(repository, config, cache)
        roots = [repository.root]
        if repository.folder is None and not _streams(repository, builder, streaming):
            repository = _download(repository, builder, cache)
            builder = _builder(repository, builder.config.name, cache)
            roots = [str(repository.folder), str(cache.resolve())]  # a snapshot is made of links
        splits = {
            str(name): _undecoded(rows) for name, rows in builder.as_streaming_dataset().items()
        }
        features = next(iter(splits.values())).features
    return Opened(splits, features, tuple(roots), _read_id2label(repository))


def _undecoded(rows: Any) -> Any:
    if rows.features is None:  # those of JSON lines are known once some are read
        rows = rows._resolve_features()
    return rows.decode(False)


def _builder(repository: Repository, config: str | None, cache: Path) -> Any:
    import datasets

    arguments: dict[str, Any] = {"cache_dir": str(cache / "datasets")}
    if repository.converted:
        config = _choose_config(_converted_configs(repository), config, repository.name)
        files = _converted_files(repository, config)
        return datasets.load_dataset_builder("parquet", config, data_files=files, **arguments)
    path = str(repository.folder or repository.name)
    revision = None if repository.folder else repository.commit
    try:
        return datasets.load_dataset_builder(path, config, revision=revision, **arguments)
    except ValueError:  # no such configuration; or none is named, and it has no default
        names = datasets.get_dataset_config_names(path, revision=revision)
        if config in names or (config is None and len(names) < 2):
            raise
        chosen = _choose_config(names, config, repository.name)
    return datasets.load_dataset_builder(path, chosen, revision=revision, **arguments)


def _choose_config(names: list[str], asked: str | None, where: str) -> str:
    listed = ", ".join(names)
    if asked is not None and asked not in names:
        raise UserError(
            f"{where}: has no configuration '{asked}'; there are {listed}.{nearest(asked, names)}"
        )
    if asked is None and len(names) == 1:
        return names[0]
    chosen = asked or next((name for name in ("default", "full") if name in names), None)
    if chosen is None:
        raise UserError(f"{where}: has several configurations: {listed}; choose with --hf-config")
    if asked is None:
        log.info("%s: configuration '%s' of %s (--hf-config chooses)", where, chosen, listed)
    return chosen


def _converted_configs(repository: Repository) -> list[str]:
    names = sorted({name.split("/")[0] for name in _parquet(repository)})
    if not names:
        raise UserError(f"{repository.name}: its Parquet conversion is empty; take another dataset")
    return names


def _converted_files(repository: Repository, config: str) -> dict[str, list[str]]:
    """Return the files of each split; of a large set the host converts the first part."""
    files: dict[str, list[str]] = {}
    for name in _parquet(repository):
        folder, split, _ = name.split("/")
        if folder == config:
            files.setdefault(split, []).append(f"{repository.root}/{name}")
    for split in files:
        if split.startswith("partial-"):
            log.warning("%s: only its first part is converted: %s", repository.name, split)
    return {split.removeprefix("partial-"): paths for split, paths in files.items()}


def _parquet(repository: Repository) -> list[str]:
    return [name for name in sorted(repository.sizes) if fnmatch(name, "[!.]*/*/*.parquet")]


def _streams(repository: Repository, builder: Any, streaming: bool | str) -> bool:
    if isinstance(streaming, bool):
        return streaming
    sizes = [repository.sizes.get(path) for path in _data_files(repository, builder)]
    known = [size for size in sizes if size is not None]
    streams = len(known) < len(sizes) or sum(known) > STREAM_FROM
    if streams:
        log.info(
            "%s: large, so streamed; dataset.huggingface.streaming=false downloads", repository.name
        )
    return streams


def _data_files(repository: Repository, builder: Any) -> list[str]:
    """Return the paths of the data files in the repository."""
    addresses = [str(file) for files in builder.config.data_files.values() for file in files]
    return [address.split("::")[-1].removeprefix(f"{repository.root}/") for address in addresses]


def _download(repository: Repository, builder: Any, cache: Path) -> Repository:
    """Return the same repository in a folder of `cache`, with the files that `builder` reads."""
    from huggingface_hub import snapshot_download

    files = _data_files(repository, builder)
    folder = snapshot_download(
        repository.name,
        repo_type="dataset",
        revision=repository.commit,
        cache_dir=cache / "hub",
        allow_patterns=[*map(escape, files), *CARDS] if len(files) <= PATTERNS else None,
    )
    return replace(repository, folder=Path(folder))


def _read_id2label(repository: Repository) -> Any:
    from huggingface_hub import HfFileSystem

    if "id2label.json" not in repository.sizes:
        return None
    address = f"{repository.root}/id2label.json"
    with explained(repository.name, repository.commit):
        if repository.folder:
            return read_json(Path(address), most=SETTINGS_BYTES)
        return parse_json(HfFileSystem().read_bytes(address).decode())


def choose_splits(names: list[str], asked: str | None, where: str) -> dict[str, str]:
    """Return the split to take for each of train, valid and test, by its own name.

    Raises:
        UserError: the split that was asked for is not there, or none is to train on.
    """
    listed = ", ".join(names)
    if asked is not None:
        if asked not in names:
            raise UserError(
                f"{where}: has no split '{asked}'; there are {listed}.{nearest(asked, names)}"
            )
        return {"train": asked}
    if len(names) == 1:
        return {"train": names[0]}
    chosen: dict[str, str] = {}
    for name in names:
        role = next((role for role, known in ROLES.items() if name.lower() in known), None)
        if role is None or role in chosen:
            flag = command("--hf-split", name)
            log.warning("%s: split '%s' is left out; %s takes it", where, name, flag)
        else:
            chosen[role] = name
    if "train" not in chosen:
        raise UserError(f"{where}: no split to train on in {listed}; choose with --hf-split")
    return chosen
