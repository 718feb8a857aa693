"""COCO JSON: which file is of which split, and where its images lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.datasets.folders import image_folders, split_folders, split_of
from app.datasets.formats.telling import entries, few, mentions
from app.datasets.names import Names
from app.errors import UserError
from app.files import read_json

JSON_NAMES = ("_annotations.coco.json", "annotations.json")
# annotations/instances_<subset>.json, as CVAT and COCO itself have it
SUBSETS = "annotations/instances_*.json"
PATTERNS = ("*.json", "annotations/*.json", "Annotations/*.json", "labels/*.json")


def is_coco(folder: Path) -> bool:
    """Return whether a COCO JSON, told by what it holds, is in the folder or in a split's."""
    return any(coco_files(path) for path in (folder, *split_folders(folder).values()))


def find_jsons(folder: Path) -> dict[str, Path]:
    """Return the JSON of each split that is there, `train` always; empty where there is none.

    Raises:
        UserError: a split's folder has no JSON, or several; two files are of one split.
    """
    folders = split_folders(folder)
    if not any(map(coco_files, folders.values())) and (found := coco_files(folder)):
        return _by_split(found)
    jsons = {split: _one(path) for split, path in folders.items()}
    present = {split: path for split, path in jsons.items() if path is not None}
    if not present:
        own = _one(folder)
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


def holds_coco(path: Path) -> bool:
    """Return whether a JSON lists images and annotations, but no captions and no panoptic masks.

    One that names both and cannot be parsed counts, so that reading it says what is wrong.
    """
    if path.name == JSON_NAMES[0]:
        return True
    if not mentions(path, "images", "annotations"):
        return False
    try:
        document = read_json(path)
    except UserError:
        return True
    if not isinstance(document, dict) or not {"images", "annotations"} <= document.keys():
        return False
    first = next(iter(entries(document["annotations"])), {})
    return "segments_info" not in first and not ("caption" in first and "category_id" not in first)


def coco_files(folder: Path) -> list[Path]:
    """Return the COCO JSONs of a folder: of the usual names, else all that hold one."""
    usual = [path for name in JSON_NAMES if (path := folder / name).is_file() and holds_coco(path)]
    if usual:
        return usual[:1]
    subsets = [path for path in few(folder, SUBSETS) if holds_coco(path)]
    return subsets or [path for path in few(folder, *PATTERNS) if holds_coco(path)]


def _one(folder: Path) -> Path | None:
    """Return a folder's COCO JSON, or its only JSON, which then is at fault."""
    found = coco_files(folder) or list(few(folder, "*.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"{folder}: has several JSON files ({names}); name the one to use {JSON_NAMES[0]}"
        )
    return found[0] if found else None


def _by_split(jsons: Sequence[Path]) -> dict[str, Path]:
    """Return each file's split by the file's name; a single file is to train on."""
    if len(jsons) == 1:
        return {"train": jsons[0]}
    by_split: dict[str, Path] = {}
    problems = []
    for path in jsons:
        plain = _subset(path).lower() == "default"  # as CVAT calls what has no subset
        split = "train" if plain else split_of(path.stem)
        if split is None:
            problems.append(
                f"{path}: must have train, val or test in its name, as others beside it; rename it"
            )
        elif split in by_split:
            problems.append(f"{path}: is for {split}, as {by_split[split].name} is; keep one")
        else:
            by_split[split] = path
    if not problems and "train" not in by_split:
        at = jsons[0].parent
        problems.append(f"{at}: no instances_train.json to train on, nor train.json; add it")
    if problems:
        raise UserError(problems)
    return by_split


def _subset(path: Path) -> str:
    return path.stem.partition("_")[2] or path.stem


def image_names(folder: Path, path: Path) -> Names:
    """Return where the images of a JSON of the dataset in `folder` are looked for.

    Its subset's folder, its own, the dataset's; at any depth the first of these that is not the
    dataset's while other splits lie in it.
    """
    subset = [folder / "images" / _subset(path), folder / _subset(path)]
    subset += image_folders(folder, split_of(path.stem))
    roots = list(dict.fromkeys([*(root for root in subset if root.is_dir()), path.parent, folder]))
    apart = {(folder / pattern).parent for pattern in PATTERNS}
    own = [root for root in roots if root not in apart]
    return Names(roots, folder, own[0] if own else folder)
