"""The file of weights that a path stands for: found without torch, which takes seconds to import.

A mistake in a path can so be told at once.
"""

from __future__ import annotations

from pathlib import Path

from app.errors import UserError
from app.files import exists_problem

FILE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


def find_file(path: Path) -> Path:
    """Return the weights file that a file or folder stands for."""
    names = (FILE, ADAPTER, "checkpoint.pt")
    candidates = [path] if path.is_file() else [path / name for name in names]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path}: holds no {FILE}, {ADAPTER} or checkpoint.pt; there is {inside}")
    raise UserError(f"{path}: no such checkpoint (a file, or a folder with {FILE})")


def require_adapter(path: Path) -> None:
    """Raise UserError where a file or folder holds no adapter."""
    if find_file(path).name != ADAPTER:
        raise UserError(f"{path}: is no adapter (a folder with {ADAPTER}); nothing to merge")


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError where a folder holds weights that may not be replaced."""
    if (folder / FILE).exists() and not overwrite:
        raise UserError(exists_problem(folder, f"holds {FILE} already"))
