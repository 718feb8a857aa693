"""The names by which datasets tell their splits: folders, files, subsets."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from app.errors import UserError

FOLDERS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each split (train, valid, test) that is there; may be none.

    Raises:
        UserError: one split has two folders.
    """
    folders = {}
    for split, names in FOLDERS.items():
        paths = [folder / name for name in names if (folder / name).is_dir()]
        if len(paths) > 1:
            raise UserError(f"{folder}: has both {' and '.join(names)} folders; keep one")
        if paths:
            folders[split] = paths[0]
    return folders


def split_of(name: str) -> str | None:
    """Return the split that a name tells, such as `instances_val2017`; None for none or several."""
    told = {WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in WORDS}
    return told.pop() if len(told) == 1 else None


def split_on_way(path: Path, folder: Path) -> str | None:
    """Return the split whose folder is on the way from `folder` to a file, the nearest first."""
    told = (WORDS.get(part.lower()) for part in path.relative_to(folder).parts[-2::-1])
    return next((split for split in told if split), None)


def by_way(paths: Iterable[Path], folder: Path) -> dict[str, tuple[str | None, list[Path]]]:
    """Group label files by the split that the folders on their way tell.

    Returns:
        By split, what was told, and the files. Those of which nothing is told are to train on;
        where none is told of any, their images may lie in every split's folder.
    """
    told = {path: split_on_way(path, folder) for path in paths}
    some = any(told.values())
    groups: dict[str, tuple[str | None, list[Path]]] = {}
    for path, split in told.items():
        known = split or "train"
        groups.setdefault(known, (known if some else None, []))[1].append(path)
    return groups


def splits_of(subsets: Iterable[str], what: str) -> dict[str, str]:
    """Return the split of each subset; where no name tells one, all are to train on.

    Args:
        what: the subsets are, for the message.

    Raises:
        UserError: some names tell a split and others do not.
    """
    names = sorted(set(subsets))
    told = {name: split_of(name) for name in names}
    if len(names) < 2 or not any(told.values()):
        return dict.fromkeys(names, "train")
    plain = ("", "default")  # as CVAT and Datumaro call what was given no subset
    lost = [name for name in names if told[name] is None and name.lower() not in plain]
    if lost:
        raise UserError(
            f"{what} {', '.join(map(repr, lost))}: beside others that are splits, must be called "
            "train, val or test"
        )
    return {name: split or "train" for name, split in told.items()}


def image_folders(folder: Path, split: str | None) -> list[Path]:
    """Return the folders of a split's images that are there: images/train, train/images, …"""
    words = [word for word, its in WORDS.items() if its == split]
    names = [name for word in words for name in (word, word.capitalize())]
    places = ("images", "JPEGImages", "img", ".")
    found = [
        path for name in names for at in places for path in (folder / at / name, folder / name / at)
    ]
    return list(dict.fromkeys(path for path in found if path.is_dir()))


def subset_folders(folder: Path, subsets: Collection[str]) -> list[Path]:
    """Return the folders of these subsets' images that are there, in images/ or in `folder`.

    Subsets are matched with the folders' names, not joined to a path: labels may say anything.
    """
    parents = [path for path in (folder / "images", folder) if path.is_dir()]
    return [
        path
        for parent in parents
        for path in sorted(parent.iterdir())
        if path.name in subsets and path.is_dir()
    ]
