"""The output folder of an export, which must not hold anything else."""

from __future__ import annotations

from pathlib import Path

from app.deploy.runtime.manifest import FILE, FORMAT
from app.errors import UserError
from app.files import SETTINGS_BYTES, exists_problem, read_json
from app.model.transformers.config import CONFIG

RECORD = "export.json"  # of the formats that keep no manifest
UPSTREAM, TRITON = "sam3-finetuning/sam3/1", "sam3-finetuning/triton/1"


def check_output(folder: Path, source: Path, *, overwrite: bool) -> None:
    """Raise UserError where writing to `folder` would destroy something that is no export.

    Args:
        source: the weights that are exported.
        overwrite: whether an earlier export may be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if source.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--output {folder}: holds the weights {source}; name another folder.")
    if not _is_export(folder):
        raise UserError(
            f"--output {folder}: holds something other than an exported model; name a new folder."
        )
    if not overwrite:
        raise UserError(exists_problem(folder, "holds an exported model", option="--output"))


def _is_export(folder: Path) -> bool:
    """Return whether the folder holds an export of any format."""
    config = _read(folder / CONFIG).get("architectures")
    return (
        config in (["Sam3Model"], ["Sam3VideoModel"])
        or _read(folder / FILE).get("format") == FORMAT
        or _read(folder / RECORD).get("format") in (UPSTREAM, TRITON)
    )


def _read(file: Path) -> dict[str, object]:
    """Return a JSON object; empty where there is none."""
    try:
        content = read_json(file, most=SETTINGS_BYTES)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}
