"""The weights that the project carries: packed small, and proved whole before they are used."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app.errors import UserError
from app.files import atomic_path, claim, hash_file, remove_unfinished, write_text
from app.model.weights import FILE, find_file, read_header

NANO = Path(__file__).resolve().parents[1] / "assets" / "nano"


def bundled_nano() -> Path | None:
    """Return the folder of nano's weights; None where this copy of the project has none.

    Raises:
        UserError: they are not those that were packed.
    """
    file = NANO / FILE
    if not file.is_file():
        return None
    if hash_file(file) != _hash_file(file).read_text("ascii", "replace").strip():
        raise UserError(
            f"{file}: is damaged: its SHA-256 is not that of {_hash_file(file).name}; restore both "
            "from the project, or give --checkpoint"
        )
    return NANO


def pack(source: Path, folder: Path) -> Path:
    """Write weights of ours as float16, half as large, to `folder`, with their SHA-256 beside.

    Raises:
        UserError: `source` is no weights file of ours, or `folder` holds weights.
    """
    file = find_file(source)
    if read_header(file) is None:
        raise UserError(f"{file}: has no header of ours; give weights that a run has left")
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    state = {
        key: value.to(torch.float16) if value.is_floating_point() else value
        for key, value in load_file(file).items()
    }
    packed = folder / FILE
    claim(folder)
    remove_unfinished(packed)
    if packed.exists():
        raise UserError(f"--output-dir {folder}: holds {FILE} already; name another folder")
    with atomic_path(packed) as temporary:
        save_file(state, temporary, metadata=metadata)
    write_text(_hash_file(packed), hash_file(packed) + "\n")
    return packed


def _hash_file(file: Path) -> Path:
    return file.with_suffix(file.suffix + ".sha256")
