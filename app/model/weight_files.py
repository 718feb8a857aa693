"""The file of weights that a path stands for: found without torch, which takes seconds to import.

A mistake in a path can so be told at once.
"""

from __future__ import annotations

from pathlib import Path

from app.errors import UserError
from app.files import SETTINGS_BYTES, exists_problem, read_json

FILE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"  # of a folder whose weights are in several files


def find_file(path: Path) -> Path:
    """Return the weights file that a file or folder stands for; of several files, their index."""
    names = (FILE, ADAPTER, INDEX, "checkpoint.pt")
    candidates = [path] if path.is_file() else [path / name for name in names]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path}: holds no {FILE}, {ADAPTER} or checkpoint.pt; there is {inside}")
    raise UserError(f"{path}: no such checkpoint (a file, or a folder with {FILE})")


def shards(index: Path) -> list[Path]:
    """Return the files that an index names, which are in its folder.

    Raises:
        UserError: no index, or a file that is not there; names each.
    """
    content = read_json(index, most=SETTINGS_BYTES)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index}: has no weight_map of tensors to files")
    names = sorted({str(name) for name in table.values()})
    if foreign := [name for name in names if Path(name).name != name or name in ("", "..")]:
        raise UserError(f"{index}: names {foreign[0]!r}, which is no file of its folder")
    files = [index.parent / name for name in names]
    if gone := [file for file in files if not file.is_file()]:
        raise UserError([f"{index}: names {file.name}, which is not there" for file in gone])
    return files


def require_adapter(path: Path) -> None:
    """Raise UserError where a file or folder holds no adapter."""
    if find_file(path).name != ADAPTER:
        raise UserError(f"{path}: is no adapter (a folder with {ADAPTER}); nothing to merge")


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError where a folder holds weights that may not be replaced."""
    if (folder / FILE).exists() and not overwrite:
        raise UserError(exists_problem(folder, f"holds {FILE} already"))
