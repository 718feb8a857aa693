"""COCO JSON: which file is of which split, and where its images lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from app.datasets.folders import FOLDERS, split_folders
from app.datasets.names import Names
from app.errors import UserError
from app.files import read_json

JSON_NAMES = ("_annotations.coco.json", "annotations.json")
# annotations/instances_<subset>.json, as CVAT and COCO itself have it -> its split
SUBSETS = {
    **{"default": "train", "train": "train", "test": "test"},
    **{"val": "valid", "valid": "valid", "validation": "valid"},
}


def is_coco(folder: Path) -> bool:
    """Return whether a COCO JSON, by name or by content, is in the folder or in a split's."""
    names = [name for split in FOLDERS.values() for name in split]
    folders = (folder, *(folder / name for name in names))
    return bool(_subset_jsons(folder)) or any(map(_holds_coco, folders))


def _holds_coco(folder: Path) -> bool:
    if any((folder / name).is_file() for name in JSON_NAMES):
        return True
    paths = list(folder.glob("*.json"))
    try:
        document = read_json(paths[0]) if len(paths) == 1 else None
    except UserError:
        return False
    return isinstance(document, dict) and "images" in document and "annotations" in document


def find_jsons(folder: Path) -> dict[str, Path]:
    """Return the JSON of each split that is there, `train` always; empty where there is none.

    Raises:
        UserError: a split's folder has no JSON, or several; two files are of one split.
    """
    folders = split_folders(folder)
    jsons = {split: _find_json(path) for split, path in folders.items()}
    present = {split: path for split, path in jsons.items() if path is not None}
    if not present:
        if subsets := _subset_jsons(folder):
            return _by_split(folder, subsets)
        own = _find_json(folder)
        return {"train": own} if own else {}
    problems = [
        f"{folders[split]}: no COCO JSON ({' or '.join(JSON_NAMES)}) is in it; "
        "add it or remove the folder"
        for split in folders
        if split not in present
    ]
    if "train" not in folders:
        problems.append(
            f"{folder}: no 'train' folder to train on; there is "
            + ", ".join(f"'{path.name}'" for path in folders.values())
        )
    if problems:
        raise UserError(problems)
    return present


def _find_json(folder: Path) -> Path | None:
    for name in JSON_NAMES:
        if (folder / name).is_file():
            return folder / name
    paths = sorted(folder.glob("*.json"))
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise UserError(
            f"{folder}: has several JSON files ({names}); name the one to use {JSON_NAMES[0]}"
        )
    return paths[0] if paths else None


def _subset_jsons(folder: Path) -> list[Path]:
    return sorted(folder.glob("annotations/instances_*.json"))


def _by_split(folder: Path, jsons: Sequence[Path]) -> dict[str, Path]:
    """Return each file's split by the file's name; a single file is to train on."""
    if len(jsons) == 1:
        return {"train": jsons[0]}
    by_split: dict[str, Path] = {}
    problems = []
    for path in jsons:
        split = SUBSETS.get(re.sub(r"\d+$", "", _subset(path)).lower())
        if split is None:
            problems.append(
                f"{path}: must be instances_ and one of {', '.join(SUBSETS)}; rename it"
            )
        elif split in by_split:
            problems.append(f"{path}: is for {split}, as {by_split[split].name} is; keep one")
        else:
            by_split[split] = path
    if not problems and "train" not in by_split:
        problems.append(f"{folder}/annotations: no instances_train.json to train on; add it")
    if problems:
        raise UserError(problems)
    return by_split


def _subset(path: Path) -> str:
    return path.stem.partition("_")[2]


def image_names(folder: Path, path: Path) -> Names:
    """Return where the images of a JSON of the dataset in `folder` are looked for.

    Its subset's folder, its own, the dataset's; at any depth the first of these that is not the
    dataset's while other splits lie in it.
    """
    subset = [folder / "images" / _subset(path), folder / _subset(path)]
    roots = list(dict.fromkeys([*(root for root in subset if root.is_dir()), path.parent, folder]))
    own = [root for root in roots if root != folder and root.name != "annotations"]
    return Names(roots, folder, own[0] if own else folder)
