"""A dataset version of Roboflow → its export on this machine."""

from __future__ import annotations

from pathlib import Path

from app.errors import UserError


def fetch(version: str, data: Path) -> Path:
    """The folder under `data` that holds the export of WORKSPACE/PROJECT/VERSION."""
    raise UserError("--roboflow: not there yet")
