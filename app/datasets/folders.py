"""The folders of a dataset's splits."""

from __future__ import annotations

from pathlib import Path

from app.errors import UserError

FOLDERS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}


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
